"""Recipes: every one resolves to valid options, is offered where it belongs, and fits its models."""

from dataclasses import replace
from pathlib import Path

import pytest

from optima.coca.presets import preset
from optima.commands.parse import parse
from optima.data.records import FORMATS
from optima.recipes import RECIPES, recipes_of
from optima.recipes.coca_large import BENCHMARKS, EPOCHS
from optima.runs.config import DistillConfig
from optima.runs.directory import RunDirectory
from optima_core import OptimaError

LARGE = [f"coca_large_to_{student}_{benchmark}" for student in EPOCHS for benchmark in BENCHMARKS]


@pytest.fixture(scope="module")
def resolved() -> dict[str, DistillConfig]:
    return {name: parse(["--config", name])[1] for name in recipes_of("distill")}


def test_every_recipe_resolves_and_serves_its_task(resolved: dict[str, DistillConfig]) -> None:
    assert set(LARGE) < set(resolved)
    for name, config in resolved.items():
        assert isinstance(config, DistillConfig)
        assert config.run.name == name
        if config.data.name != "pictograms":
            assert FORMATS[config.data.name].task == config.task
            assert config.init != "checkpoint"


def test_a_step_of_a_large_recipe_takes_as_many_items_as_it_says(resolved: dict[str, DistillConfig]) -> None:
    for name in LARGE:
        config = resolved[name]
        assert config.batch_size * config.engine.accumulate == 256
        assert config.engine.rounds * config.engine.steps_per_round * 256 >= 300_000


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


def test_a_recipe_of_another_command_is_refused_by_name() -> None:
    with pytest.raises(OptimaError, match="recipe pretrain_teacher is one of `pretrain`; the recipes of distill are"):
        parse(["distill", "--config", "pretrain_teacher"])
    with pytest.raises(OptimaError, match="recipe own_images is one of `distill`; evaluate has no recipes"):
        parse(["evaluate", "--config", "own_images", "--model", "m"])
    assert parse(["plan", "--config=own_images"])[1].data.tokenizer == "texts"
    assert {recipe.command for recipe in RECIPES.values()} == {"distill", "pretrain"}


def test_a_run_of_a_recipe_is_resumed_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunDirectory(Path("runs/coca_large_to_base_coco"), resume=False, keep=1) as directory:
        directory.write_config(replace(parse(["--config", "coca_large_to_base_coco"])[1], keep=7))
    for words in (["--config", "coca_large_to_base_coco"], ["--run", "runs/coca_large_to_base_coco"]):
        config = parse([*words, "--resume"])[1]
        assert (config.resume, config.keep, config.student.name) == (True, 7, "base")
