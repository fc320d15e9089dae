"""Kernels with one fault each, launched under the driver that is not there; prints what the gate says of each as JSON.

A program of its own, since kernels must not be interpreted.
"""

import json

import torch
import triton
import triton.language as tl

from optima_kernels.inspect.fake_driver import launches_on
from optima_kernels.inspect.gate import Outcome, examine
from optima_kernels.inspect.problems import Problem, empty


@triton.jit
def doubled(x, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + o, tl.load(x + o, mask=o < n) * 2, mask=o < n)


@triton.jit
def wide_rows(x, y, n, B: tl.constexpr):
    """Holds more numbers than there are registers for."""
    o = tl.arange(0, B)
    b_x = tl.load(x + o, mask=o < n, other=0.0)
    b_y = tl.load(y + o, mask=o < n, other=0.0)
    b_x -= tl.sum(b_x) / n
    b_y -= tl.sum(b_y) / n
    b_x *= tl.rsqrt(tl.sum(b_x * b_x))
    tl.store(x + o, b_x * b_y - tl.sum(b_x * b_y), mask=o < n)


@triton.jit
def product(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_c = tl.zeros([BM, BN], tl.float32)
    for i in range(0, K, BK):
        b_a = tl.load(a + o_m[:, None] * K + (i + o_k)[None, :])
        b_b = tl.load(b + (i + o_k)[:, None] * BN + o_n[None, :])
        b_c = tl.dot(b_a, b_b, b_c)
    tl.store(c + o_m[:, None] * BN + o_n[None, :], b_c)


@triton.jit
def transposed_accumulator(q, k, out, N, BN: tl.constexpr, D: tl.constexpr):
    """A product turned round in registers and multiplied again."""
    o_n, o_d = tl.arange(0, BN), tl.arange(0, D)
    b_k = tl.load(k + o_n[:, None] * D + o_d[None, :])
    b_out = tl.zeros([BN, D], tl.float32)
    for i in range(0, N, BN):
        b_q = tl.load(q + (i + o_n)[:, None] * D + o_d[None, :])
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)))
        b_out += tl.dot(tl.trans(b_p).to(b_q.dtype), b_q)
    tl.store(out + o_n[:, None] * D + o_d[None, :], b_out)


def spills() -> None:
    wide_rows[(1,)](empty(65536, dtype=torch.float32), empty(65536, dtype=torch.float32), 65000, B=65536, num_warps=4)


def shared() -> None:
    a, b, c = empty(256, 4096), empty(4096, 256), empty(256, 256, dtype=torch.float32)
    product[(1000,)](a, b, c, 4096, BM=256, BN=256, BK=128, num_warps=8, num_stages=4)


def serialised() -> None:
    q, k, out = empty(4096, 64), empty(64, 64), empty(64, 64, dtype=torch.float32)
    transposed_accumulator[(1000,)](q, k, out, 4096, BN=64, D=64)


def eight_warps() -> None:
    a, b, c = empty(128, 4096), empty(4096, 64), empty(128, 64, dtype=torch.float32)
    product[(1000,)](a, b, c, 4096, BM=128, BN=64, BK=64, num_warps=8)


def few_programs() -> None:
    a, b, c = empty(64, 4096), empty(4096, 64), empty(64, 64, dtype=torch.float32)
    product[(131,)](a, b, c, 4096, BM=64, BN=64, BK=64)


def large_grid() -> None:
    doubled[(1, 65536)](empty(64), 64, B=64)


def fine() -> None:
    doubled[(10**6, 65535)](empty(64), 64, B=64)


def refused() -> None:
    raise ValueError("no such option")


def uncompilable() -> None:
    doubled[(1,)](empty(64), 64, B=65)


def waits() -> None:
    float(empty(1).sum())


def vendor_product() -> None:
    empty(3, 5, trained=True) @ empty(5, 7)


def examined(name: str) -> Outcome:
    return examine(Problem(name, globals()[name], fills_chip=True), "sm_90")


def main() -> None:
    names = ("spills", "shared", "serialised", "eight_warps", "few_programs", "large_grid", "fine", "refused")
    found: dict[str, object] = {name: examined(name).faults for name in (*names, "uncompilable", "waits")}
    found["refusal allowed"] = examine(Problem("refused", refused, may_refuse=True), "sm_90").faults
    few = Problem("few_programs", few_programs, fills_chip=False)
    found["few at a small size"] = examine(few, "sm_90").faults
    with launches_on("sm_90") as log:
        vendor_product()
    found["products"] = [[x.batch, x.m, x.n, x.k] for x in log.products]
    with launches_on("sm_80") as log:
        few_programs()
        few_programs()
    first = log.launches[0]
    compiled = first.compiled
    found["launch"] = [len(log.launches), compiled.target, compiled.is_product, compiled.matrix_instruction, first.grid]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
