"""open_clip's CoCa checkpoints and configurations, in and out.

The weights are the same in another arrangement, so each of their tensors is rows of ours and the other way round:
`_parts` lists every such correspondence once, and both directions follow it, exactly. What is arranged otherwise:

    theirs                                             ours
    attn.in_proj_weight [3 D, D] of q, k, v            self-attention: qkv.weight; cross-attention: q.weight, kv.weight
    attn.{q,k,v}_proj_weight, where widths differ      q.weight and the halves of kv.weight
    text_decoder.text_projection [D, V]                multimodal_decoder.head.weight [V, D]

open_clip 3.3.0 gives logits at all positions but the last, with labels; its main branch gives them at all positions.
Ours are at all positions, and the one at position i predicts token i + 1. The names are the same in both.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from optima.coca.checkpoint import coca_from_tensors, refuse_not_finite, shapes
from optima.coca.config import CoCaConfig
from optima.coca.model import CoCa
from optima.coca.open_clip_config import open_clip_config
from optima.coca.pickled import load_plain
from optima.untrusted import shown
from optima_core.errors import OptimaError


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a checkpoint that was read.

    Attributes:
        read: Names of the weights that the model now holds.
        constants: Names of causal masks, which older versions of open_clip saved; checked and not kept.
        resized: Names of the position embeddings that were interpolated to another image size.
    """

    read: tuple[str, ...]
    constants: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.read)} tensors read, none missing, none unexpected, none misshapen"]
        if self.constants:
            lines.append(f"causal masks checked and left out: {', '.join(self.constants)}")
        if self.resized:
            lines.append(f"interpolated to the new image size: {', '.join(self.resized)}")
        return "; ".join(lines)


MOST_NAMED = 8
"""Tensors, or kinds of complaint, that an error names; of a checkpoint of another model there are hundreds."""


class _Part(NamedTuple):
    """Rows [start, start + rows) of one of their tensors are rows [our_start, our_start + rows) of one of ours."""

    theirs: str
    start: int
    ours: str
    our_start: int
    rows: int
    transposed: bool = False


def _parts(config: CoCaConfig) -> list[_Part]:
    """Every correspondence between open_clip's tensors and ours, for a model of this configuration."""
    ours = shapes(config)
    found: list[_Part] = []

    def whole(theirs: str, name: str, transposed: bool = False) -> None:
        rows = ours[name][0] if ours[name] else 1
        found.append(_Part(theirs, 0, name, 0, rows, transposed))

    def module(theirs: str, name: str) -> None:
        whole(f"{theirs}.weight", f"{name}.weight")
        whole(f"{theirs}.bias", f"{name}.bias")

    def cross_attention(theirs: str, name: str) -> None:
        width, context = ours[f"{name}.q.weight"][0], ours[f"{name}.kv.weight"][1]
        if width == context:
            found.append(_Part(f"{theirs}.in_proj_weight", 0, f"{name}.q.weight", 0, width))
            found.append(_Part(f"{theirs}.in_proj_weight", width, f"{name}.kv.weight", 0, 2 * width))
        else:
            whole(f"{theirs}.q_proj_weight", f"{name}.q.weight")
            found.append(_Part(f"{theirs}.k_proj_weight", 0, f"{name}.kv.weight", 0, width))
            found.append(_Part(f"{theirs}.v_proj_weight", 0, f"{name}.kv.weight", width, width))
        found.append(_Part(f"{theirs}.in_proj_bias", 0, f"{name}.q.bias", 0, width))
        found.append(_Part(f"{theirs}.in_proj_bias", width, f"{name}.kv.bias", 0, 2 * width))
        module(f"{theirs}.out_proj", f"{name}.out")

    def block(theirs: str, name: str, cross: bool = False) -> None:
        module(f"{theirs}.ln_1", f"{name}.norm_attention")
        if cross:
            module(f"{theirs}.ln_1_kv", f"{name}.norm_context")
            cross_attention(f"{theirs}.attn", f"{name}.attention")
        else:
            whole(f"{theirs}.attn.in_proj_weight", f"{name}.attention.qkv.weight")
            whole(f"{theirs}.attn.in_proj_bias", f"{name}.attention.qkv.bias")
            module(f"{theirs}.attn.out_proj", f"{name}.attention.out")
        module(f"{theirs}.ln_2", f"{name}.norm_mlp")
        module(f"{theirs}.mlp.c_fc", f"{name}.mlp.0")
        module(f"{theirs}.mlp.c_proj", f"{name}.mlp.2")

    whole("visual.conv1.weight", "image_encoder.patch.weight")
    whole("visual.class_embedding", "image_encoder.class_token")
    whole("visual.positional_embedding", "image_encoder.position")
    if config.image_encoder.norm_input:
        module("visual.ln_pre", "image_encoder.norm_input")
    for i in range(config.image_encoder.layers):
        block(f"visual.transformer.resblocks.{i}", f"image_encoder.blocks.{i}")
    if config.image_encoder.pooler_queries:
        whole("visual.attn_pool.query", "image_encoder.pooler.query")
        module("visual.attn_pool.ln_q", "image_encoder.pooler.norm_query")
        module("visual.attn_pool.ln_k", "image_encoder.pooler.norm_context")
        cross_attention("visual.attn_pool.attn", "image_encoder.pooler.attention")
    module("visual.ln_post", "image_encoder.norm_output")
    whole("visual.proj", "image_encoder.projection")

    whole("text.token_embedding.weight", "text_decoder.token_embedding.weight")
    whole("text.cls_emb", "text_decoder.class_token")
    whole("text.positional_embedding", "text_decoder.position")
    for i in range(config.text_decoder.layers):
        block(f"text.transformer.resblocks.{i}", f"text_decoder.blocks.{i}")
    module("text.ln_final", "text_decoder.norm_output")
    whole("text.text_projection", "text_decoder.projection")

    for i in range(config.multimodal_decoder.layers):
        block(f"text_decoder.resblocks.{i}", f"multimodal_decoder.layers.{i}.self_block")
        block(f"text_decoder.cross_attn.{i}", f"multimodal_decoder.layers.{i}.cross_block", cross=True)
    module("text_decoder.ln_final", "multimodal_decoder.norm_output")
    whole("text_decoder.text_projection", "multimodal_decoder.head.weight", transposed=True)
    whole("logit_scale", "logit_scale")
    return found


def _arrange(parts: Iterable[tuple[str, int, Tensor]]) -> dict[str, Tensor]:
    """(name, first row, rows) -> whole tensors."""
    pieces: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, start, rows in parts:
        pieces[name].append((start, rows))
    return {
        name: found[0][1] if len(found) == 1 else torch.cat([rows for _, rows in sorted(found, key=lambda x: x[0])])
        for name, found in pieces.items()
    }


def _rows(tensor: Tensor, start: int, rows: int) -> Tensor:
    return tensor if not tensor.ndim or len(tensor) == rows else tensor[start : start + rows]


def to_open_clip(model: CoCa) -> dict[str, Tensor]:
    """The weights of a model under open_clip's names; task heads, which it has no place for, are left out.

    Raises OptimaError if open_clip cannot build a model of this shape.
    """
    open_clip_config(model.config)
    weights = model.state_dict()
    found = []
    for part in _parts(model.config):
        rows = _rows(weights[part.ours], part.our_start, part.rows)
        found.append((part.theirs, part.start, rows.T if part.transposed else rows))
    return {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in _arrange(found).items()}


def from_open_clip(
    tensors: Mapping[str, Tensor], config: CoCaConfig, name: str = "checkpoint", *, resize: bool = False
) -> tuple[CoCa, Account]:
    """A model in fp32, on the CPU, in eval mode, from an open_clip state dict in either of its layouts.

    The layouts: all text weights under `text.`, or flat, as CLIP's first checkpoints have them; either may carry the
    prefixes of wrappers (`module.`, `_orig_mod.`).

    Args:
        tensors: the state dict, floating-point tensors of any precision.
        config: the model's configuration.
        name: what messages call the checkpoint.
        resize: whether image positions of another grid are interpolated to the configuration's, as open_clip does.

    Raises:
        OptimaError: naming the first tensors that are missing, unexpected, or of other shapes than the configuration's,
            or the first whose values are not all finite.
    """
    found = _with_text_prefix(_without_wrappers(tensors))
    constants = tuple(sorted(key for key in found if key in ("text.attn_mask", "text_decoder.attn_mask")))
    for key in constants:
        mask = found.pop(key)
        if mask.ndim != 2 or not torch.equal(mask, torch.full_like(mask, -math.inf).triu(1)):
            raise OptimaError(f"{name}: {key} is no causal mask; such a model computes otherwise than CoCa")
    if found.get("logit_scale", torch.empty(())).shape == (1,):
        found["logit_scale"] = found["logit_scale"][0]
    positions = "visual.positional_embedding"
    resized: tuple[str, ...] = ()
    grid = config.image_encoder.image_size // config.image_encoder.patch_size
    if resize and positions in found and len(found[positions]) != grid * grid + 1:
        found[positions] = _resize_positions(found[positions], grid, name)
        resized = (positions,)
    parts = _parts(config)
    _refuse_other_tensors(found, parts, config, name)
    ours = _arrange(
        (
            part.ours,
            part.our_start,
            _rows(found[part.theirs].T if part.transposed else found[part.theirs], part.start, part.rows),
        )
        for part in parts
    )
    weights = {key: tensor.float().contiguous() for key, tensor in ours.items()}
    refuse_not_finite(weights, name)
    model = coca_from_tensors(config, None, weights)
    return model.eval(), Account(tuple(found), constants, resized)


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    for prefix in ("module.", "_orig_mod.", "module."):
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    return found


def _with_text_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = (
        "token_embedding.",
        "positional_embedding",
        "transformer.",
        "ln_final.",
        "text_projection",
        "cls_emb",
        "attn_mask",
    )
    return {f"text.{key}" if key.startswith(flat) else key: tensor for key, tensor in tensors.items()}


def _resize_positions(positions: Tensor, grid: int, name: str) -> Tensor:
    """[1 + g * g, D] -> [1 + grid * grid, D]: the patches' positions by antialiased bicubic interpolation."""
    side = math.isqrt(len(positions) - 1)
    if side * side != len(positions) - 1:
        raise OptimaError(f"{name}: its {len(positions) - 1} image positions are no square grid and cannot be resized")
    patches = positions[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1].float(), patches.permute(0, 2, 3, 1).reshape(grid * grid, -1)])


def _refuse_other_tensors(found: Mapping[str, Tensor], parts: Iterable[_Part], config: CoCaConfig, name: str) -> None:
    ours = shapes(config)
    expected: dict[str, list[int]] = {}
    for part in parts:
        shape = list(ours[part.ours])
        if part.transposed:
            shape.reverse()
        elif shape:
            shape[0] = part.rows + (expected[part.theirs][0] if part.theirs in expected else 0)
        expected[part.theirs] = shape
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen: dict[str, list[str]] = defaultdict(list)
    for key in expected:
        if key in found and list(found[key].shape) != expected[key]:
            misshapen[f" ({list(found[key].shape)}, expected {expected[key]})"].append(key)
    complaints = [
        *([f"missing {_named(missing)}"] if missing else []),
        *([f"unexpected {_named(unexpected)}"] if unexpected else []),
        *(f"misshapen {_named(keys)}{difference}" for difference, keys in misshapen.items()),
    ]
    if complaints:
        more = f"; and {len(complaints) - MOST_NAMED} other shapes" if len(complaints) > MOST_NAMED else ""
        raise OptimaError(f"{name} does not fit the configuration: {'; '.join(complaints[:MOST_NAMED])}{more}")


def _named(names: Sequence[str]) -> str:
    groups = list(_grouped(names))
    more = f" and {len(groups) - MOST_NAMED} more" if len(groups) > MOST_NAMED else ""
    return f"{', '.join(groups[:MOST_NAMED])}{more}"


def _grouped(names: Iterable[str]) -> Iterator[str]:
    """The same names with those that differ in the number of a layer as one: blocks.0-11.ln_1.weight."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        numbers.setdefault(pattern, []).extend([] if number is None else [int(number.group())])
    for pattern, found in numbers.items():
        yield pattern.format(_ranges(sorted(found))) if found else pattern


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of an open_clip checkpoint: .safetensors, or .bin, .pt, .pth, read without running code from it.

    A checkpoint of open_clip's training loop holds them under `state_dict`, beside epoch and optimiser.

    Raises OptimaError if the file is missing, unreadable, or holds something else.
    """
    if not path.is_file():
        raise OptimaError(
            f"checkpoint {path} does not exist; give a .safetensors, .bin, .pt or .pth file of open_clip's"
        )
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except OptimaError as error:
        raise OptimaError(f"checkpoint {path} is refused: {error}; save its state dict alone") from error
    except Exception as error:  # a reader fed with broken bytes raises whatever its first mishap is
        reason = shown(" ".join(str(error).split()) or type(error).__name__)
        raise OptimaError(f"checkpoint {path} cannot be read ({reason}); it may be truncated") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise OptimaError(f"checkpoint {path} holds no state dict")
    odd = [shown(key, 80) for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))]
    if odd:
        raise OptimaError(f"checkpoint {path} holds no state dict: {', '.join(odd[:5])} are no tensors of numbers")
    return dict(content)


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor of real numbers that are all there: a view may claim more than its storage holds."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )
