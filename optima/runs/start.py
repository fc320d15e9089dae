"""Where a run's student starts: made once, on the teacher's device, and kept as start.safetensors."""

import torch

from optima.assets import STUDENT
from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.language import config_in
from optima.coca.presets import PRESETS, is_preset, preset
from optima.coca.start import project_teacher, truncate_teacher
from optima.runs.config import DistillConfig
from optima.runs.directory import START, RunDirectory
from optima.tasks.data import TaskData, head_spec
from optima.tasks.fit import refuse_misfit
from optima_core.errors import OptimaError
from optima_core.precision import arithmetic


def find_start(
    config: DistillConfig, teacher: CoCa, data: TaskData, directory: RunDirectory | None, resumed: bool
) -> CoCa:
    """The student before distillation: of a resumed run the one that its directory holds, else made and put there."""
    path = directory.path / START if directory is not None else None
    device = teacher.logit_scale.device
    if path is not None and resumed and path.exists():
        return load_coca(path).to(device)
    start = make_start(config, teacher, data)
    if path is not None:
        save_coca(start, path)
    return start


def make_start(config: DistillConfig, teacher: CoCa, data: TaskData) -> CoCa:
    """The student before distillation, on the teacher's device; it gets a fresh head if the task needs one.

    Raises OptimaError or ValueError if student and teacher do not fit the data or each other.
    """
    path = config.student or STUDENT
    has_weights = path.exists() or not is_preset(str(path))
    init = config.init or ("checkpoint" if config.student and has_weights else "teacher_pca")
    if init == "checkpoint" and not has_weights:
        raise OptimaError(
            f"student {path} is a preset, which has sizes but no weights; "
            "give --init teacher_pca, teacher_truncate or scratch, or the path of weights"
        )
    start = load_coca(path) if has_weights else _sizes(str(path), teacher)
    if config.student is None and init != "checkpoint":
        start = _reading(start, teacher)
    refuse_misfit(start, f"student {path}", data)
    ours, theirs = start.config.text_decoder.vocab_size, teacher.config.text_decoder.vocab_size
    if ours != theirs:
        raise OptimaError(
            f"student has a vocabulary of {ours} tokens and the teacher one of {theirs}; they must be equal"
        )
    head = head_spec(data)
    missing = {data.task: head} if head is not None and data.task not in start.head_specs else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = CoCa(start.config, start.head_specs | missing)
    device = teacher.logit_scale.device
    student.to(device)
    if init == "checkpoint":
        student.load_state_dict(student.state_dict() | start.state_dict())
    elif init == "teacher_truncate":
        truncate_teacher(student, teacher, config.layer_map)
    elif init == "teacher_pca":
        batch = data.training_batch(0, config.init_items)
        with arithmetic(config.engine.precision, device):  # of the teacher's forward pass; what is in float64 stays so
            project_teacher(student, teacher, batch.images, batch.tokens, config.layer_map)
    return student.eval()


def _sizes(name: str, teacher: CoCa) -> CoCa:
    """A model of the preset's sizes, without weights."""
    patch = teacher.config.image_encoder.patch_size
    fitting = [known.rpartition("-")[2] for known in PRESETS if known.startswith(f"{name}-")]
    if name not in PRESETS and str(patch) not in fitting:
        raise OptimaError(
            f"student {name} has patches of {', '.join(fitting)} pixels, the teacher's have {patch}; "
            "give the path of weights, or another --teacher"
        )
    with torch.device("meta"):
        return CoCa(preset(name, teacher.config))


def _reading(start: CoCa, teacher: CoCa) -> CoCa:
    """A model of the same sizes but for the teacher's vocabulary and length of texts, without weights."""
    text = teacher.config.text_decoder
    config = config_in(start.config, text.vocab_size, text.context_length, text.pad_id)
    with torch.device("meta"):
        return CoCa(config, start.head_specs)
