"""Models in and out: `import` reads an open_clip CoCa, `export` writes a model for other programs."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from optima.assets import USE_ONNX
from optima.coca import CoCa
from optima.coca.checkpoint import load_coca, save_coca, write_safetensors
from optima.coca.config import CoCaConfig
from optima.coca.open_clip import from_open_clip, read_state_dict, to_open_clip
from optima.coca.open_clip_config import open_clip_config, read_open_clip_config
from optima.coca.presets import preset
from optima.commands.options import ExportConfig, ImportConfig
from optima.commands.serving import Served, onnx_program, torch_program
from optima.runs.config import told_in_a_line
from optima.runs.words import NAME as WORDS
from optima.runs.words import Words, words_beside
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
"""What open_clip looks for in a `local-dir:` model."""


def run_import(config: ImportConfig) -> None:
    """Imports a checkpoint and prints what became of every tensor."""
    shape = _shape(config)
    text = replace(shape.text_decoder, class_mask=config.class_mask)
    with told_in_a_line():
        image = replace(shape.image_encoder, image_size=config.image_size or shape.image_encoder.image_size)
        shape = replace(shape, text_decoder=text, image_encoder=image)
    tensors = read_state_dict(config.checkpoint)
    name = f"checkpoint {config.checkpoint}"
    model, account = from_open_clip(tensors, shape, name, resize=bool(config.image_size))
    save_coca(model, config.output)
    print(f"{account}\nwrote {config.output}")


def run_export(config: ExportConfig) -> None:
    """Exports a model and prints what was written."""
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_coca(config.model)
    if config.output.exists() and not config.output.is_dir():
        raise OptimaError(f"output {config.output} is a file; give a directory")
    made = not config.output.exists()
    config.output.mkdir(parents=True, exist_ok=True)
    try:
        written = _EXPORTS[config.format](model, config)
    except OptimaError:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                config.output.rmdir()
        raise
    beside = config.model.with_name(WORDS)
    if beside.is_file() and config.format != "open_clip":
        write_atomically(config.output / WORDS, beside.read_bytes())
        written = [*written, WORDS]
    print(f"wrote {', '.join(str(config.output / name) for name in written)}")


def _export_safetensors(model: CoCa, config: ExportConfig) -> list[str]:
    path = config.output / "model.safetensors"
    save_coca(model, path)
    _refuse_other_weights(path, load_coca(path).state_dict(), model)
    description = {"config": asdict(model.config), "heads": {t: asdict(s) for t, s in model.head_specs.items()}}
    write_atomically(config.output / "config.json", (json.dumps(description, indent=2) + "\n").encode())
    return [path.name, "config.json"]


def _export_open_clip(model: CoCa, config: ExportConfig) -> list[str]:
    """Also prints what open_clip will not do as we do."""
    path = config.output / WEIGHTS_NAME
    write_safetensors(path, to_open_clip(model), {"format": "pt"})
    again, _ = from_open_clip(read_state_dict(path), model.config, f"checkpoint {path}")
    _refuse_other_weights(path, again.state_dict(), model)
    description = json.dumps(open_clip_config(model.config), indent=2) + "\n"
    write_atomically(config.output / CONFIG_NAME, description.encode())
    if model.head_specs:
        print(f"left out, since open_clip has no task heads: {', '.join(model.head_specs)}")
    if model.config.text_decoder.class_mask == "exact":
        print(
            "open_clip's text features will differ on padded texts unless you set model.text.correct_cls_mask = True, "
            "which its configuration cannot say"
        )
    return [path.name, CONFIG_NAME]


def _export_torch(model: CoCa, config: ExportConfig) -> list[str]:
    write_atomically(config.output / "model.pt2", torch_program(*_served(model, config)))
    return ["model.pt2"]


def _export_onnx(model: CoCa, config: ExportConfig) -> list[str]:
    served, length, words = _served(model, config)
    write_atomically(config.output / "model.onnx", onnx_program(served, length, words))
    if words is None:
        return ["model.onnx"]
    write_atomically(config.output / "use.py", USE_ONNX.read_bytes())
    return ["model.onnx", "use.py"]


_EXPORTS: dict[str, Callable[[CoCa, ExportConfig], list[str]]] = {
    "safetensors": _export_safetensors,
    "open_clip": _export_open_clip,
    "torch_export": _export_torch,
    "onnx": _export_onnx,
}


def _served(model: CoCa, config: ExportConfig) -> tuple[Served, int, Words | None]:
    """The model doing its task, the length of its texts, and the words beside it."""
    length = model.config.text_decoder.context_length
    task, words = config.task, words_beside(config.model)
    if words is not None:
        length, task = words.text_length, task or words.task
    if task is None:
        raise OptimaError(f"no {WORDS} beside {config.model} tells the program's task; give --task")
    if task != "captioning" and task not in model.head_specs:
        raise OptimaError(
            f"model {config.model} has no head for {task}; it has {', '.join(model.head_specs) or 'none'}"
        )
    return Served(model, task), length, words


def _refuse_other_weights(path: Path, written: Mapping[str, Tensor], model: CoCa) -> None:
    """The heads, which open_clip lacks, are not looked at."""
    for name, tensor in model.state_dict().items():
        if not name.startswith("heads.") and not torch.equal(written[name], tensor):
            raise OptimaError(
                f"{path} was read back and its tensor {name} differs from the model's; the disk is faulty"
            )


def _shape(config: ImportConfig) -> CoCaConfig:
    if config.preset is not None:
        return preset(config.preset)
    beside = config.checkpoint.with_name(CONFIG_NAME)
    if config.model_config is None and not beside.is_file():
        raise OptimaError(
            f"no configuration for {config.checkpoint}: give --preset, or --model_config with open_clip's JSON file"
        )
    return read_open_clip_config(config.model_config or beside)
