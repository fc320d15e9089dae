"""A CoCa in another language: the same model with another vocabulary and longer texts."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from optima.coca.config import CoCaConfig
from optima.coca.model import CoCa

POSITIONS = "text_decoder.position"
OF_WORDS = ("text_decoder.token_embedding.weight", "multimodal_decoder.head.weight")
"""What holds a row a token."""


def config_in(config: CoCaConfig, vocab_size: int, context_length: int, pad_id: int) -> CoCaConfig:
    """The same sizes for another vocabulary and another length of texts."""
    text = dataclasses.replace(config.text_decoder, vocab_size=vocab_size, context_length=context_length, pad_id=pad_id)
    return dataclasses.replace(config, text_decoder=text)


@torch.no_grad()
def in_language(
    model: CoCa, vocab_size: int, context_length: int, pad_id: int, known: Mapping[int, int], seed: int
) -> CoCa:
    """A copy of the model that reads texts of another vocabulary, on the model's device.

    Args:
        model: what it is made of; all but words and positions stays as it is.
        vocab_size: tokens of the new vocabulary.
        context_length: tokens of the longest text.
        pad_id: token that fills a text up.
        known: new id -> the model's id of the same word, whose rows are kept. Others are drawn around the mean of the
            model's rows, with their spread.
        seed: of the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = CoCa(config_in(model.config, vocab_size, context_length, pad_id), model.head_specs)
        found = model.state_dict()
        found |= {name: _rows(found[name], vocab_size, known) for name in OF_WORDS}
    found[POSITIONS] = _positions(found[POSITIONS], grown.state_dict()[POSITIONS])
    grown.load_state_dict(found)
    return grown.to(model.logit_scale.device)


def _rows(old: Tensor, size: int, known: Mapping[int, int]) -> Tensor:
    """[V, D] -> [size, D]."""
    mean, spread = old.mean(dim=0), old.std(dim=0)
    new = mean + spread * torch.randn(size, old.shape[1]).to(old)
    if known:
        new[torch.tensor(list(known))] = old[torch.tensor(list(known.values()))]
    return new


def _positions(old: Tensor, fresh: Tensor) -> Tensor:
    """[old length + 1, D], [length + 1, D] -> [length + 1, D]: those that were learnt, and the last, which is CLS's."""
    kept = min(len(old), len(fresh)) - 1
    return torch.cat([old[:kept], fresh[kept:-1].to(old), old[-1:]])
