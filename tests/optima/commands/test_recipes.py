"""Shipped recipes: every one parses, the twelve of coca_ViT-L-14 are as their generator says and fit their models."""

from pathlib import Path

import pytest
import yaml

from optima.coca.presets import preset
from optima.commands.distill import DistillConfig
from optima.commands.parse import RECIPES, parse
from optima.data.records import FORMATS
from optima.recipes.write_large import EPOCHS, TASKS, write
from optima.run import COMMANDS, DEFAULT

LARGE = [f"coca_large_to_{student}_{benchmark}" for student in EPOCHS for benchmark in TASKS]
OTHERS = ["own_images", *(f"pictograms_{task}" for task in ("captioning", "vqa", "nlvr2", "snli_ve"))]


@pytest.fixture(scope="module")
def resolved() -> dict[str, DistillConfig]:
    return {name: parse(["--config", name], COMMANDS, DEFAULT)[1] for name in [*LARGE, *OTHERS]}


def test_every_recipe_resolves_and_serves_its_task(resolved: dict[str, DistillConfig]) -> None:
    for name, config in resolved.items():
        assert isinstance(config, DistillConfig)
        assert config.run.name == name
        if config.data.name != "pictograms":
            assert FORMATS[config.data.name].task == config.task
            assert config.init != "checkpoint"


@pytest.mark.parametrize("student", EPOCHS)
def test_relation_heads_divide_the_widths_of_teacher_and_student(
    student: str, resolved: dict[str, DistillConfig]
) -> None:
    heads = resolved[f"coca_large_to_{student}_vqa"].engine.objective.relation_heads
    assert heads is not None
    teacher = preset("coca_ViT-L-14")
    for model in (teacher, preset(student, teacher)):
        for tower in (model.image_encoder, model.text_decoder, model.multimodal_decoder):
            assert tower.width % heads == 0


def test_left_and_right_are_never_exchanged_where_they_matter(resolved: dict[str, DistillConfig]) -> None:
    for name in LARGE:
        config = resolved[name]
        assert not (config.task in ("vqa", "nlvr2") and config.data.loader.transform.mirror)


def test_the_files_are_what_their_generator_writes(tmp_path: Path) -> None:
    write(tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(LARGE)
    for path in tmp_path.iterdir():
        assert (RECIPES / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["engine"]["optimiser"]["learning_rate"] > 0
