"""CoCa models as single safetensors files that carry their configuration, and the errors a wrong file deserves."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optima.coca.config import CoCaConfig, HeadSpec, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.image_encoder import Pixels
from optima.coca.model import CoCa
from optima.limits import MAX_HEADS, MAX_METADATA_BYTES
from optima.untrusted import shown
from optima_core.checkpoint import replacing
from optima_core.errors import OptimaError

FORMAT = "optima-coca-1"
_IMAGES = "pictures"  # what the format calls the number of images of a head

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that weights may be stored in, by safetensors' names of them."""


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
        "heads": json.dumps(
            {task: {"classes": spec.classes, _IMAGES: spec.images} for task, spec in model.head_specs.items()}
        ),
    }
    write_safetensors(path, model.state_dict(), metadata, dtype)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Replaces a safetensors file, atomically; `dtype`, one of FLOATS, is that of all its tensors.

    The library's own writer shuffles the metadata, so that equal models would be different files, and holds the whole
    file in memory. This one holds a tensor at a time. A file is the header's length (8 bytes, little endian), the
    header as JSON padded to a multiple of 8, the tensors. Raises OptimaError if it cannot be written.
    """
    kind = next(name for name, known in FLOATS.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            stored = tensors[name].detach().to("cpu", dtype).contiguous()
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
            del stored  # before the next one is made


def load_coca(path: Path) -> CoCa:
    """Reads a model in fp32, on the CPU, in eval mode.

    Raises OptimaError if the file is missing, truncated, not safetensors, of another kind of model, or holds weights
    that are not finite.
    """
    with _opened(path) as file:
        config, heads = _description(file.metadata() or {}, path)
        names = list(file.keys())
        # Shapes are compared before a tensor is read, so that no file can ask for more memory than its model needs.
        _refuse_other_shapes(path, config, heads, {name: file.get_slice(name) for name in names})
        tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
    refuse_not_finite(tensors, f"checkpoint {path}")
    return coca_from_tensors(config, heads, tensors).eval()


def read_config(path: Path) -> CoCaConfig:
    """The configuration in a model file; its weights are not read. Raises OptimaError as `load_coca` does."""
    with _opened(path) as file:
        return _description(file.metadata() or {}, path)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A model file to read; what safetensors and the disk complain of becomes an OptimaError."""
    if not path.is_file():
        raise OptimaError(f"checkpoint {path} does not exist; give the path of a .safetensors file written by OPTIMA")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise OptimaError(
            f"checkpoint {path} is no readable safetensors file ({error}); it may be truncated"
        ) from error


def refuse_not_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises OptimaError that names the first tensor with a NaN or an infinity."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            wrong = int((~torch.isfinite(tensor)).sum())
            raise OptimaError(
                f"{name}: tensor {key} holds {wrong} values that are not finite (NaN or infinite); "
                "the training that wrote it had failed"
            )


def _description(metadata: Mapping[str, str], path: Path) -> tuple[CoCaConfig, dict[str, HeadSpec]]:
    """Configuration and heads of a model file. Raises OptimaError if the metadata are not what `save_coca` writes."""
    if metadata.get("format") != FORMAT:
        raise OptimaError(
            f"checkpoint {path} is not an OPTIMA CoCa model: "
            f"its format is {metadata.get('format')!r:.80}, expected {FORMAT!r}"
        )
    try:
        for name in ("config", "heads"):
            if len(metadata[name]) > MAX_METADATA_BYTES:
                raise ValueError(f"{name} has {len(metadata[name])} bytes; {MAX_METADATA_BYTES} are the most")
        specs = json.loads(metadata["heads"])
        if len(specs) > MAX_HEADS:
            raise ValueError(f"{len(specs)} heads; {MAX_HEADS} are the most")
        heads = {task: HeadSpec(spec["classes"], spec.get(_IMAGES, 1)) for task, spec in specs.items()}
        return config_from_dict(json.loads(metadata["config"])), heads
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = shown(" ".join(str(error).split()))
        raise OptimaError(f"checkpoint {path} holds no configuration that this version can read ({reason})") from error


def _refuse_other_shapes(
    path: Path, config: CoCaConfig, heads: Mapping[str, HeadSpec], slices: Mapping[str, Any]
) -> None:
    try:
        expected = shapes(config, heads)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OptimaError(f"checkpoint {path} describes no model that can be built ({shown(error)})") from error
    found = {name: list(part.get_shape()) for name, part in slices.items()}
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            raise OptimaError(
                f"checkpoint {path} does not fit its own configuration: "
                f"tensor {shown(name)} has shape {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            )
        kind = slices[name].get_dtype()
        if kind not in FLOATS:
            raise OptimaError(f"checkpoint {path}: tensor {name} is of type {kind}; {' or '.join(FLOATS)} is wanted")


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
