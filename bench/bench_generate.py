"""Cached beside uncached caption generation on a CPU: tokens a second, alternating in one process.

    python bench/bench_generate.py [--width 512 --layers 12 --batch 8 --tokens 64]

By default decoders of open_clip's coca_ViT-B-32 (12 text and 12 multimodal layers of width 512, 255 image tokens, 49408
words), random weights, fp32, greedy. Both encode the images once (a one-layer encoder, so that the decoders are what
is timed) and compute logits of the last position alone; the captions must be equal. Asked for: at least 5 times.
"""

import argparse
import statistics
import time

import torch

from optima.coca import CoCa, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.config import GenerationConfig
from optima.coca.generate import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=49408)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    heads = options.width // 64
    model = CoCa(
        CoCaConfig(
            embed_dim=options.width,
            image_encoder=ImageEncoderConfig(64, 16, options.width, 1, heads, pooler_queries=256),
            text_decoder=TextDecoderConfig(options.vocab, options.tokens, options.width, options.layers, heads),
            multimodal_decoder=MultimodalDecoderConfig(options.width, options.layers, heads),
        )
    ).eval()
    images = torch.rand(options.batch, 3, 64, 64) * 2 - 1
    strategy = GenerationConfig("greedy" if options.beams == 1 else "beam", beams=options.beams, check_every=0)

    def run(cached: bool) -> torch.Tensor:
        ids = {"start_id": 1, "end_id": options.vocab - 1, "length": options.tokens}
        return generate(model, images, config=strategy, cached=cached, **ids)

    assert torch.equal(run(True), run(False)), "cached and uncached captions differ"
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.repeats):
        for cached, found in seconds.items():
            start = time.perf_counter()
            run(cached)
            found.append(time.perf_counter() - start)
    made = options.batch * (options.tokens - 1)
    print(
        f"torch {torch.__version__}, {options.threads} thread, {options.layers} + {options.layers} layers of "
        f"{options.width}, batch {options.batch}, {options.beams} beam, median of {options.repeats}"
    )
    medians = {cached: statistics.median(found) for cached, found in seconds.items()}
    for cached, median in medians.items():
        name = "cached" if cached else "uncached"
        print(f"{name:9}{made / median:9.1f} tokens/s {medians[False] / median:6.1f} times the uncached")


if __name__ == "__main__":
    main()
