"""What an arm stands for: one module, or a set of them.

The chosen arm is a device tensor and must stay one, so it becomes gates by looking up a row of a table, never by an
`if`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optima_core.bandit.config import ArmKind


def count_arms(modules: int, kind: ArmKind = "modules") -> int:
    """Number of arms over `modules` modules: themselves, or their 2**modules - 1 non-empty subsets.

    Raises:
        ValueError: there is no module, `kind` is unknown, or there are more subsets than a bandit could learn to tell
        apart.
    """
    if modules < 1:
        raise ValueError(f"modules must be at least 1, got {modules}")
    if kind == "modules":
        return modules
    if kind != "subsets":
        raise ValueError(f"arms must be 'modules' or 'subsets', got {kind!r}")
    if modules > 12:
        raise ValueError(f"arms='subsets' takes at most 12 modules (4095 arms), got {modules}; use arms='modules'")
    return (1 << modules) - 1


def arm_gates(modules: int, kind: ArmKind = "modules", device: torch.device | str = "cpu") -> Tensor:
    """The table whose row `arm` says which modules that arm distils: float32 [rows, modules] of 0 and 1.

    `arm_gates(...)[arm]` gives the gates of a device tensor `arm` [batch] without leaving the device: [batch,
    modules]. The last row is all modules, so the -1 of the policy `all_modules` means what it says. With
    `kind="modules"` that row is beyond the arms, with `kind="subsets"` it is the last of them; subset number a holds
    module m if bit m of a + 1 is set.

    Raises:
        ValueError: as `count_arms`.
    """
    arms = count_arms(modules, kind)
    if kind == "modules":
        return torch.cat([torch.eye(modules, device=device), torch.ones(1, modules, device=device)])
    members = torch.arange(1, arms + 1, device=device)
    return ((members[:, None] >> torch.arange(modules, device=device)) & 1).to(torch.float32)


def arm_names(module_names: Sequence[str], kind: ArmKind = "modules") -> list[str]:
    """A name for every row of `arm_gates`; a set of modules reads `a+b`.

    Raises:
        ValueError: as `count_arms`.
    """
    arms = count_arms(len(module_names), kind)
    if kind == "modules":
        return [*module_names, "+".join(module_names)]
    members = ((name for i, name in enumerate(module_names) if (arm >> i) & 1) for arm in range(1, arms + 1))
    return ["+".join(found) for found in members]
