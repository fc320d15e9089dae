"""The options of the commands that make no run of their own; those that do have theirs in `optima.runs.config`.

Nothing here imports torch, so that help and mistakes in the command line are there at once.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from optima.coca.config import ClassMask, GenerationConfig
from optima.data.config import DataConfig, Held
from optima.runs.config import DistillConfig, refuse_below
from optima.task import TASKS, Task

Method = Literal[
    "task_loss",
    "task_loss_and_logits",
    "all_modules_at_3",
    "all_modules_at_10",
    "all_modules_at_30",
    "all_modules_at_100",
    "all_modules_evenly",
    "only_image_encoder",
    "only_text_decoder",
    "only_multimodal_decoder",
    "image_and_text",
    "image_and_multimodal",
    "image_and_multimodal_at_30",
    "text_and_multimodal",
    "round_robin",
    "uniform",
    "uniform_subset",
    "discounted_ucb",
    "discounted_thompson",
    "linear_thompson",
    "optima",
]
"""Ways of choosing what to distil."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores a model on a held-out split.

    Attributes:
        model: Weights (.safetensors), such as a run directory's student.safetensors. The words.json beside says how
            images are fitted to squares, and which tokenizer is meant where data.tokenizer is null.
        tasks: Tasks to score; those that the model has no head for are refused. None named takes the task of the data,
            and of pictograms all that the model has heads for, and captioning.
        data: Which images and texts.
        split: Which held-out split; data.validation and data.test say which one of the data set that is.
        items: Items of the split that count; 0 takes all.
        batch_size: Items a forward pass. Processes that torchrun started, one a device, take whole batches in turn.
        generation: How captions are generated.
        predictions: Folder to write predictions to, in the benchmark's submission format; null writes none.
        threads: CPU threads; 0 takes what torch chooses.
    """

    model: Path
    tasks: list[Task] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    split: Held = "test"
    items: int = 0
    batch_size: int = 250
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    predictions: Path | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        refuse_below(0, self, "items", "threads")
        refuse_below(1, self, "batch_size")


@dataclass(frozen=True)
class ImportConfig:
    """Turns an open_clip CoCa checkpoint into a model file of ours.

    Attributes:
        checkpoint: The checkpoint: .safetensors, .bin, .pt or .pth.
        output: The file to write (.safetensors).
        preset: Name of the model's configuration: coca_ViT-L-14, coca_ViT-B-32 or coca_base.
        model_config: open_clip's JSON configuration of the model, in place of a preset; with neither, an
            open_clip_config.json beside the checkpoint is taken.
        class_mask: What the text tower's CLS token sees. All open_clip models, released ones too, were trained with
            the "shifted" mask; "exact" is right for weights that were trained with a corrected one.
        image_size: Image side that the model is to take, pixels; its position embeddings are interpolated. 0 keeps
            the one of the configuration.
    """

    checkpoint: Path
    output: Path
    preset: str | None = None
    model_config: Path | None = None
    class_mask: ClassMask = "shifted"
    image_size: int = 0

    def __post_init__(self) -> None:
        if self.preset is not None and self.model_config is not None:
            raise ValueError("preset and model_config are both given; give one")
        if self.image_size < 0:
            raise ValueError(f"image_size must be at least 0, got {self.image_size}")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"output must be a .safetensors file, got {self.output}")


@dataclass(frozen=True)
class ExportConfig:
    """Writes a model for other programs, after checking that what was written does what the model does.

    Attributes:
        model: The model, a .safetensors file of ours; a run's words.json beside it is used and copied.
        output: Directory to write to.
        format: "safetensors" writes weights and a config.json; "open_clip" what
            open_clip.create_model("local-dir:OUTPUT") loads; "torch_export" and "onnx" a program of one task from
            images and tokens to logits, for batches of any size.
        task: The program's task; by default that of words.json.
        threads: CPU threads; 0 takes what torch chooses.
    """

    model: Path
    output: Path
    format: Literal["safetensors", "open_clip", "torch_export", "onnx"] = "safetensors"
    task: Task | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        refuse_below(0, self, "threads")


@dataclass(frozen=True)
class CaptionConfig:
    """Captions images with the student of a captioning run: `caption image.png --run runs/distill`.

    Attributes:
        image: Image files: JPEG, PNG, WebP, GIF, BMP, TIFF.
        run: Directory of a finished run.
        generation: How words are chosen.
        device: Where the student works, such as "cpu" or "cuda"; null takes the GPU if there is one.
    """

    image: list[Path]
    run: Path = Path("runs/distill")
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    device: str | None = None


@dataclass(frozen=True)
class AnswerConfig:
    """Answers a question about an image, or judges a statement: `answer image.png --run runs/vqa --text "..."`.

    Attributes:
        image: The image file; two for nlvr2.
        text: The question (vqa), statement (nlvr2) or hypothesis (snli_ve).
        run: Directory of a finished run.
        show: Most answers that are shown, most probable first.
        device: Where the student works, such as "cpu" or "cuda"; null takes the GPU if there is one.
    """

    image: list[Path]
    text: str
    run: Path = Path("runs/distill")
    show: int = 3
    device: str | None = None

    def __post_init__(self) -> None:
        refuse_below(1, self, "show")


@dataclass(frozen=True)
class ReportConfig:
    """Writes report.html anew, the page of a comparison, or one that sets several runs side by side.

    Attributes:
        run: Run directory of a finished distillation, or several: `report runs/a runs/b`; or the directory of a
            `compare`, whose finished runs are drawn.
        output: The page to write; of one run it is report.html in its directory, of a comparison comparison.html in
            its own, of several runs side_by_side.html here.
    """

    run: list[Path]
    output: Path | None = None

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run must name one run directory or more: `report runs/distill`")
        for path in self.run:
            if not path.is_dir():
                raise ValueError(f"run directory {path} does not exist; give one that `distill` wrote")


@dataclass(frozen=True)
class WatchConfig:
    """Serves the report of a run while it goes on, on this machine alone: `watch runs/distill`.

    Attributes:
        run: The run directory.
        port: Port of 127.0.0.1; 0 takes a free one.
        every: Seconds after which the page looks again, until the run has ended.
    """

    run: list[Path]
    port: int = 8765
    every: int = 5

    def __post_init__(self) -> None:
        refuse_below(1, self, "every")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be within 0..65535, got {self.port}")
        if len(self.run) != 1:
            raise ValueError(f"run must name one run directory: `watch runs/distill`, got {len(self.run)}")
        if not self.run[0].is_dir():
            raise ValueError(f"run directory {self.run[0]} does not exist; give one that `distill` writes to")


@dataclass(frozen=True)
class DemoConfig:
    """Tries a run's student beside its teacher in a browser on this machine: `demo runs/distill`.

    Attributes:
        run: Directory of a finished run.
        port: Port of 127.0.0.1; 0 takes a free one.
        device: Where both work, such as "cpu" or "cuda"; null takes the GPU if there is one.
    """

    run: list[Path]
    port: int = 8766
    device: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be within 0..65535, got {self.port}")
        if len(self.run) != 1:
            raise ValueError(f"run must name one run directory: `demo runs/distill`, got {len(self.run)}")


@dataclass(frozen=True)
class DoctorConfig:
    """What to look at.

    Attributes:
        check: Also run the Triton kernels of every loss on this GPU and compare them with the reference; takes a
            minute.
    """

    check: bool = False


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What comparisons of methods have in common.

    Attributes:
        run: Directory of the comparison. What is finished there is kept and what was interrupted goes on, so the same
            command continues; more tasks, methods and seeds may be asked for later.
        seeds: Number of seeds, 0, 1, ...; of a seed, all methods share start, data and projections.
        jobs: Runs at once. Give distill.threads too: threads times jobs should not exceed the cores.
    """

    run: Path = Path("runs/compare")
    seeds: int = 5
    jobs: int = 1

    def __post_init__(self) -> None:
        refuse_below(1, self, "seeds", "jobs")

    def refuse_unfit_list(self, name: str) -> None:
        """Raises ValueError if the list of that name is empty, names something twice, or methods without optima."""
        given = getattr(self, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name} must name one or more, each once, got {given}")
        if name == "method" and "optima" not in given:
            raise ValueError(f"method must include optima, which the others are compared with, got {given}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ComparisonConfig):
    """Distils by every method over several seeds and compares the scores.

    Attributes:
        task: The tasks; by default all four, or the one that distill.data serves.
        method: task_loss and task_loss_and_logits distil no layers; all_modules_at_* every module in every round with
            that weight in place of balanced ones, all_modules_evenly balanced, but as strongly at the end as at first;
            only_* one and *_and_* two modules in every round; round_robin one after the other, uniform a random one,
            uniform_subset a random set; discounted_ucb, discounted_thompson and linear_thompson are bandits. optima
            runs the settings under `distill` as they are. All by default.
        split: Where the student is scored. Choose settings by "validation", whose last point of the learning curve
            counts (distill.evaluate_items); report "test" once.
        distill: Settings that all runs share; task, run, seed, resume and quiet are the comparison's.
    """

    task: list[Task] = field(default_factory=lambda: list(TASKS))
    method: list[Method] = field(default_factory=lambda: list(get_args(Method)))
    split: Literal["validation", "test"] = "test"
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unfit_list("task")
        self.refuse_unfit_list("method")
        if self.split == "validation" and not (self.distill.evaluate_every and self.distill.evaluate_items):
            raise ValueError(
                "split validation needs a learning curve; distill.evaluate_every and distill.evaluate_items must be at "
                f"least 1, got {self.distill.evaluate_every} and {self.distill.evaluate_items}"
            )


Chip = Literal["A100", "H100", "B200", "cpu"]
"""What a plan's times are for; the makers' figures of the GPUs are in `optima.commands.plan.predict`."""


@dataclass(frozen=True)
class ClusterConfig:
    """What several GPUs are assumed to stand in. Figures are a direction's, 10^9 bytes a second, if not said otherwise.

    Attributes:
        node: GPUs of a machine.
        nvlink: What a GPU can send to those of its machine; 0 takes the maker's figure of the chip.
        network: What a GPU can send to those of other machines; 50 is a port of 400 Gbit/s a GPU.
        reached: Share of both that collectives are assumed to reach, in (0, 1].
        storage: What a machine can write to, and read from, the checkpoints' disks.
        cores: CPU cores a GPU that load images.
        images_a_core: Images a second that such a core decodes and resizes: about 500 of 480 x 640 pixels, as far as
            can be told from smaller ones (bench/RESULTS.md).
        image_bytes: Bytes of an image's file; COCO's site tells of 18 GB for 118 thousand.
    """

    node: int = 8
    nvlink: float = 0.0
    network: float = 50.0
    reached: float = 0.8
    storage: float = 2.0
    cores: int = 12
    images_a_core: float = 500.0
    image_bytes: int = 160_000

    def __post_init__(self) -> None:
        refuse_below(1, self, "node", "cores", "image_bytes")
        refuse_below(0, self, "nvlink")
        for name in ("network", "storage", "images_a_core"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        if not 0 < self.reached <= 1:
            raise ValueError(f"reached must be in (0, 1], got {self.reached}")


@dataclass(frozen=True)
class ChipConfig:
    """What a plan's step runs on.

    Attributes:
        chip: What the run's whole time is estimated for. Of "cpu" memory is counted as a CPU's step takes it.
        peak: 10^12 operations a second that the chip's arithmetic can do; 0 takes its maker's figure. A CPU has none:
            without one its time is not estimated.
        bandwidth: 10^12 bytes a second of the chip's memory; 0 takes its maker's figure.
        memory: Memory of the GPU that the step must fit, GB.
        utilisation: Share of a chip's peak arithmetic that is assumed to be reached, in (0, 1].
        json: Print the figures as JSON instead of tables.
    """

    chip: Chip = "H100"
    peak: float = 0.0
    bandwidth: float = 0.0
    memory: float = 80.0
    utilisation: float = 0.4
    json: bool = False

    def __post_init__(self) -> None:
        refuse_below(0, self, "peak", "bandwidth")
        if not 0 < self.memory < math.inf:
            raise ValueError(f"memory must be a finite number of GB above 0, got {self.memory}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be in (0, 1], got {self.utilisation}")


@dataclass(frozen=True)
class PlanConfig(ChipConfig, DistillConfig):
    """A distillation: the options, recipes and resolved config.yaml of `distill`, as they are.

    No data set needs to be there, and no weights: `teacher` and `student` may also be names of presets, whose sizes
    count. What bears on neither memory nor the time of a step has no effect.

    Attributes:
        stage: "distill" plans the distillation; "finetune" the finetuning of its teacher before it, with batch_size
            items a step, engine.precision and recompute.
        gpus: GPUs that share the distillation's batches as `parallel` and `shard_over` say.
        cluster: What several GPUs stand in.
    """

    stage: Literal["distill", "finetune"] = "distill"
    gpus: int = 1
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        DistillConfig.__post_init__(self)
        ChipConfig.__post_init__(self)
        refuse_below(1, self, "gpus")
        if self.gpus > 1 and (self.chip == "cpu" or self.stage == "finetune"):
            raise ValueError(f"gpus {self.gpus} share a distillation on GPUs, got chip {self.chip}, stage {self.stage}")
