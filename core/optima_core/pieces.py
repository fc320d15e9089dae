"""Tensors in files, in pieces, however they are spread over ranks; and read back as another number of ranks needs them.

torch.distributed.checkpoint plans which rank writes which piece (of what all ranks hold alike, a share), and which
pieces a rank must read. The files are of safetensors: nothing in them is ever unpickled. torch's own writer of them is
not used, since it makes bytes of a whole file first, and neither syncs nor digests it.

Its modules are imported where they are used: that takes half a second, which many commands should not wait for.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from optima_core.parallel import Ranks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan

_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls types."""

_AT_ONCE = 2**23
"""Bytes that are copied and written at once; three such copies are there at the most: made, written, and digested."""

_TYPES = {kind: dtype for dtype, kind in _KINDS.items()}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the number of the file that holds it."""

    file: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """A tensor in files. Raises ValueError if the pieces cannot be those of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in self.pieces:
            ends = [first + size for first, size in zip(piece.offsets, piece.shape, strict=True)]
            bounds = zip(piece.offsets, piece.shape, ends, self.shape, strict=True)
            if any(min(first, size) < 0 or end > whole for first, size, end, whole in bounds):
                raise ValueError(f"a piece of {piece.shape} at {piece.offsets} is outside a tensor of {self.shape}")
        if sum(math.prod(piece.shape) for piece in self.pieces) != math.prod(self.shape):
            raise ValueError(f"the pieces of a tensor of {self.shape} do not make it up")

    def described(self) -> dict[str, Any]:
        """The same for JSON."""
        pieces = [[piece.file, piece.offsets, piece.shape] for piece in self.pieces]
        return {"type": _KINDS[self.dtype], "shape": self.shape, "pieces": pieces}


def pieces_from(found: dict[str, Any], files: int) -> Pieces:
    """The inverse of `Pieces.described`. Raises ValueError if a piece is in none of so many files."""
    pieces = tuple(Piece(file, tuple(offsets), tuple(shape)) for file, offsets, shape in found["pieces"])
    numbers = [*found["shape"], *(n for piece in pieces for n in (piece.file, *piece.offsets, *piece.shape))]
    if not all(type(number) is int for number in numbers):
        raise ValueError("numbers of files, offsets and sizes must be whole")
    if any(piece.file not in range(files) for piece in pieces):
        raise ValueError(f"there are {files} files, and a piece is in none of them")
    return Pieces(_TYPES[found["type"]], tuple(found["shape"]), pieces)


def split(state: Any, path: tuple[str, ...] = ()) -> tuple[Any, dict[str, Tensor]]:
    """A state as what JSON can hold, with None in the place of tensors; and the tensors by name.

    A name is the keys on the way to the tensor, with slashes between. Tuples become lists.

    Raises ValueError if the state holds anything but tensors, numbers, texts, None, and lists and dicts of them, the
    dicts by text.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            name = "/".join(path)
            if name in tensors:
                raise ValueError(f"a state must not hold two tensors by the name {name}")
            tensors[name] = value.detach()
            return None
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: plain(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner, (*path, str(place))) for place, inner in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(
            f"a state must hold tensors, numbers, texts, and lists and dicts (by text) of them; "
            f"{'/'.join(path)} is {type(value).__name__}"
        )

    return plain(state, path), tensors


def join(tree: Any, tensors: Mapping[str, Tensor], path: tuple[str, ...] = ()) -> Any:
    """The inverse of `split`; tensors that the tree has no place for are left out."""
    if isinstance(tree, dict):
        return {key: join(inner, tensors, (*path, key)) for key, inner in tree.items()}
    if isinstance(tree, list):
        return [join(inner, tensors, (*path, str(place))) for place, inner in enumerate(tree)]
    return tree if tree is not None else tensors.get("/".join(path))


class Planner:
    """Shares the writing of tensors between the ranks; what was agreed on before is not agreed on again."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._own: SavePlan | None = None
        self._plans: list[SavePlan] = []

    def plan(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Pieces]]:
        """What this rank is to write, by the key that it has in the file; and all that the ranks write together.

        All ranks must call this, with tensors of the same names.
        """
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, is_coordinator=self.ranks.first)
        own = planner.create_local_plan()
        if self.ranks.any(own != self._own):
            plans = self.ranks.gather(own)
            self._plans = self.ranks.broadcast(planner.create_global_plan(plans)[0] if self.ranks.first else None)
            self._own = own
        found: dict[str, list[Piece]] = defaultdict(list)
        for file, plan in enumerate(self._plans):
            for item in plan.items:
                assert item.tensor_data is not None  # there are tensors alone
                chunk = item.tensor_data.chunk
                found[item.index.fqn].append(Piece(file, tuple(chunk.offsets), tuple(chunk.sizes)))
        written = {
            _key(item.index.fqn, item.index.offset or ()): planner.resolve_data(item)
            for item in self._plans[self.ranks.rank].items
        }
        assert all(isinstance(piece, Tensor) for piece in written.values())
        layout = {
            name: Pieces(tensors[name].dtype, tuple(tensors[name].shape), tuple(pieces))
            for name, pieces in found.items()
            if name in tensors
        }
        return written, layout  # type: ignore[return-value]


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Writes what safetensors reads, some MiB at a time: no memory is needed for more, wherever the tensors are."""
    # The widest types first, so that each begins at a multiple of its size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {}
    end = 0
    for key in order:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        for part in _parts(tensors[key]):
            file.write(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """A tensor along its first dimension, or where it lies in a row along all of them; parts of some MiB."""
    whole = tensor.reshape(-1) if tensor.is_contiguous() else tensor
    row = math.prod(whole.shape[1:]) * whole.element_size()
    return torch.split(whole, max(1, _AT_ONCE // max(1, row)))


def read_tensors(files: Sequence[Path], saved: Mapping[str, Pieces], targets: dict[str, Tensor]) -> None:
    """Fills the targets, tensors or DTensors on any device, with what is saved by their names.

    Raises ValueError if a target is of another shape than what is saved.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    known = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype),
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)) for piece in tensor.pieces],
        )
        for name, tensor in saved.items()
    }
    places = {(name, piece.offsets): piece.file for name, tensor in saved.items() for piece in tensor.pieces}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(targets, Metadata(dict(known)))
    wanted = defaultdict(list)
    for item in planner.create_local_plan().items:
        wanted[places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]].append(item)
    for number, items in wanted.items():
        with safe_open(files[number], "pt") as file:
            for item in items:
                key = _key(item.storage_index.fqn, item.storage_index.offset or ())
                part = file.get_slice(key)
                if tuple(item.lengths) == tuple(part.get_shape()):
                    found = file.get_tensor(key)
                else:
                    box = zip(item.storage_offsets, item.lengths, strict=True)
                    found = part[tuple(slice(first, first + size) for first, size in box)]
                planner.resolve_tensor(item).detach().copy_(found)


def check_file(path: Path, number: int, saved: Mapping[str, Pieces]) -> None:
    """Raises ValueError if the file lacks a piece that it is said to hold, or has it of another type or shape."""
    with safe_open(path, "pt") as file:
        held = set(file.keys())
        for name, tensor in saved.items():
            for piece in tensor.pieces:
                key = _key(name, piece.offsets)
                if piece.file != number:
                    continue
                if key not in held:
                    raise ValueError(f"{path.name} lacks {key}")
                part = file.get_slice(key)
                if tuple(part.get_shape()) != piece.shape or part.get_dtype() != _KINDS[tensor.dtype]:
                    raise ValueError(f"{path.name} holds {key} of another shape")


def _key(name: str, offsets: Sequence[int]) -> str:
    """What a piece is called in its file: by its tensor, and by where it begins unless that is the beginning."""
    return f"{name}@{','.join(map(str, offsets))}" if any(offsets) else name
