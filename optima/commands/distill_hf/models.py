"""The models of a distillation, from folders or the Hub, and the student as it is written."""

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from optima_core.errors import OptimaError


def require_transformers() -> None:
    """Raises OptimaError if it is not installed; what it says beside errors is left out from now on."""
    try:
        import transformers
    except ImportError:
        raise OptimaError("transformers is not installed; `pip install transformers datasets`") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(place: str, what: str) -> Any:
    """The model of a folder or name, in the class that its configuration names; without weights it is random.

    Raises OptimaError, saying `what` it was for, if it cannot be loaded.
    """
    with _told(place, what):
        kind, config = _kind(place, what)
        folder = Path(place)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            return kind(config)
        return kind.from_pretrained(place, dtype=torch.float32)


def make_empty(place: str, what: str) -> Any:
    """The model with shapes and no values, on the device "meta". Raises OptimaError as `load_model`."""
    with _told(place, what), torch.device("meta"):
        kind, config = _kind(place, what)
        return kind(config)


def _kind(place: str, what: str) -> tuple[Any, Any]:
    """The class that a configuration names, and the configuration."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(place)
    names = config.architectures or []
    if not names or not hasattr(transformers, names[0]):
        raise OptimaError(f"{what} {place}: its config.json names no class of transformers in architectures")
    return getattr(transformers, names[0]), config


@contextlib.contextmanager
def _told(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise OptimaError(f"{what} {place} cannot be loaded: {_first_line(error)}") from error


def load_processor(place: str) -> Any:
    """The processor of a folder or name, or its tokenizer. Raises OptimaError if there is none."""
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise OptimaError(f"teacher {place} has no processor or tokenizer: {_first_line(error)}") from error


def with_adapters(student: Any, rank: int) -> Any:
    """The student with LoRA adapters of that rank in all its linear layers but the head; the rest is frozen."""
    try:
        import peft
    except ImportError:
        raise OptimaError("lora is on and peft is not installed; `pip install peft`") from None
    return peft.get_peft_model(student, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def recompute_layers(student: Any) -> None:
    """Lets layers keep their inputs alone, and run again in the backward pass."""
    # Its name before transformers 5.21, which later ones deprecate.
    name = "activation_checkpointing_enable"
    enable = getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise OptimaError(f"recompute: {_first_line(error)}") from error


def write_student(student: Any, processor: Any, folder: Path, card: str, push_to: str | None) -> None:
    """What from_pretrained loads: weights, adapters merged, with the processor and the model card.

    The folder is whole whenever it is there. Raises OptimaError if it cannot be written.
    """
    from safetensors import SafetensorError

    whole = copy.deepcopy(student).merge_and_unload() if hasattr(student, "merge_and_unload") else student
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
    try:
        whole.save_pretrained(aside)
        processor.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OptimaError(f"cannot write {folder}: {_first_line(error)}; what was saved before is intact") from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    if push_to is not None:
        from huggingface_hub import HfApi

        HfApi().create_repo(push_to, exist_ok=True)
        HfApi().upload_folder(repo_id=push_to, folder_path=folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
