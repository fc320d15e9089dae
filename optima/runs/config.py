"""The options of what makes a run directory: a distillation, a fine-tuning, a training from scratch."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from optima.coca.config import CoCaConfig
from optima.data.config import DataConfig
from optima.task import Task
from optima_core.config import DistillerConfig, OptimiserConfig, Precision
from optima_core.errors import OptimaError
from optima_core.processes import Strategy

Initialisation = Literal["checkpoint", "scratch", "teacher_truncate", "teacher_pca"]


def refuse_below(least: int, config: object, *names: str) -> None:
    """Raises ValueError for the first of the options whose value is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def refuse_impatience(patience: float) -> None:
    """Raises ValueError for seconds that no run could wait, or that no clock counts."""
    if not 1 <= patience <= 1e6:
        raise ValueError(f"patience must be from 1 to 1e6 seconds, got {patience}")


@contextlib.contextmanager
def told_in_a_line() -> Iterator[None]:
    """Around what first puts the options together: a ValueError that says what does not fit becomes an OptimaError."""
    try:
        yield
    except ValueError as error:
        raise OptimaError(str(error)) from error


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class TeachConfig:
    """How a teacher learns the data before it is distilled.

    Attributes:
        steps: Optimiser steps that the teacher is finetuned for; 0 takes it as it is. It is kept in the run's folder
            `teacher`. Of a vocabulary of the texts (data.tokenizer texts) it first learns the words.
        batch_size: Items a step.
        learning_rate: Highest learning rate of AdamW.
    """

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        refuse_below(0, self, "steps")
        refuse_below(1, self, "batch_size")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate}")


@dataclass(frozen=True)
class DistillConfig:
    """One distillation run.

    Attributes:
        task: What the student is to learn.
        data: Which images and texts.
        run: Run directory, new or empty; see also resume.
        teacher: Teacher weights (.safetensors); null takes the shipped teacher.
        teach: How the teacher learns the data first, if it does.
        student: Whose sizes, or weights (.safetensors): a file, or a preset, which has sizes alone: tiny12, tiny6 or
            base with the teacher's patches (tiny12-14 names them). null takes the sizes of the shipped student.
        init: Where the student's weights come from: the checkpoint that `student` names, fresh random numbers, the
            teacher's leading features, or the teacher's principal components on a training batch. null takes the
            checkpoint if `student` is a file, else teacher_pca.
        init_items: Of teacher_pca: training items that the principal components are taken of.
        batch_size: Items a batch, over all ranks; a step takes engine.accumulate of them.
        probe_size: Items of the held batch that rewards are measured on.
        layer_map: "uniform" spreads the student's layers over the teacher's, "last" pairs them with the last ones; or
            by module the teacher layer (from 0) of each student layer, as in "{text_decoder: [0, 3]}", the modules
            left out being "uniform".
        single_layer_maps: Compare the attention maps of a student's module of one layer with those of a deeper teacher,
            too; its hidden states always are.
        recompute: Keep no activations inside the student's layers, but compute them again in the backward pass: less
            memory, about a third more time.
        engine: Rounds, losses, optimiser, bandit and reward. By default the strength of layer losses falls, which is
            worth points on the embedded tasks (bench/COMPARE.md).
        evaluate_every: Rounds between points of the learning curve, the first at the start and the last at the end; 0
            draws none.
        evaluate_items: Validation items a point of the learning curve.
        evaluate_batch: Items a forward pass of an evaluation. Ranks take whole batches in turn, so that their scores
            are those of one process: there should be as many batches as ranks, or more.
        test_items: Test items that the final scores are measured on; 0 takes all.
        samples: Sample predictions kept for the report.
        report: Draw report.html at the end; `report` draws it later from the same files.
        checkpoint_every: Rounds between checkpoints.
        keep: Checkpoints that stay on disk.
        seed: Seed of the data stream, the projections and the bandit.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue the run in the run directory, with the options that its config.yaml holds. More engine.rounds
            may be asked for where the learning rate and the strength of layer losses do not change over the rounds.
        quiet: Show nothing but the final table.
        parallel: How the processes that torchrun starts, one a device, share the work: "ddp" keeps a whole student on
            each, "fsdp" (FSDP2) spreads the parameters of both models over all of them, "hsdp" over groups of them, of
            which each holds the whole. Without torchrun of no effect.
        shard_over: Processes of a group with parallel hsdp, a divisor of their number; 0 takes those of one machine.
        patience: Seconds without progress after which a run of several processes ends, and says which of them held up
            the others: more than a step, a point of the learning curve and a checkpoint take.
        tensorboard: Also write TensorBoard event files, into the run directory's tensorboard folder.
    """

    task: Task = "captioning"
    data: DataConfig = field(default_factory=DataConfig)
    run: Path = Path("runs/distill")
    teacher: Path | None = None
    teach: TeachConfig = field(default_factory=TeachConfig)
    student: Path | None = None
    init: Initialisation | None = None
    init_items: int = 256
    batch_size: int = 32
    probe_size: int = 128
    layer_map: Literal["uniform", "last"] | dict[str, list[int]] = "uniform"
    single_layer_maps: bool = False
    recompute: bool = False
    engine: DistillerConfig = field(default_factory=partial(DistillerConfig, strength_first=30.0, strength_last=0.1))
    evaluate_every: int = 10
    evaluate_items: int = 250
    evaluate_batch: int = 64
    test_items: int = 0
    samples: int = 24
    report: bool = True
    checkpoint_every: int = 5
    keep: int = 2
    seed: int = 0
    threads: int = 0
    resume: bool = False
    quiet: bool = False
    parallel: Strategy = "ddp"
    shard_over: int = 0
    patience: float = 1800.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        refuse_below(1, self, "init_items", "batch_size", "probe_size", "evaluate_batch", "checkpoint_every", "keep")
        refuse_below(
            0, self, "evaluate_every", "evaluate_items", "test_items", "samples", "seed", "threads", "shard_over"
        )
        refuse_impatience(self.patience)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a CoCa is trained on a task.

    Attributes:
        model: Weights to start from (.safetensors), such as `import` writes. A head that the task needs and they lack
            is added, with random weights.
        task: What the model is to learn.
        data: Which images and texts.
        run: Run directory, new or empty; see also resume. At the end it holds model.safetensors.
        steps: Optimiser steps.
        batch_size: Items a step.
        optimiser: AdamW and its schedule over all steps.
        precision: Arithmetic of the forward pass; weights and optimiser stay fp32.
        recompute: Keep no activations inside the layers, but compute them again in the backward pass: less memory,
            about a third more time.
        compile: Compile the three modules with torch.compile; needs a C++ compiler on a CPU.
        stored: Floating-point type of the weights in model.safetensors.
        evaluate_every: Steps between points of the learning curve; 0 draws none.
        evaluate_items: Validation items a point of the learning curve.
        evaluate_batch: Items a forward pass of an evaluation.
        test_items: Test items that the final scores are measured on; 0 takes all.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between progress lines.
        seed: Seed of a new head and of the data stream.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue the run in the run directory, with the options that its config.yaml holds.
    """

    model: Path
    task: Task = "captioning"
    data: DataConfig = field(default_factory=DataConfig)
    run: Path = Path("runs/finetune")
    steps: int = 2000
    batch_size: int = 32
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(learning_rate=1e-4))
    precision: Precision = "bf16"
    recompute: bool = False
    compile: bool = False
    stored: Literal["fp32", "fp16"] = "fp32"
    evaluate_every: int = 500
    evaluate_items: int = 250
    evaluate_batch: int = 250
    test_items: int = 0
    checkpoint_every: int = 200
    log_every: int = 50
    seed: int = 0
    threads: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        refuse_below(
            1, self, "steps", "batch_size", "evaluate_items", "evaluate_batch", "checkpoint_every", "log_every"
        )
        refuse_below(0, self, "evaluate_every", "test_items", "seed", "threads")


@dataclass(frozen=True)
class PretrainConfig:
    """How a CoCa is trained from scratch.

    Attributes:
        run: Run directory, new or empty; see also resume. At the end it holds model.safetensors.
        model: Sizes of the model.
        caption_steps: Optimiser steps on contrastive and captioning losses.
        task_steps: Optimiser steps on captioning, VQA, NLVR2 and SNLI-VE jointly, after the caption steps.
        images: Images a step, an even number.
        questions: VQA items an image in the task steps.
        hypotheses: SNLI-VE items an image in the task steps.
        statements: NLVR2 items a pair of images in the task steps.
        contrastive: Weight of the contrastive loss beside a captioning loss of weight 1.
        optimiser: AdamW and its schedule over all steps.
        precision: Arithmetic of the forward pass; weights and optimiser stay fp32.
        compile: Compile the three modules with torch.compile: a minute's wait, then 1.3 times the steps a second
            (measured on one core of an AMD EPYC with AVX-512 bf16); needs a C++ compiler on a CPU.
        stored: Floating-point type of the weights in model.safetensors.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between progress lines.
        seed: Seed of the initialisation and of the data stream.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue the run in the run directory, with the options that its config.yaml holds.
    """

    run: Path = Path("runs/pretrain")
    model: CoCaConfig = field(default_factory=CoCaConfig)
    caption_steps: int = 2000
    task_steps: int = 6000
    images: int = 64
    questions: int = 2
    hypotheses: int = 1
    statements: int = 1
    contrastive: float = 0.2
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    precision: Precision = "bf16"
    compile: bool = False
    stored: Literal["fp32", "fp16"] = "fp16"
    checkpoint_every: int = 200
    log_every: int = 50
    seed: int = 0
    threads: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        refuse_below(2, self, "images")
        refuse_below(1, self, "checkpoint_every", "log_every", "questions", "hypotheses", "statements")
        refuse_below(0, self, "caption_steps", "task_steps", "seed", "threads")
        if self.images % 2:
            raise ValueError(f"images must be an even number, got {self.images}")
        if not self.caption_steps + self.task_steps:
            raise ValueError("caption_steps and task_steps are both 0; give at least one step")
