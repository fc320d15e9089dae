"""CoCa: contrastive captioner (Yu et al., arXiv 2205.01917), with taps as outputs and task heads beside it."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima.coca.cache import DecoderCache, SelfAttentionCache
from optima.coca.config import CoCaConfig, HeadSpec
from optima.coca.heads import ClassificationHead
from optima.coca.image_encoder import ImageEncoder
from optima.coca.multimodal_decoder import MultimodalDecoder
from optima.coca.text_decoder import TextDecoder
from optima_core.taps import Taps, WantedTaps


class CoCaOutput(NamedTuple):
    """What one forward pass gives.

    image_feature: [B * images, E] contrastive feature, not normalised.
    text_feature: [B * images, E], or None when the CLS token was not asked for.
    states: [B * images, L, D] normalised states of the multimodal decoder.
    valid: bool [B * images, L], True where the text is no padding.
    taps: taps of the wanted layers.
    """

    image_feature: Tensor
    text_feature: Tensor | None
    states: Tensor
    valid: Tensor
    taps: Taps


class CoCa(nn.Module):
    """The three modules, the temperature of the contrastive loss, and one head a classification task."""

    def __init__(self, config: CoCaConfig, heads: Mapping[str, HeadSpec] | None = None) -> None:
        super().__init__()
        self.config = config
        self.head_specs = dict(heads or {})
        self.image_encoder = ImageEncoder(config.image_encoder, config.embed_dim)
        self.text_decoder = TextDecoder(config.text_decoder, config.embed_dim)
        self.multimodal_decoder = MultimodalDecoder(
            config.multimodal_decoder, config.image_token_width, config.text_decoder.vocab_size
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        decoder = config.multimodal_decoder
        self.heads = nn.ModuleDict(
            {
                task: ClassificationHead(decoder.width, decoder.heads, spec.classes, spec.images)
                for task, spec in self.head_specs.items()
            }
        )

    def transformer_layers(self) -> list[nn.Module]:
        """The layers of the three modules: what is tapped, and what may recompute its activations."""
        return [*self.image_encoder.blocks, *self.text_decoder.blocks, *self.multimodal_decoder.layers]

    def forward(
        self, images: Tensor, tokens: Tensor, wanted: WantedTaps | None = None, *, with_class: bool = False
    ) -> CoCaOutput:
        """images: [B, images, 3, S, S] normalised; tokens: int64 [B, L], the text of all images of its row."""
        wanted = wanted or {}
        image_count = images.shape[1]
        feature, image_tokens, image_taps = self.image_encoder(images.flatten(0, 1), wanted.get("image_encoder", ()))
        if image_count > 1:
            tokens = tokens.repeat_interleave(image_count, dim=0)
        output = self.decode(feature, image_tokens, tokens, wanted, with_class=with_class)
        if "image_encoder" in wanted:
            output.taps["image_encoder"] = image_taps
        return output

    def decode(
        self,
        image_feature: Tensor,
        image_tokens: Tensor,
        tokens: Tensor,
        wanted: WantedTaps | None = None,
        *,
        with_class: bool = False,
    ) -> CoCaOutput:
        """The text side alone, over encoded images, each serving the same number of consecutive texts."""
        wanted = wanted or {}
        valid = tokens != self.config.text_decoder.pad_id
        text, text_feature, text_taps = self.text_decoder(tokens, wanted.get("text_decoder", ()), with_class=with_class)
        states, decoder_taps = self.multimodal_decoder(text, image_tokens, valid, wanted.get("multimodal_decoder", ()))
        taps = {"text_decoder": text_taps, "multimodal_decoder": decoder_taps}
        kept = {name: found for name, found in taps.items() if name in wanted}
        return CoCaOutput(image_feature, text_feature, states, valid, kept)

    def make_cache(self, image_tokens: Tensor, capacity: int) -> DecoderCache:
        """An empty memory for `decode_next`: texts of up to `capacity` tokens over encoded images."""
        return DecoderCache(
            [SelfAttentionCache(capacity) for _ in self.text_decoder.blocks],
            [SelfAttentionCache(capacity) for _ in self.multimodal_decoder.layers],
            self.multimodal_decoder.project(image_tokens),
        )

    def decode_next(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """The states [B * n, N, D] of tokens [B * n, N] that follow what `cache` remembers, and are added to it.

        Every image serves n consecutive texts, none of them padded. Any number of tokens at first, then one at a
        time.
        """
        text, _, _ = self.text_decoder(tokens, with_class=False, cache=cache)
        return self.multimodal_decoder.step(text, cache)

    def caption_logits(self, states: Tensor) -> Tensor:
        """states [..., D] -> vocabulary logits [..., V]."""
        logits: Tensor = self.multimodal_decoder.head(states)
        return logits

    def class_logits(self, task: str, output: CoCaOutput) -> Tensor:
        """-> [B, classes] logits of the task's head."""
        logits: Tensor = self.heads[task](output.states, output.valid)
        return logits


def contrastive_loss(image_feature: Tensor, text_feature: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross entropy over the batch's pairs (CLIP; CoCa, section 3.2).

    Features [B, E]; row i of both belong together.
    """
    image, text = F.normalize(image_feature.float(), dim=-1), F.normalize(text_feature.float(), dim=-1)
    logits = logit_scale.clamp(max=math.log(100)).exp() * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def captioning_loss(logits: Tensor, tokens: Tensor, pad_id: int) -> Tensor:
    """Mean next-token cross entropy. logits: [B, L, V] at every position; tokens: [B, L]; padding does not count."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=pad_id)
