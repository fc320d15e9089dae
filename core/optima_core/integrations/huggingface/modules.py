"""Which parts a model of transformers has, and which layers each: read from what it is made of.

A part is a list of transformers' layers (they share a base class) that holds no other such list, or a projector between
two parts. Its name says what it reads: vision, audio, text, language; encoder, decoder.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from optima_core.integrations.huggingface.attention import pretrained

_READS = {
    "vision": "vision",
    "visual": "vision",
    "image": "vision",
    "audio": "audio",
    "speech": "audio",
    "qformer": "qformer",
    "perceiver": "resampler",
    "resampler": "resampler",
    "language": "language",
    "text": "text",
}
"""Word of a path -> name of the part."""

_INPUTS = {"pixel_values": "vision", "input_features": "audio", "input_values": "audio"}
"""First argument of a model -> what it reads, where its path does not say."""

_PROJECTORS = ("multi_modal_projector", "connector", "merger", "language_projection")


@dataclass(frozen=True)
class FoundModule:
    """A part of a model.

    layers: dotted paths of its layers from the model, in order. kind: class of its layers.
    """

    name: str
    layers: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.name}: {len(self.layers)} x {self.kind}, {self.layers[0]}" + (
            f" to {self.layers[-1].rpartition('.')[2]}" if len(self.layers) > 1 else ""
        )


def find_modules(model: nn.Module) -> dict[str, FoundModule]:
    """The parts of a model by name, in the order in which it holds them. Raises OptimaError for a foreign model."""
    whole = pretrained(model)
    stacks = {path: found for path, found in model.named_modules() if _is_stack(found)}
    inner = {path: found for path, found in stacks.items() if not any(_is_inside(other, path) for other in stacks)}
    projectors = {
        path: found
        for path, found in model.named_modules()
        if path.rpartition(".")[2] in _PROJECTORS and not any(_is_inside(path, stack) for stack in stacks)
    }
    names = {path: _name(model, path, whole) for path in inner} | dict.fromkeys(projectors, "projector")
    found_modules = {}
    layers: tuple[str, ...]
    for path, name in _told_apart(names).items():
        if path in projectors:
            layers, kind = (path,), type(projectors[path]).__name__
        else:
            layers = tuple(f"{path}.{number}" for number, _ in inner[path].named_children())
            kind = type(next(inner[path].children())).__name__
        found_modules[name] = FoundModule(name, layers, kind)
    return found_modules


def _is_stack(module: nn.Module) -> bool:
    layers = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    return is_list and bool(layers) and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def _is_inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _name(model: nn.Module, path: str, whole: PreTrainedModel) -> str:
    for word, name in _READS.items():
        if word in path:
            return "language" if name == "text" and whole.can_generate() else name
    owner = _owner(model, path)
    reads = _INPUTS.get(owner.main_input_name)
    if reads and not owner.config.is_encoder_decoder and not whole.config.is_encoder_decoder:
        return reads
    for side in ("decoder", "encoder"):
        if side in path:
            return side
    return reads or "language"


def _owner(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost model of transformers that holds the path."""
    places = [path.rsplit(".", i)[0] if i else path for i in range(path.count(".") + 1)] + [""]
    found = (model.get_submodule(place) for place in places)
    return next(module for module in found if isinstance(module, PreTrainedModel))


def _told_apart(names: dict[str, str]) -> dict[str, str]:
    """Parts of one name get their side, or else a number, behind it."""
    for tell in (lambda path, _: "encoder" if "encoder" in path else "decoder", lambda _, place: str(place)):
        counts = Counter(names.values())
        seen: Counter[str] = Counter()
        for path, name in names.items():
            if counts[name] > 1:
                names = names | {path: f"{name}_{tell(path, seen[name])}"}
                seen[name] += 1
    return names
