"""`prediction_kl` on a CPU: the gradient is made in the forward pass, in a third of the passes over the logits."""

from typing import Any

import torch
from torch import Tensor

from optima_kernels.logits.comparison import CACHED_ELEMENTS, LOG2E, compare
from optima_kernels.shared.registration import multiply
from optima_kernels.shared.scratch import Scratch

# Fewer logits are left to autograd: the loss is all calls, and autograd makes fewer.
LEAST_ELEMENTS = 2**15


class PredictionDivergence(torch.autograd.Function):
    """Logits [R, V] of student and teacher, what each row counts [R], and options -> the loss, and its gradient."""

    @staticmethod
    def forward(
        z_s: Tensor, z_t: Tensor, weight: Tensor, temperature: float, divergence: str, beta: float
    ) -> tuple[Tensor, Tensor]:
        values, gradient = z_s.new_empty(len(z_s)), torch.empty_like(z_s)
        scale, scratch = LOG2E / temperature, Scratch(z_s.device, z_s.dtype)
        weight = weight * temperature
        size = max(CACHED_ELEMENTS // z_s.shape[1], 1)
        for start in range(0, len(z_s), size):
            rows = slice(start, start + size)
            x = scratch.tile("logits", (2, *z_s[rows].shape))
            for x_of, z in zip(x, (z_s[rows], z_t[rows]), strict=True):
                torch.add(z.amax(-1, keepdim=True).mul_(-scale), z, alpha=scale, out=x_of)
            values[rows], _ = compare(x, weight[rows], divergence, beta, scratch, gradient[rows])
        return values.sum() * temperature, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if d_loss is None else multiply(gradient, d_loss, False), *[None] * 5
