"""Weights in and out: `import` reads an open_clip CoCa, `export` writes a model for open_clip."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save

from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.config import ClassMask, CoCaConfig
from optima.coca.open_clip import from_open_clip, read_state_dict, to_open_clip
from optima.coca.open_clip_config import open_clip_config, read_open_clip_config
from optima.coca.presets import preset
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
"""What open_clip looks for in a `local-dir:` model."""


@dataclass(frozen=True)
class ImportConfig:
    """Turns an open_clip CoCa checkpoint into a model file of ours.

    Attributes:
        checkpoint: The checkpoint: .safetensors, .bin, .pt or .pth.
        output: The file to write (.safetensors).
        preset: Name of the model's configuration, such as coca_ViT-L-14.
        model_config: open_clip's JSON configuration of the model, in place of a preset; with neither, an
            open_clip_config.json beside the checkpoint is taken.
        class_mask: What the text tower's CLS token sees. All open_clip models, released ones too, were trained with
            the "shifted" mask; "exact" is right for weights that were trained with a corrected one.
        image_size: Picture side that the model is to take, pixels; its position embeddings are interpolated. 0 keeps
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
    """Writes a model as open_clip loads it: `open_clip.create_model("local-dir:OUTPUT")`.

    Attributes:
        model: The model, a .safetensors file of ours.
        output: Directory that open_clip_model.safetensors and open_clip_config.json are written to.
    """

    model: Path
    output: Path


def run_import(config: ImportConfig) -> None:
    """Imports a checkpoint and prints what became of every tensor."""
    shape = _shape(config)
    text = replace(shape.text_decoder, class_mask=config.class_mask)
    image = replace(shape.image_encoder, image_size=config.image_size or shape.image_encoder.image_size)
    shape = replace(shape, text_decoder=text, image_encoder=image)
    tensors = read_state_dict(config.checkpoint)
    name = f"checkpoint {config.checkpoint}"
    model, account = from_open_clip(tensors, shape, name, resize=bool(config.image_size))
    save_coca(model, config.output)
    print(f"{account}\nwrote {config.output}")


def run_export(config: ExportConfig) -> None:
    """Exports a model and says what open_clip will not do as we do."""
    model = load_coca(config.model)
    tensors, description = to_open_clip(model), open_clip_config(model.config)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / WEIGHTS_NAME, save(tensors, {"format": "pt"}))
    write_atomically(config.output / CONFIG_NAME, (json.dumps(description, indent=2) + "\n").encode())
    print(f"wrote {config.output / WEIGHTS_NAME}, {len(tensors)} tensors, and {config.output / CONFIG_NAME}")
    if model.head_specs:
        print(f"left out, since open_clip has no task heads: {', '.join(model.head_specs)}")
    if model.config.text_decoder.class_mask == "exact":
        print(
            "open_clip's text features will differ on padded texts unless you set model.text.correct_cls_mask = True, "
            "which its configuration cannot say"
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
