"""A student's start is computed on the teacher's GPU, wherever the batch and the student are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from whole_step import make_coca

from optima.coca.start import project_teacher, truncate_teacher


class Devices(TorchDispatchMode):
    """The operations that gave a tensor on the CPU, views and copies into the student aside."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: set[str] = set()
        self.on_gpu = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        devices = {found.device.type for found in tree_leaves(made) if isinstance(found, Tensor)}
        self.on_gpu += "cuda" in devices
        if "cpu" in devices and not func.is_view and func is not torch.ops.aten.copy_.default:
            self.on_cpu.add(str(func))
        return made


def batches(size: int = 40) -> Iterator[Tensor]:
    yield torch.randn(size, 1, 3, 32, 32)
    yield torch.randint(1, 40, (size, 7))


@pytest.mark.parametrize("students", ["cpu", "cuda"])
@pytest.mark.parametrize("how", ["truncate", "project"])
def test_nothing_is_computed_on_the_cpu(seed: int, device: torch.device, how: str, students: str) -> None:
    teacher = make_coca(64, 4, 4).to(device).eval()
    student, on_cpu = make_coca(32, 2, 2).to(students), make_coca(32, 2, 2)
    on_cpu.load_state_dict(student.state_dict())
    images, tokens = batches()
    with Devices() as devices:
        if how == "truncate":
            truncate_teacher(student, teacher)
        else:
            project_teacher(student, teacher, images, tokens)
    assert not devices.on_cpu - {"aten.fill_.Scalar", "aten.zero_.default"}, devices.on_cpu
    assert how == "truncate" or devices.on_gpu > 100
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert not torch.equal(student.image_encoder.position.cpu(), on_cpu.image_encoder.position)
