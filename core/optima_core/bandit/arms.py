"""What an arm stands for: one module, a set of them, or a strength for each.

The chosen arm is a device tensor and must stay one, so it becomes strengths by arithmetic, never by an `if`, and
without a table, which would have a row for each of levels ** modules arms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optima_core.bandit.catalogue import ArmKind

LEVELS = (0.0, 1 / 3, 1.0, 3.0)
"""The strengths that a module may be distilled with; at 1, its layer losses weigh what the objective says."""

_FULL = LEVELS.index(1.0)


def count_arms(modules: int, kind: ArmKind = "modules") -> int:
    """Number of arms over `modules` modules: themselves, their 2**modules - 1 non-empty subsets, or a level for each.

    Raises:
        ValueError: there is no module, `kind` is unknown, or there are more arms than int64 can number (subsets: than a
        bandit could learn to tell apart).
    """
    if modules < 1:
        raise ValueError(f"modules must be at least 1, got {modules}")
    if kind == "modules":
        return modules
    if kind == "strengths":
        if modules > 31:
            raise ValueError(f"arms='strengths' takes at most 31 modules, got {modules}; use arms='modules'")
        return int(len(LEVELS) ** modules)
    if kind != "subsets":
        raise ValueError(f"arms must be 'modules', 'subsets' or 'strengths', got {kind!r}")
    if modules > 12:
        raise ValueError(
            f"arms='subsets' takes at most 12 modules (4095 arms), got {modules}; use arms='strengths' or 'modules'"
        )
    return (1 << modules) - 1


def arm_strengths(arm: Tensor, modules: int, kind: ArmKind = "modules") -> Tensor:
    """How strongly each module is distilled by the arms `arm`, int64 [batch]: float32 [batch, modules].

    An arm of -1, that of the policy `all_modules`, is every module at strength 1. With `kind="modules"` arm number m is
    module m at strength 1; with "subsets" arm number a holds, at strength 1, module m if bit m of a + 1 is set; with
    "strengths" module m has the level `LEVELS[digit m]` of a written in base len(LEVELS), the first digit the lowest.

    Raises:
        ValueError: as `count_arms`.
    """
    count_arms(modules, kind)
    place = torch.arange(modules, device=arm.device)
    given = arm[:, None]
    if kind == "modules":
        found = (given == place).to(torch.float32)
    elif kind == "subsets":
        found = (((given + 1) >> place) & 1).to(torch.float32)
    else:
        found = levels_like(arm)[levels_of_arm(arm, modules)]
    return torch.where(given < 0, torch.ones_like(found), found)


def arm_of_levels(levels: Tensor) -> Tensor:
    """The arm, int64 [batch], that gives each module the level with that index in `LEVELS`, int64 [batch, modules]."""
    weight = len(LEVELS) ** torch.arange(levels.shape[-1], device=levels.device)
    return (levels * weight).sum(dim=-1)


def levels_of_arm(arm: Tensor, modules: int) -> Tensor:
    """The inverse of `arm_of_levels`: int64 [batch, modules]; of arm -1, the index of strength 1."""
    place = torch.arange(modules, device=arm.device)
    digits = (arm[:, None].clamp(min=0) // len(LEVELS) ** place) % len(LEVELS)
    return torch.where(arm[:, None] < 0, torch.full_like(digits, _FULL), digits)


def levels_like(tensor: Tensor) -> Tensor:
    """`LEVELS` as float32 on the device of `tensor`, without a copy from the host that would be waited for."""
    return torch.stack([torch.full((), level, dtype=torch.float32, device=tensor.device) for level in LEVELS])


def belief_names(module_names: Sequence[str], kind: ArmKind = "modules") -> list[str]:
    """What a policy keeps a belief of: the arms, a set of modules reading `a+b`; with "strengths" the modules.

    With "modules" the set of all of them comes last, which is no arm but what `all_modules` distils.

    Raises:
        ValueError: as `count_arms`.
    """
    arms = count_arms(len(module_names), kind)
    if kind == "modules":
        return [*module_names, "+".join(module_names)]
    if kind == "strengths":
        return list(module_names)
    members = ((name for i, name in enumerate(module_names) if (arm >> i) & 1) for arm in range(1, arms + 1))
    return ["+".join(found) for found in members]
