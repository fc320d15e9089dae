"""Batches of one task as a CoCa takes them."""

from typing import NamedTuple

from torch import Tensor


class TaskBatch(NamedTuple):
    """images: float [B, images, 3, S, S] in -1..1. tokens: int64 [B, L].

    targets: int64 [B], the class; -1 for captioning, and where it is not known.
    """

    images: Tensor
    tokens: Tensor
    targets: Tensor
