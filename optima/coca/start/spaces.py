"""How vectors of a teacher and of a narrower student stand for each other."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Space(NamedTuple):
    """How vectors t [D_t] of the teacher and s [D_s] of the student stand for each other: s = t forth, t = s back.

    same: they are equal, so that what reads and writes them can be copied.
    """

    forth: Tensor
    back: Tensor
    same: bool = False


def identity(width: int, like: Tensor) -> Space:
    """The student's vectors are the teacher's own."""
    eye = torch.eye(width, dtype=torch.float64, device=like.device)
    return Space(eye, eye, same=True)


def _mean_free(width: int, device: torch.device) -> Tensor:
    """Orthonormal [width - 1, width]: the cosine basis without its constant; each row is spread over all features."""
    column = torch.arange(width, dtype=torch.float64, device=device)
    row = column[1:, None]
    return math.sqrt(2 / width) * torch.cos(math.pi * row * (column + 0.5) / width)


def principal_space(moment: Tensor, width: int) -> Space:
    """The strongest mean-free directions of vectors of this second moment [D, D], as features of a student.

    forth [D, width] and back [width, D] are each other's transposes; vectors go through as their projections.
    """
    size = moment.shape[0]
    centre = torch.eye(size, dtype=moment.dtype, device=moment.device) - 1 / size
    # The mean gets an eigenvalue below all others, so that it is told from directions without any strength.
    directions = torch.linalg.eigh(centre @ moment @ centre - 1 / size).eigenvectors.flip(1)[:, : width - 1]
    forth = directions @ _mean_free(width, moment.device)
    return Space(forth, forth.T)
