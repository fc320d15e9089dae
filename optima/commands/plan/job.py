"""What is planned: the sizes of both models, and the shape of the data between them."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from optima.assets import STUDENT
from optima.assets import TEACHER as SHIPPED_TEACHER
from optima.coca import CoCa, CoCaConfig
from optima.coca.checkpoint import read_config
from optima.coca.presets import preset
from optima.commands.options import PlanConfig
from optima.commands.plan.needs import Needs, measure_needs
from optima.commands.plan.training import TrainingNeeds, measure_training
from optima.data.records import FORMATS
from optima.recipes.coca_large import TEACHER, TEACHER_FILES
from optima.task import TASKS
from optima.tasks.fit import refuse_misfit
from optima_core.errors import OptimaError


class Job(NamedTuple):
    """A distillation of two models, or the teacher's finetuning before it.

    text_length: tokens in a row of text. classes: of the head, 0 if there is none.
    """

    config: PlanConfig
    teacher: CoCaConfig
    student: CoCaConfig
    names: tuple[str, str]
    text_length: int
    classes: int

    @property
    def device(self) -> Literal["gpu", "cpu"]:
        """Where the step is to run."""
        return "cpu" if self.config.chip == "cpu" else "gpu"

    def needs(self) -> Needs:
        """What a step of the distillation needs of one device."""
        config = self.config
        alone = self.device == "cpu" and config.threads == 1
        return measure_needs(
            self.teacher,
            self.student,
            config.task,
            batch_size=config.batch_size,
            probe_size=config.probe_size,
            text_length=self.text_length,
            classes=self.classes,
            engine=dataclasses.replace(config.engine, teacher_ahead=False) if alone else config.engine,
            layer_map=config.layer_map,
            single_layer_maps=config.single_layer_maps,
            recompute=config.recompute,
            device=self.device,
        )

    def of_one_gpu(self) -> "Job":
        """The same with one GPU's share of batch and probe, on that GPU alone."""
        gpus = self.config.gpus
        batch, probe = self.config.batch_size // gpus, -(-self.config.probe_size // gpus)
        return self._replace(config=dataclasses.replace(self.config, batch_size=batch, probe_size=probe, gpus=1))

    def training_needs(self) -> TrainingNeeds:
        """What a step of the teacher's finetuning needs."""
        config = self.config
        return measure_training(
            self.teacher,
            config.task,
            batch_size=config.batch_size,
            text_length=self.text_length,
            classes=self.classes,
            precision=config.engine.precision,
            recompute=config.recompute,
            device=self.device,
        )


def read_job(config: PlanConfig) -> Job:
    """The job that `distill` would have with these options; of a finetuning, the teacher stands for the student.

    Raises OptimaError if a model's sizes are not known, or do not fit the data.
    """
    teacher, teacher_name = _sizes("teacher", config.teacher, None)
    if config.stage == "finetune":
        student, student_name = teacher, teacher_name
    else:
        student, student_name = _sizes("student", config.student, teacher)
    text_length, classes = _shape_of_data(config, {teacher_name: teacher, student_name: student})
    return Job(config, teacher, student, (teacher_name, student_name), text_length, classes)


def _sizes(
    role: Literal["teacher", "student"], path: Path | None, teacher: CoCaConfig | None
) -> tuple[CoCaConfig, str]:
    """The sizes that a file or preset has, and what to call it.

    A teacher that a shipped recipe still waits for has the sizes of the model that the recipe says to finetune.
    """
    if path is None:
        return read_config(SHIPPED_TEACHER if role == "teacher" else STUDENT), f"the shipped {role}"
    if path.suffix != ".safetensors":
        return preset(str(path), teacher), str(path)
    if path.exists():
        return read_config(path), str(path)
    if role == "teacher" and str(path) in TEACHER_FILES.values():
        return preset(TEACHER), f"{TEACHER} (to become {path})"
    raise OptimaError(f"{role} {path} is not there yet; say whose sizes it will have, as in --{role} {TEACHER}")


def _shape_of_data(config: PlanConfig, models: dict[str, CoCaConfig]) -> tuple[int, int]:
    """Text length and classes that `distill` would find in the data; the official ones need not be there."""
    if config.data.name == "pictograms":
        from optima.tasks.pictograms import PictogramTask

        pictograms = PictogramTask(config.task)
        for name, sizes in models.items():
            with torch.device("meta"):
                refuse_misfit(CoCa(sizes), name, pictograms)
        return pictograms.text_length, len(pictograms.classes)
    served = FORMATS[config.data.name].task
    if served != config.task:
        raise OptimaError(f"data {config.data.name} serves task {served}, not {config.task}; give --task {served}")
    lengths = [sizes.text_decoder.context_length for sizes in models.values()]
    text_length = config.data.text_length or lengths[0]
    if text_length > min(lengths):
        raise OptimaError(f"data.text_length must be at most {min(lengths)}, which both models read, got {text_length}")
    classes = TASKS[config.task].classes
    return text_length, config.data.answers if classes is None else len(classes)
