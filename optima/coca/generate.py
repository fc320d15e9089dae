"""Caption generation: greedy, beam search and sampling, batched, from a cache of keys and values.

Everything stays on the device: which texts have ended is a tensor, and the host asks for it now and then only to stop
early, which changes no result. A text never holds padding before its end: the padding token is never chosen.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optima.coca.config import GenerationConfig
from optima.coca.model import CoCa
from optima_core.rng import make_keys, uniform


class Beams(NamedTuple):
    """The best texts of a beam search, best first.

    tokens: int64 [B, beams, length]. scores: [B, beams], log-probability / tokens ** length_penalty; -inf where there
    are fewer texts than beams.
    """

    tokens: Tensor
    scores: Tensor


def generate(
    model: CoCa,
    images: Tensor,
    *,
    start_id: int,
    end_id: int,
    length: int,
    config: GenerationConfig | None = None,
    cached: bool = True,
) -> Tensor:
    """images [B, 3, S, S] normalised -> int64 [B, length] captions: start, words, end, then padding.

    The images are encoded once. A caption that does not end within `length` tokens is cut there.
    cached: False computes every text anew for every token: the same captions, slowly.

    Raises ValueError if the model reads no texts of `length` tokens.
    """
    config = config or GenerationConfig()
    if config.strategy == "beam":
        return beam_search(
            model, images, start_id=start_id, end_id=end_id, length=length, config=config, cached=cached
        ).tokens[:, 0]
    return _one_by_one(model, images, start_id, end_id, length, config, cached)


@torch.no_grad()
def token_probability(model: CoCa, images: Tensor, tokens: Tensor) -> Tensor:
    """How probable the model holds the tokens of captions: the geometric mean over those behind the start, fp32 [B].

    images: [B, 3, S, S] normalised. tokens: int64 [B, length], as `generate` makes them; the end counts, padding does
    not.
    """
    pad_id = model.config.text_decoder.pad_id
    logits = model.caption_logits(model(images[:, None], tokens).states[:, :-1]).float()
    logits[..., pad_id] = -math.inf
    said = tokens[:, 1:] != pad_id
    chosen = tokens[:, 1:].masked_fill(~said, (pad_id + 1) % logits.shape[-1])
    log_probability = logits.log_softmax(dim=-1).gather(2, chosen[..., None])[..., 0]
    return ((log_probability * said).sum(dim=1) / said.sum(dim=1).clamp_min(1)).exp()


@torch.no_grad()
def beam_search(
    model: CoCa,
    images: Tensor,
    *,
    start_id: int,
    end_id: int,
    length: int,
    config: GenerationConfig,
    cached: bool = True,
) -> Beams:
    """images [B, 3, S, S] normalised -> the best texts found for each.

    In every step each live text may end, which makes it one of the finished, of which the `beams` best by score are
    kept; and of all its other continuations the `beams` most probable of an image live on. Those still alive after
    `length` tokens are cut there and compete with the finished.
    Raises ValueError if the model reads no texts of `length` tokens.
    """
    decoding = _Decoding(model, images, length, config.beams, cached)
    image_count, beams, device = len(images), config.beams, images.device
    rows = torch.arange(image_count, device=device)[:, None] * beams
    live = torch.full((image_count, beams, length), decoding.pad_id, device=device)
    live[:, :, 0] = start_id
    finished = live.clone()
    best = torch.full((image_count, beams), -math.inf, dtype=decoding.dtype, device=device)
    # All beams start alike, so that all but the first must not count.
    logp = best.clone()
    logp[:, 0] = 0
    for position in range(1, length):
        log_probability = decoding.next_logits(live[:, :, position - 1].flatten()).log_softmax(dim=-1)
        extended = logp[:, :, None] + log_probability.view(image_count, beams, -1)
        ended = live.clone()
        ended[:, :, position] = end_id
        finished, best = _best_of(
            (finished, ended), (best, extended[:, :, end_id] / position**config.length_penalty), beams
        )
        extended[:, :, end_id] = -math.inf
        logp, chosen = extended.flatten(1).topk(beams, dim=1)
        vocabulary = extended.shape[2]
        parent = chosen // vocabulary
        live = live.gather(1, parent[:, :, None].expand(-1, -1, length))
        live[:, :, position] = chosen % vocabulary
        decoding.reorder((rows + parent).flatten())
        # The longest text has the mildest divisor.
        bound = logp[:, 0] / (length - 1) ** config.length_penalty
        if _ask(config, position) and bool((bound <= best[:, -1]).all()):
            return Beams(finished, best)
    return Beams(*_best_of((finished, live), (best, logp / (length - 1) ** config.length_penalty), beams))


def _best_of(texts: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of two sets of texts [B, n, L] with scores [B, n]."""
    kept, place = torch.cat(scores, dim=1).topk(count, dim=1)
    return torch.cat(texts, dim=1).gather(1, place[:, :, None].expand(-1, -1, texts[0].shape[2])), kept


@torch.no_grad()
def _one_by_one(
    model: CoCa, images: Tensor, start_id: int, end_id: int, length: int, config: GenerationConfig, cached: bool
) -> Tensor:
    """Greedy captions or samples."""
    decoding = _Decoding(model, images, length, 1, cached)
    tokens = torch.full((len(images), length), decoding.pad_id, device=images.device)
    tokens[:, 0] = start_id
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    keys = make_keys(config.seed, (len(images),), images.device)
    for position in range(1, length):
        logits = decoding.next_logits(tokens[:, position - 1])
        if config.strategy == "sample":
            chosen = draw(logits, uniform(keys, torch.full_like(keys[:, 0], position)), config)
        else:
            chosen = logits.argmax(dim=-1)
        tokens[:, position] = torch.where(ended, decoding.pad_id, chosen)
        ended = ended | (chosen == end_id)
        if _ask(config, position) and bool(ended.all()):
            break
    return tokens


def draw(logits: Tensor, level: Tensor, config: GenerationConfig) -> Tensor:
    """Logits [B, V] and uniform numbers [B] -> a token each, int64 [B], by inverting the distribution function.

    temperature, then top_k, then top_p, over tokens in the order of their probability.
    """
    scaled, order = (logits.double() / config.temperature).sort(dim=-1, descending=True, stable=True)
    if config.top_k:
        scaled, order = scaled[:, : config.top_k], order[:, : config.top_k]
    probability = scaled.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    kept = before < config.top_p
    cumulative = torch.where(kept, probability, 0.0).cumsum(dim=-1)
    place = (cumulative <= level[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return order.gather(1, torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1))[:, 0]


def _ask(config: GenerationConfig, position: int) -> bool:
    return config.check_every > 0 and position % config.check_every == 0


class _Decoding:
    """A batch of growing texts, `copies` over each image: tokens in, logits of the tokens that may follow out."""

    def __init__(self, model: CoCa, images: Tensor, length: int, copies: int, cached: bool) -> None:
        text = model.config.text_decoder
        if not 2 <= length <= text.context_length:
            raise ValueError(f"length must be from 2 to the model's context_length {text.context_length}, got {length}")
        self.model = model
        self.pad_id = text.pad_id
        self.feature, self.image_tokens, _ = model.image_encoder(images)
        self.cache = model.make_cache(self.image_tokens, length) if cached else None
        self.tokens = torch.empty(len(images) * copies, 0, dtype=torch.int64, device=images.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities: at least fp32, whatever the arithmetic of the model."""
        return torch.promote_types(self.image_tokens.dtype, torch.float32)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """The next token of every text, int64 [rows] -> logits [rows, V] of the one after it; -inf for padding."""
        if self.cache is not None:
            states = self.model.decode_next(tokens[:, None], self.cache)
        else:
            self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
            states = self.model.decode(self.feature, self.image_tokens, self.tokens).states
        logits = self.model.caption_logits(states[:, -1]).to(self.dtype)
        logits[:, self.pad_id] = -math.inf
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Text i goes on from what text rows[i] is, over the same image."""
        if self.cache is not None:
            self.cache.reorder(rows)
        else:
            self.tokens = self.tokens[rows]
