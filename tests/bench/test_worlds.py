"""The settings in which choosing might pay, as files."""

import re
import sys
from pathlib import Path

import pytest
import torch

from bench import worlds
from optima.assets import STUDENT, TEACHER
from optima.coca import MODULES
from optima.coca.checkpoint import load_coca
from optima.commands.parse import parse
from optima.runs.config import DistillConfig
from optima.runs.start import make_start
from optima.tasks.choose import open_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("worlds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["worlds", str(path)])
        worlds.main()
    return path


def settings(folder: Path, world: str) -> DistillConfig:
    _, config = parse(["distill", "--config", str(folder / f"{world}.yaml"), "--task", "vqa"])
    assert isinstance(config, DistillConfig)
    return config


@pytest.mark.parametrize("spoilt", MODULES)
def test_a_spoilt_module_has_its_layers_in_reverse_and_nothing_else_differs(spoilt: str, folder: Path) -> None:
    path = settings(folder, f"spoilt_{spoilt}").teacher
    assert path is not None
    found, sound = load_coca(path).state_dict(), load_coca(TEACHER).state_dict()
    layer = re.compile(rf"({spoilt}\.\w+\.)(\d+)\.(.*)")
    count = 1 + max(int(match[2]) for match in map(layer.fullmatch, sound) if match)
    assert count > 1
    for name, weight in found.items():
        match = layer.fullmatch(name)
        source = f"{match[1]}{count - 1 - int(match[2])}.{match[3]}" if match else name
        torch.testing.assert_close(weight, sound[source], rtol=0, atol=0)


def test_a_student_starts_with_the_teachers_image_encoder_or_as_it_was_shipped(folder: Path) -> None:
    teacher = load_coca(TEACHER)
    for world, prefix, source in (
        ("teachers_image_encoder", "image_encoder.blocks.", teacher),
        ("shipped_start", "", load_coca(STUDENT)),
    ):
        config = settings(folder, world)
        data = open_data(config.data, config.task, teacher.config, seed=0)
        start, wanted = make_start(config, teacher, data).state_dict(), source.state_dict()
        compared = [name for name in wanted if name.startswith(prefix) and not name.startswith("heads.")]
        assert compared
        for name in compared:
            torch.testing.assert_close(start[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", worlds.WORLDS)
def test_a_comparison_takes_the_same_setting(world: str, folder: Path) -> None:
    _, config = parse(["compare", "--config", str(folder / f"compare_{world}.yaml"), "--task", "vqa"])
    assert config.distill.teacher == settings(folder, world).teacher
    assert config.distill.student == settings(folder, world).student
    assert config.distill.init == settings(folder, world).init
