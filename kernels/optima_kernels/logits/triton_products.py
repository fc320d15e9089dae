"""The four matrix products of a chunk of tokens: the vendor's, and Triton's own, which a gate on the device can stop.

With G [T, S] the gradient of the logits, or before that the logits themselves, in rows padded from V to S columns, they
are h W^T, G W, and G^T h and the column sums of G, which are added up over chunks.

Names: i_ indices, o_ offsets, m_ masks, b_ tiles, p_ pointers, s_ strides; B* are tile sizes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optima_kernels.logits.problem import Layer
from optima_kernels.shared.dispatch import INTERPRETED
from optima_kernels.shared.target import target_of

# Rows of logits are padded to a multiple of this many columns, for aligned rows of any vocabulary.
PADDING = 64


class VendorProducts:
    """Products of 16-bit operands are summed in float32, and rounded once if that is not the dtype of `out`.

    A vendor's library is many times slower where a vocabulary is odd. So what is beyond a multiple of 64 words has
    products of its own, with 64 rows of a head, zeros at its end, and the padding of the logits.
    """

    def __init__(self, layer: Layer, columns: int) -> None:
        vocabulary = len(layer.w_s)
        self.words = vocabulary if vocabulary % 8 == 0 else columns - PADDING
        self.rest = vocabulary - self.words
        self.student, self.teacher = (self._halves(w) for w in (layer.w_s, layer.w_t))

    def _halves(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a head that make a multiple of 64, and the rest with zeros below."""
        rest = weight.new_zeros((PADDING if self.rest else 0, weight.shape[1]))
        rest[: self.rest] = weight[self.words :]
        return weight[: self.words], rest

    def student_logits(self, h: Tensor, z: Tensor) -> None:
        """z [T, S] = h [T, D] head^T [D, V], and something finite or nothing in the padding."""
        self._logits(h, self.student, z)

    def teacher_logits(self, h: Tensor, z: Tensor) -> None:
        self._logits(h, self.teacher, z)

    def _logits(self, h: Tensor, head: tuple[Tensor, Tensor], z: Tensor) -> None:
        _multiply(h, head[0].t(), z[:, : self.words], False)
        if self.rest:
            _multiply(h, head[1].t(), z[:, self.words :], False)

    def state(self, g: Tensor, out: Tensor) -> None:
        """out [T, D] = g [T, S] head [V, D]; the padding of g must hold zeros."""
        _multiply(g[:, : self.words], self.student[0], out, False)
        if self.rest:
            _multiply(g[:, self.words :], self.student[1], out, True)

    def head(self, g: Tensor, h: Tensor, out: Tensor, accumulate: bool) -> None:
        """out [V, D] = g^T [S, T] h [T, D], plus what is there if `accumulate`."""
        _multiply(g[:, : self.words].t(), h, out[: self.words], accumulate)
        if self.rest:
            rest = out.new_empty((PADDING, out.shape[1]))
            _multiply(g[:, self.words :].t(), h, rest, False)
            _put(rest[: self.rest], out[self.words :], accumulate)

    def bias(self, g: Tensor, out: Tensor, accumulate: bool) -> None:
        """out [V] = the column sums of g [T, S], plus what is there if `accumulate`."""
        _put(g[:, : len(out)].sum(0, dtype=out.dtype), out, accumulate)


def _put(x: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(x)
    else:
        out.copy_(x)


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = a b, or out += a b."""
    if out.dtype == a.dtype:
        options: dict[str, Any] = {}
    elif a.device.type != "cpu" and torch.version.hip is None:
        options = {"out_dtype": out.dtype}
    else:  # nowhere else does torch write another dtype than it reads
        a, b, options = a.to(out.dtype), b.to(out.dtype), {}
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


class GatedProducts:
    """The same, of operands of one dtype, and no work behind a closed gate, where gradients are 0."""

    def __init__(self, layer: Layer, gate: Tensor) -> None:
        self.student, self.teacher, self.gate, self.device = layer.w_s, layer.w_t, gate, layer.h_s.device

    def student_logits(self, h: Tensor, z: Tensor) -> None:
        """Nothing is written behind a closed gate."""
        self._launch(h, self.student.t(), z, columns=z.shape[1], ROWS_FIRST=True)

    def teacher_logits(self, h: Tensor, z: Tensor) -> None:
        self._launch(h, self.teacher.t(), z, columns=z.shape[1], ROWS_FIRST=True)

    def state(self, g: Tensor, out: Tensor) -> None:
        """The sum over the vocabulary is split among as many programs as fill the chip."""
        weight = self.student
        (tokens, padded), d, tile = g.shape, weight.shape[1], self._tile(g.dtype)
        tiles = triton.cdiv(tokens, tile["BR"]) * triton.cdiv(d, tile["BC"])
        parts = max(2 * self._processors() // tiles, 1)
        shares = g.new_empty((parts, tokens, d), dtype=torch.float32)
        self._launch(g[:, : len(weight)], weight, shares, depth=padded, parts=parts)
        size = tokens * d
        join_kernel[(triton.cdiv(size, 1024),)](parts=shares, out=out, gate=self.gate, SIZE=size, PARTS=parts, BC=1024)

    def head(self, g: Tensor, h: Tensor, out: Tensor, accumulate: bool) -> None:
        self._launch(g[:, : len(out)].t(), h, out, rows=g.shape[1], ACCUMULATE=accumulate, CLEAR=not accumulate)

    def bias(self, g: Tensor, out: Tensor, accumulate: bool) -> None:
        column_kernel[(triton.cdiv(len(out), 64),)](
            g=g, out=out, gate=self.gate, T=len(g), V=len(out), S=g.shape[1], ACCUMULATE=accumulate, BR=64, BC=64
        )

    def _launch(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        rows: int | None = None,
        depth: int | None = None,
        columns: int | None = None,
        parts: int = 1,
        **flags: bool,
    ) -> None:
        """out = a b. `rows` and `depth` are what of `a` may be read, and `columns` what of `out` may be written."""
        (M, K), N, tile = a.shape, b.shape[1], self._tile(a.dtype)
        tiles = triton.cdiv(M, tile["BR"]) * triton.cdiv(columns or N, tile["BC"])
        product_kernel[(tiles, parts)](
            a=a,
            b=b,
            out=out,
            gate=self.gate,
            M=M,
            N=N,
            K=K,
            M_A=rows or M,
            K_A=depth or K,
            N_OUT=columns or N,
            steps=triton.cdiv(triton.cdiv(K, tile["BK"]), parts),
            s_am=a.stride(0),
            s_ak=a.stride(1),
            s_bk=b.stride(0),
            s_bn=b.stride(1),
            s_om=out.stride(-2),
            s_part=out.stride(0) if parts > 1 else 0,
            WIDEN=INTERPRETED,  # its products of bfloat16 are wrong
            **{"ROWS_FIRST": False, "ACCUMULATE": False, "CLEAR": False, **flags},
            **tile,
        )

    def _tile(self, dtype: torch.dtype) -> dict[str, Any]:
        target = target_of(self.device)
        if target == "interpreter":
            return {"BR": 32, "BC": 64, "BK": 64}
        if dtype == torch.float32:
            return {"BR": 32 if target.startswith("sm_10") else 64, "BC": 64, "BK": 16, "num_warps": 4, "num_stages": 2}
        if target.startswith("gfx"):
            return {"BR": 64, "BC": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
        return {"BR": 64, "BC": 128, "BK": 64, "num_warps": 4, "num_stages": 3}

    def _processors(self) -> int:
        if self.device.type == "cpu":
            return 2
        return torch.cuda.get_device_properties(self.device).multi_processor_count


@triton.jit
def product_kernel(
    a, b, out, gate, M, N, K, M_A, K_A, N_OUT, steps, s_am, s_ak, s_bk, s_bn, s_om, s_part,
    ROWS_FIRST: tl.constexpr, ACCUMULATE: tl.constexpr, CLEAR: tl.constexpr, WIDEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] b [K, N], or, of several programs along axis 1, each one's part of the sum over K.

    Rows of memory that are no multiple of 16 long are read and written by halves: so a may be read up to row M_A and
    column K_A, out is written up to column N_OUT. ROWS_FIRST: tiles that share columns, and so b, run side by side.
    CLEAR: zeros behind a closed gate.
    """
    rows, columns = tl.cdiv(M, BR), tl.cdiv(N_OUT, BC)
    if ROWS_FIRST:
        i_r, i_c = tl.program_id(0) % rows, tl.program_id(0) // rows
    else:
        i_r, i_c = tl.program_id(0) // columns, tl.program_id(0) % columns
    i_p = tl.program_id(1)
    o_r, o_c = i_r * BR + tl.arange(0, BR), i_c * BC + tl.arange(0, BC)
    p_out = out + i_p.to(tl.int64) * s_part + o_r.to(tl.int64)[:, None] * s_om + o_c[None, :]  # [BR, BC]
    m_out = (o_r < M)[:, None] & (o_c < N_OUT)[None, :]
    if tl.load(gate) == 0:
        if CLEAR:
            tl.store(p_out, tl.zeros((BR, BC), out.dtype.element_ty), mask=m_out)
        return
    o_k = i_p * steps * BK + tl.arange(0, BK)
    m_r, m_c = o_r < M_A, o_c < N
    p_a = a + o_r.to(tl.int64)[:, None] * s_am + o_k.to(tl.int64)[None, :] * s_ak  # [BR, BK]
    p_b = b + o_k.to(tl.int64)[:, None] * s_bk + o_c.to(tl.int64)[None, :] * s_bn  # [BK, BC]
    b_out = tl.zeros((BR, BC), tl.float32)
    for _ in range(0, steps):
        b_a = tl.load(p_a, mask=m_r[:, None] & (o_k < K_A)[None, :], other=0.0)
        b_b = tl.load(p_b, mask=(o_k < K)[:, None] & m_c[None, :], other=0.0)
        if WIDEN:
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        b_out = tl.dot(b_a, b_b, b_out, input_precision="ieee")
        o_k += BK
        p_a += BK * s_ak
        p_b += BK * s_bk
    if ACCUMULATE:
        b_out += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def join_kernel(parts, out, gate, SIZE, PARTS, BC: tl.constexpr):
    """out [SIZE] = the sum of parts [PARTS, SIZE], or 0 behind a closed gate."""
    o_c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = o_c < SIZE
    b_out = tl.zeros((BC,), tl.float32)
    if tl.load(gate) == 0:
        tl.store(out + o_c, b_out.to(out.dtype.element_ty), mask=m_c)
        return
    p_part = parts + o_c
    for _ in range(0, PARTS):
        b_out += tl.load(p_part, mask=m_c, other=0.0)
        p_part += SIZE
    tl.store(out + o_c, b_out.to(out.dtype.element_ty), mask=m_c)


@triton.jit
def column_kernel(g, out, gate, T, V, S, ACCUMULATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out [V] = the column sums of g [T, S], plus what is there when ACCUMULATE, or 0 behind a closed gate."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < V
    b_out = tl.zeros((BC,), tl.float32)
    if tl.load(gate) == 0:
        if not ACCUMULATE:
            tl.store(out + o_c, b_out, mask=m_c)
        return
    for i_r in range(0, T, BR):
        o_r = i_r + tl.arange(0, BR)
        m_g = (o_r < T)[:, None] & (o_c < S)[None, :]
        b_g = tl.load(g + o_r.to(tl.int64)[:, None] * S + o_c[None, :], mask=m_g, other=0.0)  # [BR, BC]
        b_out += tl.sum(b_g.to(tl.float32), 0)
    if ACCUMULATE:
        b_out += tl.load(out + o_c, mask=m_c, other=0.0)
    tl.store(out + o_c, b_out, mask=m_c)
