"""What each token counts in a mean."""

import torch
from torch import Tensor


def token_weight(
    tokens: torch.Size, mask: Tensor | None, sample_weight: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What each token counts, flat [T] and scaled to a mean of 1 (all 0 where nothing counts), or None if all count 1.

    It is 0 where `mask` is False, else the weight of the token's sample. A weighted mean over tokens is then a sum of
    `token_weight * value`, over T.
    """
    given = mask if mask is not None else sample_weight
    if given is None:
        return None
    weights = torch.ones(tokens, dtype=dtype, device=given.device)
    if sample_weight is not None:
        weights = weights * sample_weight.detach().to(dtype).view(-1, *[1] * (len(tokens) - 1))
    if mask is not None:
        weights = weights * mask
    weights = weights.flatten()
    mean = weights.mean()
    return weights / torch.where(mean == 0, 1, mean)
