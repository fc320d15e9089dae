"""What the kernels could take on GPUs that are not here: a prediction, not a measurement.

    python -m bench.predict

Counts every launch of a loss, forward and gradients, in Triton's interpreter, cut as on the GPU
(`optima_kernels.inspect.counts`), and divides by what the GPU can do at most: different bytes by memory bandwidth, products by
the matrix units' rate, exponentials by that of the special function units. The largest of the three is a launch's time,
the sum of launches that of the loss. So it is a bound from below: caches are perfect, units never wait, launches cost
nothing, and other arithmetic is free. Writes bench/PREDICTED.md.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read at the first import of Triton

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from optima_kernels import attention_map_loss, hidden_mse, linear_kl
from optima_kernels.inspect.counts import Launch, counting, tilings_of
from optima_kernels.triton import attention, logits, products

TABLE = Path(__file__).with_name("PREDICTED.md")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at most, a second: bf16 operations on matrix units, bytes of memory, exponentials.

    Exponentials are 16 a clock and multiprocessor, at the clock that the matrix units' figure implies.
    """

    name: str
    target: str
    flops: float
    bytes: float
    exps: float
    source: str


GPUS = (
    Ceilings(
        "A100 SXM 80 GB", "sm_80", 312e12, 2.039e12, 16 * 108 * 1.41e9, "NVIDIA A100 data sheet; 108 SMs at 1.41 GHz"
    ),
    Ceilings(
        "H100 SXM", "sm_90", 989e12, 3.35e12, 16 * 132 * 1.83e9, "NVIDIA H100 data sheet, dense; 132 SMs at 1.83 GHz"
    ),
    Ceilings(
        "B200", "sm_100", 2250e12, 8.0e12, 16 * 148 * 1.85e9, "NVIDIA DGX B200 data sheet, dense; 148 SMs at 1.85 GHz"
    ),
)


@dataclass(frozen=True)
class Work:
    """One kernel's part of a loss, all its launches together."""

    kernel: str
    moved: float
    floor: float
    flops: float
    exps: float

    def __add__(self, other: "Work") -> "Work":
        figures = (getattr(self, name) + getattr(other, name) for name in ("moved", "floor", "flops", "exps"))
        return Work(self.kernel, *figures)

    def __mul__(self, times: float) -> "Work":
        return Work(self.kernel, self.moved * times, self.floor * times, self.flops * times, self.exps * times)

    def times(self, gpu: Ceilings) -> dict[str, float]:
        """Seconds by what would take them."""
        return {"memory": self.floor / gpu.bytes, "products": self.flops / gpu.flops, "exps": self.exps / gpu.exps}


@dataclass(frozen=True)
class Case:
    name: str
    shape: str
    works: Callable[[], list[Work]]


def count(loss: Callable[[], object]) -> list[Work]:
    """The work of every launch that `loss` makes."""
    with counting() as launches:
        loss()
    return [_work(launch) for launch in launches]


def _work(launch: Launch) -> Work:
    return Work(launch.kernel, launch.moved, launch.floor, launch.flops, launch.exps)


def grown(small: Sequence[Work], large: Sequence[Work], sizes: tuple[int, int], size: int) -> list[Work]:
    """The work at `size`, which is affine in it, from that at two sizes: both of whole tiles."""
    times = (size - sizes[0]) / (sizes[1] - sizes[0])
    return [a + (b + a * -1.0) * times for a, b in zip(small, large, strict=True)]


def attention_works(kind: str, tokens: int, width: int, heads: int) -> list[Work]:
    """One head is counted: every head does the same."""
    tensors = [torch.zeros(1, 1, tokens, width, dtype=DTYPE, requires_grad=i < 2) for i in range(4)]
    return [work * heads for work in count(lambda: attention_map_loss(*tensors, kind=kind, backend="triton"))]


def hidden_works(normalize: str | None, tokens: int, d_s: int, d_t: int) -> list[Work]:
    def at(some: int) -> list[Work]:
        h_s, h_t = torch.zeros(some, d_s, dtype=DTYPE, requires_grad=True), torch.zeros(some, d_t, dtype=DTYPE)
        weight = torch.zeros(d_t, d_s, dtype=DTYPE, requires_grad=True)
        return count(lambda: hidden_mse(h_s, h_t, weight, normalize=normalize, backend="triton"))

    return grown(at(128), at(256), (128, 256), tokens)


def vocabulary_works(divergence: str, tokens: int, vocabulary: int, d_s: int, d_t: int) -> list[Work]:
    """The first chunk of tokens and a second, which adds to what the first wrote, stand for all."""
    chunk = logits.chunk_tokens(vocabulary)

    def at(words: int) -> list[Work]:
        h_s, w_s = (torch.zeros(n, d_s, dtype=DTYPE, requires_grad=True) for n in (2 * chunk, words))
        h_t, w_t = (torch.zeros(n, d_t, dtype=DTYPE) for n in (2 * chunk, words))
        with patch.object(logits, "chunk_tokens", lambda _: chunk):
            return count(lambda: linear_kl(h_s, w_s, h_t, w_t, divergence=divergence, backend="triton"))

    works = grown(at(512), at(1024), (512, 1024), vocabulary)
    first, later = works[: len(works) // 2], works[len(works) // 2 :]
    return [a + b * (tokens / chunk - 1.0) for a, b in zip(first, later, strict=True)]


BATCH, HEADS = 8, 16
CASES = [
    *(
        Case(
            f"attention {kind}",
            f"B {BATCH}, H {HEADS}, N {tokens}, d 64",
            lambda kind=kind, tokens=tokens: attention_works(kind, tokens, 64, BATCH * HEADS),
        )
        for tokens in (257, 577)
        for kind in ("kl", "mse")
    ),
    *(
        Case(
            f"hidden {normalize or 'plain'}",
            f"{BATCH} x {tokens} tokens, 768 to 1024",
            lambda normalize=normalize, tokens=tokens: hidden_works(normalize, BATCH * tokens, 768, 1024),
        )
        for tokens in (257, 577)
        for normalize in (None, "layernorm")
    ),
    *(
        Case(
            f"vocabulary {divergence}",
            "2048 tokens, V 49408, 768 and 1024",
            lambda divergence=divergence: vocabulary_works(divergence, 2048, 49408, 768, 1024),
        )
        for divergence in ("forward", "reverse", "jsd")
    ),
]


def cut(target: str) -> tuple[object, ...]:
    """How kernels are cut on a target: where that is equal, so are the counts."""
    walks = (attention.tiling(walk, 64, DTYPE, target, False) for walk in ("keys", "queries"))
    return *(walk[:2] for walk in walks), products.tiling(target, True)[:3]


def joined(works: Sequence[Work]) -> list[Work]:
    """The launches of a kernel as one row, in order of first appearance."""
    rows: dict[str, Work] = {}
    for work in works:
        rows[work.kernel] = rows[work.kernel] + work if work.kernel in rows else work
    return list(rows.values())


def markdown(counted: dict[str, dict[str, list[Work]]]) -> str:
    """`counted` is by case and target."""
    names = [gpu.name for gpu in GPUS]
    lines = [
        "# Predicted, not measured",
        "",
        "No kernel has run on a GPU yet. `python -m bench.predict` counts what every launch reads, writes and",
        "computes in Triton's interpreter, with the tilings that ship, and divides by what a GPU can do at most. Times",
        "are bounds from below: caches are perfect, launches cost nothing, arithmetic other than products and",
        "exponentials is free. Forward pass and gradients, bf16, one layer.",
        "",
        "## Ceilings",
        "",
        "| GPU | bf16 products, TFLOP/s | memory, TB/s | exponentials, T/s | source |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {gpu.name} | {gpu.flops / 1e12:.0f} | {gpu.bytes / 1e12:.2f} | {gpu.exps / 1e12:.2f} | {gpu.source} |"
        for gpu in GPUS
    ]
    lines += [
        "",
        "Exponentials: 16 results a clock and SM for compute capabilities 8.0, 9.0 and 10.0 (CUDA C++ Programming",
        "Guide, throughput of native arithmetic instructions; FlashAttention-3, arXiv 2407.08608, counts 3.9 T/s on an",
        "H100).",
        "",
        "## Losses: milliseconds at least, and what bounds most of them",
        "",
        "| loss | shape | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for case in CASES:
        cells = []
        for gpu in GPUS:
            total: dict[str, float] = {}
            for work in counted[case.name + case.shape][gpu.target]:
                bound, seconds = max(work.times(gpu).items(), key=lambda item: item[1])
                total[bound] = total.get(bound, 0.0) + seconds
            cells.append(f"{1e3 * sum(total.values()):.3f} ({max(total, key=lambda bound: total[bound])})")
        lines.append(f"| {case.name} | {case.shape} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"## Counts behind them, cut as on {GPUS[1].target}",
        "",
        "All launches of a kernel together. Different bytes are those a perfect cache would let through; accesses are",
        "all loads and stores, over those bytes: what L2 and L1 have to answer.",
        "",
        "| loss | shape | kernel | different bytes, MB | accesses | products, GFLOP | exponentials, M |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for work in joined(counted[case.name + case.shape][GPUS[1].target]):
            lines.append(
                f"| {case.name} | {case.shape} | {work.kernel} | {work.floor / 1e6:.1f} | "
                f"{work.moved / work.floor:.2f} x | {work.flops / 1e9:.2f} | {work.exps / 1e6:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    counted: dict[str, dict[str, list[Work]]] = {}
    for case in CASES:
        by_cut: dict[tuple[object, ...], list[Work]] = {}
        for gpu in GPUS:
            if cut(gpu.target) not in by_cut:
                print(f"counting {case.name}, {case.shape}, cut as on {gpu.target}", flush=True)
                with tilings_of(gpu.target):
                    by_cut[cut(gpu.target)] = case.works()
            counted.setdefault(case.name + case.shape, {})[gpu.target] = by_cut[cut(gpu.target)]
    TABLE.write_text(markdown(counted))
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
