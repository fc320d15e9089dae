"""CoCa models as single safetensors files that carry their configuration, and the errors a wrong file deserves."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from optima.coca.config import CoCaConfig, HeadSpec, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.image_encoder import Pixels
from optima.coca.model import CoCa
from optima_core.checkpoint import write_atomically
from optima_core.errors import OptimaError

FORMAT = "optima-coca-1"


def config_from_dict(values: dict[str, Any]) -> CoCaConfig:
    """The inverse of dataclasses.asdict for CoCaConfig."""
    image = dict(values["image_encoder"])
    for name in ("mean", "std"):  # JSON has no tuples
        image[name] = tuple(image.get(name, getattr(ImageEncoderConfig, name)))  # absent from older files
    return CoCaConfig(
        embed_dim=values["embed_dim"],
        image_encoder=ImageEncoderConfig(**image),
        text_decoder=TextDecoderConfig(**values["text_decoder"]),
        multimodal_decoder=MultimodalDecoderConfig(**values["multimodal_decoder"]),
    )


def save_coca(model: CoCa, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes weights, configuration and head specifications into one file; `dtype` is that of the stored weights."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "heads": json.dumps({task: dataclasses.asdict(spec) for task, spec in model.head_specs.items()}),
    }
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, _canonical(save(tensors, metadata)))


def _canonical(content: bytes) -> bytes:
    """The same file with its header in sorted order: safetensors shuffles the metadata, so equal models would differ.

    A file is the header's length (8 bytes, little endian), the header as JSON padded to a multiple of 8, the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def load_coca(path: Path) -> CoCa:
    """Reads a model in fp32, on the CPU, in eval mode.

    Raises OptimaError if the file is missing, truncated, not safetensors, or of another kind of model.
    """
    if not path.is_file():
        raise OptimaError(f"checkpoint {path} does not exist; give the path of a .safetensors file written by OPTIMA")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise OptimaError(
            f"checkpoint {path} is no readable safetensors file ({error}); it may be truncated"
        ) from error
    if metadata.get("format") != FORMAT:
        raise OptimaError(
            f"checkpoint {path} is not an OPTIMA CoCa model: "
            f"its format is {metadata.get('format')!r}, expected {FORMAT!r}"
        )
    try:
        heads = {task: HeadSpec(**spec) for task, spec in json.loads(metadata["heads"]).items()}
        config = config_from_dict(json.loads(metadata["config"]))
        expected = shapes(config, heads)
    except (KeyError, TypeError, ValueError) as error:
        raise OptimaError(f"checkpoint {path} holds no configuration that this version can read ({error})") from error
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            raise OptimaError(
                f"checkpoint {path} does not fit its own configuration: "
                f"tensor {name} has shape {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            )
    return coca_from_tensors(config, heads, tensors).eval()


def shapes(config: CoCaConfig, heads: Mapping[str, HeadSpec] | None = None) -> dict[str, list[int]]:
    """Name and shape of every weight of such a model, without making one."""
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in CoCa(config, heads).state_dict().items()}


def coca_from_tensors(config: CoCaConfig, heads: Mapping[str, HeadSpec] | None, tensors: Mapping[str, Tensor]) -> CoCa:
    """A model whose weights are these very tensors; nothing is initialised or copied."""
    with torch.device("meta"):
        model = CoCa(config, heads)
    model.load_state_dict(tensors, assign=True)
    model.image_encoder.pixels = Pixels(config.image_encoder)  # constants, which no file holds
    return model
