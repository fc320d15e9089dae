"""What each token counts in a mean."""

import torch
from torch import Tensor

from optima_kernels.reference import token_weights


def token_weight(
    tokens: torch.Size, mask: Tensor | None, sample_weight: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What each token counts, flat [T] and scaled to a mean of 1 (all 0 where nothing counts), or None if all count 1.

    A weighted mean over tokens is then a sum of `token_weight * value`, over T.
    """
    given = mask if mask is not None else sample_weight
    if given is None:
        return None
    weights = token_weights(torch.ones(tokens, dtype=dtype, device=given.device), mask, sample_weight).flatten()
    mean = weights.mean()
    return weights / torch.where(mean == 0, 1, mean)
