"""What a backend of `linear_kl` is asked, and what it answers.

Each backend is one function, `sweep(problem, divergence_weight, labels, label_weight, wants)`, to which Triton adds the
gate. It returns, over all tokens, the weighted sums [2] of divergence (at the problem's temperature) and of cross
entropy (at 1; 0 without labels), and the gradients of `temperature * divergence + cross entropy`. Tokens whose weights
[T] are 0 may hold anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from optima_kernels.shared.dispatch import compute_dtype


class Problem(NamedTuple):
    """One call, with tokens flat: `h` [T, D], `w` [V, D], `bias` [V]. Teacher tensors are detached."""

    h_s: Tensor
    w_s: Tensor
    bias_s: Tensor | None
    h_t: Tensor
    w_t: Tensor
    bias_t: Tensor | None
    temperature: float
    divergence: str
    beta: float

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(*(x for x in self[:6] if x is not None))


class Gradients(NamedTuple):
    """Gradients of the student's state, head and bias; empty where not wanted. The last two in the compute dtype."""

    state: Tensor
    head: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, problem: Problem, wants: tuple[bool, bool, bool]) -> "Gradients":
        h_s, w_s, dtype = problem.h_s, problem.w_s, problem.dtype
        shapes = (h_s.shape, w_s.shape, w_s.shape[:1])
        dtypes = (h_s.dtype, dtype, dtype)
        return cls(*(h_s.new_empty(s if w else 0, dtype=d) for s, d, w in zip(shapes, dtypes, wants, strict=True)))
