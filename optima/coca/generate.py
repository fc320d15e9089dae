"""Greedy caption generation."""

import torch
from torch import Tensor

from optima.coca.model import CoCa


@torch.no_grad()
def generate(model: CoCa, images: Tensor, *, start_id: int, end_id: int, length: int) -> Tensor:
    """images [B, 3, S, S] normalised -> int64 [B, length] captions: start, words, end, then padding.

    The pictures are encoded once. A caption that does not end within `length` tokens is cut there.
    """
    feature, image_tokens, _ = model.image_encoder(images)
    pad_id = model.config.text_decoder.pad_id
    tokens = torch.full((len(images), length), pad_id, device=images.device)
    tokens[:, 0] = start_id
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for position in range(1, length):
        states = model.decode(feature, image_tokens, tokens[:, :position]).states[:, -1]
        chosen = model.caption_logits(states).argmax(dim=-1)
        tokens[:, position] = torch.where(ended, pad_id, chosen)
        ended = ended | (chosen == end_id)
    return tokens
