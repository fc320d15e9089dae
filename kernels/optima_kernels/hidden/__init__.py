"""Hidden-state distillation: how far the projected student state is from the teacher's.

The usual way is `F.mse_loss(F.linear(h_s, weight), h_t)`: the projected state, the difference and their gradients each
pass through memory at the width of the teacher. Here a tile of the difference is made, reduced, and spent while it is
still close to the processor. How, each backend's file tells.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from optima_kernels import reference
from optima_kernels.hidden.operator import hidden_mses_operator, without_gaps
from optima_kernels.hidden.problem import NORMALIZATIONS
from optima_kernels.shared.checks import (
    check_choice,
    check_device,
    check_floating,
    check_gate,
    check_layers,
    check_mask,
    check_sample_weight,
    check_shape,
)
from optima_kernels.shared.dispatch import autocast_dtype, choose_backend, compute_dtype
from optima_kernels.shared.gates import apply_gate
from optima_kernels.shared.layers import PerLayer, per_layer
from optima_kernels.shared.tokens import token_weight
from optima_kernels.shared.variants import hidden_variant


def hidden_mse(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalize: str | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between the projected student state and the teacher state.

    With `p = h_s weight^T + bias` (`p = h_s` when no weight is given) the loss is
    `gate * sum_i w_i sum_j (p_ij - h_t_ij)^2 / (D_t * sum_i w_i)` over tokens i and teacher features j, and 0 when the
    weights sum to 0. `w_i` is 0 for a masked token, otherwise the weight of its sample (1 if not given). What a masked
    token holds does not matter.

    Args:
        h_s: student state [..., D_s], float32, float16, bfloat16 or float64. Gets a gradient.
        h_t: teacher state [..., D_t] with the leading dimensions of `h_s`. Never gets a gradient.
        weight: projection [D_t, D_s]; without it D_s must equal D_t. Gets a gradient.
        bias: [D_t], only with a weight. Gets a gradient.
        normalize: None; "layernorm" (over features, no gain or bias, eps 1e-5) or "l2" (divided by the Euclidean
            length, at least 1e-12) of both the projected state and the teacher state before the difference.
        mask: bool, broadcastable to [...]; True counts.
        sample_weight: [B], B being the first dimension of `h_s`.
        gate: 0-d tensor that multiplies the loss; where it is 0, loss and gradients are 0 and no work is done, on a
            CPU or by the triton backend.
        backend: "reference", "blocked" or "triton"; by default triton on CUDA and blocked elsewhere. float64 runs on
            blocked, and is an error where triton is asked for.

    Returns:
        A scalar, float64 if any floating argument is, float32 otherwise. Arguments may differ in dtype; sums are kept
        in the dtype of the result, also under autocast, and each gradient has the dtype of its argument.

    Raises:
        ValueError: a shape, device, `normalize` or `backend` does not fit.
        TypeError: a tensor has the wrong kind of dtype.
    """
    _check(h_s, h_t, weight, bias, normalize, mask, sample_weight)
    check_gate(gate)
    check_device(h_s, gate=gate)
    gates = None if gate is None else gate[None]
    return _losses(backend, [h_s], [h_t], [weight], [bias], normalize, [mask], [sample_weight], gates)[0]


def hidden_mses(
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: PerLayer = None,
    bias: PerLayer = None,
    *,
    normalize: str | None = None,
    mask: PerLayer = None,
    sample_weight: PerLayer = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`hidden_mse` of several layers: the losses [L].

    `h_s` and `h_t` hold one tensor a layer; every other tensor argument one entry a layer (which may be None), or one
    tensor for all layers. `gate` is [L]. The triton backend launches layers of equal shapes together.
    Otherwise as `hidden_mse`.
    """
    layers = len(h_s)
    check_layers(layers, h_t=h_t, weight=weight, bias=bias, mask=mask, sample_weight=sample_weight)
    check_gate(gate, layers)
    check_device(h_s[0], gate=gate)
    weights, biases, masks, sample_weights = (per_layer(x, layers) for x in (weight, bias, mask, sample_weight))
    for state, teacher, w, b, m, s in zip(h_s, h_t, weights, biases, masks, sample_weights, strict=True):
        _check(state, teacher, w, b, normalize, m, s)
    return _losses(backend, h_s, h_t, weights, biases, normalize, masks, sample_weights, gate)


def _losses(
    backend: str | None,
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    normalize: str | None,
    mask: Sequence[Tensor | None],
    sample_weight: Sequence[Tensor | None],
    gate: Tensor | None,
) -> Tensor:
    dtypes = [compute_dtype(*(x for x in each if x is not None)) for each in zip(h_s, h_t, weight, bias, strict=True)]
    variant = partial(
        hidden_variant,
        h_s[0],
        h_t[0],
        weight[0],
        bias[0],
        normalize=normalize,
        counted=mask[0] is not None or sample_weight[0] is not None,
        gate=gate,
        operands=autocast_dtype(h_s[0]),
    )
    chosen = choose_backend(backend, h_s[0], "hidden_mses", variant)
    if chosen == "triton" and torch.float64 in dtypes:
        if backend is not None:
            raise ValueError('backend="triton" takes float32, bfloat16 and float16, not float64; use backend="blocked"')
        chosen = "blocked"
    if chosen == "reference":
        return reference.hidden_mses(
            h_s, h_t, weight, bias, normalize=normalize, mask=mask, sample_weight=sample_weight, gate=gate
        )
    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for each in zip(h_s, weight, bias, strict=True) for x in each]
    weights: dict[tuple[int, int, torch.Size, torch.dtype], Tensor | None] = {}
    counts: list[Tensor | None] = []
    for state, m, s, dtype in zip(h_s, mask, sample_weight, dtypes, strict=True):
        key = (id(m), id(s), state.shape[:-1], dtype)  # layers mostly share them
        if key not in weights:
            weights[key] = token_weight(state.shape[:-1], m, s, dtype)
        counts.append(weights[key])
    losses = hidden_mses_operator(
        [x.flatten(0, -2) for x in h_s],
        [x.detach().flatten(0, -2) for x in h_t],
        without_gaps(weight),
        without_gaps(bias),
        without_gaps(counts),
        wants,
        autocast_dtype(h_s[0]),
        normalize,
        chosen,
        gate,
    )[0]
    # A closed gate reaches the kernels, so that they leave early; what it multiplies is applied here, by autograd.
    return apply_gate(losses, gate)


def _check(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: str | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_floating(h_s, h_s=h_s, h_t=h_t, weight=weight, bias=bias, sample_weight=sample_weight)
    check_device(h_s, mask=mask)
    if h_s.dim() == 0 or h_t.dim() == 0:
        raise ValueError("h_s and h_t must have a feature dimension, not be 0-d")
    if 0 in h_s.shape or 0 in h_t.shape:
        raise ValueError(f"h_s and h_t must not be empty, but have shapes {tuple(h_s.shape)} and {tuple(h_t.shape)}")
    tokens, d_s, d_t = h_s.shape[:-1], h_s.shape[-1], h_t.shape[-1]
    check_shape("h_t", h_t, (*tokens, d_t), "the tokens of h_s")
    if weight is not None:
        check_shape("weight", weight, (d_t, d_s), "[D_t, D_s]")
    elif d_s != d_t:
        raise ValueError(f"weight must be given, of shape {(d_t, d_s)}, since h_s has {d_s} features and h_t has {d_t}")
    if bias is not None:
        if weight is None:
            raise ValueError("bias must be None when there is no weight to add it to")
        check_shape("bias", bias, (d_t,), "[D_t]")
    check_mask(mask, tokens)
    check_sample_weight(sample_weight, tokens)
