"""Captions with a cache of keys and values beside captions without: the same captions, fewer products.

Decoders of open_clip's coca_ViT-B-32 (12 text and 12 multimodal layers of width 512, 255 image tokens, 49408 words)
with random weights, fp32, greedy, and three beams of a quarter of their depth. Images are encoded once (by one layer,
so that the decoders are what is timed), and logits are of the last position alone.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from bench.harness.contest import Bar, Contest, Run, Sweep
from optima.coca import CoCa, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate


def contests(device: torch.device) -> list[Contest]:
    return [contest(device), contest(device, layers=3, beams=3)]


def sweeps(device: torch.device) -> list[Sweep]:
    return []


def contest(
    device: torch.device,
    width: int = 512,
    layers: int = 12,
    vocabulary: int = 49408,
    batch: int = 8,
    tokens: int = 64,
    beams: int = 1,
) -> Contest:
    """`layers` of either decoder; `tokens` a caption, of which none ends early."""

    @cache
    def problem() -> tuple[CoCa, Tensor]:
        torch.manual_seed(0)
        heads = max(1, width // 64)
        model = CoCa(
            CoCaConfig(
                embed_dim=width,
                image_encoder=ImageEncoderConfig(64, 16, width, 1, heads, pooler_queries=256),
                text_decoder=TextDecoderConfig(vocabulary, tokens, width, layers, heads),
                multimodal_decoder=MultimodalDecoderConfig(width, layers, heads),
            )
        )
        return model.eval().to(device), torch.rand(batch, 3, 64, 64, device=device) * 2 - 1

    def captions(cached: bool) -> Run:
        strategy = GenerationConfig("greedy" if beams == 1 else "beam", beams=beams, check_every=0)
        ids = {"start_id": 1, "end_id": vocabulary - 1, "length": tokens}

        def run() -> Sequence[Tensor]:
            model, images = problem()
            return [generate(model, images, config=strategy, cached=cached, **ids)]

        return run

    return Contest(
        suite="generation",
        name=f"{batch} captions of {tokens} tokens, beams {beams}, {layers} + {layers} layers of {width}",
        contenders={"without a cache": lambda: captions(False), "optima": lambda: captions(True)},
        tolerance=0.0,
        rounds=3,
        bars=(Bar("optima", "without a cache", "time", 0.2),) if beams == 1 else (),
    )
