"""What the command `distill_hf` takes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from optima.commands.options import ChipConfig, ComparisonConfig
from optima.runs.config import TrackerName, refuse_below, refuse_impatience
from optima_core.config import DistillerConfig
from optima_core.processes import Strategy


@dataclass(frozen=True)
class DistillHfConfig:
    """Distils one model of transformers into another, on rows of texts and images.

    Needs the extra `hf`. Both models read what the teacher's processor (or tokenizer) makes of a row. Rows have one of
    these shapes: messages (a chat whose last message is the assistant's), question and answer, caption, text; each with
    an image beside it, or without. A model that hears (Whisper's kin) reads audio and text.

    Attributes:
        teacher: Folder or name on the Hub of the teacher, with its processor.
        student: The same of the student; a folder that holds a config.json and no weights is a student that starts
            from random numbers.
        data: JSON Lines or parquet file, a folder of such files, or a folder of images with metadata.jsonl.
        streaming: Read the rows as they come, so that they need not fit on the disk or in memory a second time; their
            order is then that of the files, but for a buffer in which they are shuffled.
        run: Run directory, new or empty; see also resume. At the end its folder "student" holds what from_pretrained
            loads.
        modules: The modules to distil, by the names that are printed; none named takes all that both models have.
        layer_map: "uniform" spreads the student's layers over the teacher's, "last" pairs them with the last ones.
        batch_size: Rows a batch, over all ranks.
        probe_size: Held rows that rewards are measured on.
        held_every: Every so many rows one is held out, for the probe and the scores.
        held_rows: Held rows that the final scores are measured on; 0 takes all.
        max_length: Tokens of a row, at most; longer ones are cut.
        recompute: Keep of each of the student's layers its input alone, and run the layer again in the backward pass:
            less memory, more time.
        lora: Rank of PEFT's LoRA adapters in place of training all of the student; 0 trains all of it. The adapters are
            merged into the student that is written.
        engine: Rounds, losses, optimiser, bandit and reward.
        checkpoint_every: Rounds between checkpoints.
        keep: Checkpoints that stay on disk.
        report: Draw report.html at the end; `report` draws it later from the same files.
        track: Trackers that are told of every round.
        push_to_hub: Name of a repository on the Hub to push the student to at the end; null pushes nothing.
        seed: Seed of a random student, the rows' order, the projections and the bandit.
        threads: CPU threads; 0 takes what torch chooses.
        resume: Continue the run in the run directory, with the options that its config.yaml holds.
        quiet: Show nothing but the final table.
        parallel: How the processes that torchrun starts, one a device, share the work: "ddp" keeps a whole student on
            each, "fsdp" (FSDP2) spreads the parameters of both models over them. Without torchrun of no effect.
        patience: Seconds without progress after which a run of several processes ends, and says which of them held up
            the others: more than a step and a checkpoint take.
    """

    teacher: str
    student: str
    data: Path
    streaming: bool = False
    run: Path = Path("runs/distill_hf")
    modules: list[str] = field(default_factory=list)
    layer_map: Literal["uniform", "last"] = "uniform"
    batch_size: int = 8
    probe_size: int = 16
    held_every: int = 10
    held_rows: int = 256
    max_length: int = 512
    recompute: bool = False
    lora: int = 0
    engine: DistillerConfig = field(default_factory=DistillerConfig)
    checkpoint_every: int = 5
    keep: int = 2
    report: bool = True
    track: list[TrackerName] = field(default_factory=list)
    push_to_hub: str | None = None
    seed: int = 0
    threads: int = 0
    resume: bool = False
    quiet: bool = False
    parallel: Strategy = "ddp"
    patience: float = 1800.0

    def __post_init__(self) -> None:
        refuse_below(1, self, "batch_size", "probe_size", "checkpoint_every", "keep", "max_length")
        refuse_below(2, self, "held_every")
        refuse_below(0, self, "held_rows", "lora", "seed", "threads")
        refuse_impatience(self.patience)
        if self.engine.compile:
            raise ValueError("engine.compile must be false: the hooks that catch hidden states cannot be compiled")
        if self.streaming and not self.held_rows:
            raise ValueError("held_rows 0 takes all of them, which a stream cannot; give a number with streaming")


@dataclass(frozen=True)
class PlanHfConfig(ChipConfig, DistillHfConfig):
    """A distillation of models of transformers: the options and resolved config.yaml of `distill_hf`, as they are.

    Of both models a config.json is enough, beside the teacher's processor; of the data, the first rows are read. What
    bears on neither memory nor the time of a step has no effect.
    """

    def __post_init__(self) -> None:
        DistillHfConfig.__post_init__(self)
        ChipConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class CompareHfConfig(ComparisonConfig):
    """Distils models of transformers by every method over several seeds and compares their losses on held-out rows.

    Attributes:
        method: task_loss and task_loss_and_logits distil no layers; all_modules_at_* every module in every round with
            that weight in place of balanced ones; only_MODULE one module in every round; round_robin one after the
            other, uniform_subset a random set; linear_thompson is a bandit. optima runs the settings under `distill` as
            they are. None named takes all that the models have: of one module there is none to choose, and without
            labels no task loss.
        distill: Settings that all runs share; run, seed, resume and quiet are the comparison's.
    """

    method: list[str] = field(default_factory=list)
    distill: DistillHfConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method:
            self.refuse_unfit_list("method")
        if self.distill.push_to_hub is not None:
            raise ValueError("distill.push_to_hub must be null, since every run has a student of its own")
