"""Fused distillation losses that never materialise an attention map, a projected state or a logits matrix."""

from optima_kernels.attention import attention_map_loss, attention_map_losses
from optima_kernels.hidden import hidden_mse, hidden_mses
from optima_kernels.logits import linear_kl, prediction_kl
from optima_kernels.shared.cpu_products import linear
from optima_kernels.shared.registration import as_operators

__all__ = [
    "as_operators",
    "attention_map_loss",
    "attention_map_losses",
    "hidden_mse",
    "hidden_mses",
    "linear",
    "linear_kl",
    "prediction_kl",
]
