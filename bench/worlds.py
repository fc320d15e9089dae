"""Settings in which choosing might pay, as files that any command takes: `python -m bench.worlds FOLDER`.

Each is a YAML file for --config beside the weights that it names:

    optima --config FOLDER/spoilt_multimodal_decoder.yaml --task vqa
    optima compare --config FOLDER/compare_spoilt_multimodal_decoder.yaml --task vqa

plain: teacher and start of the default run. spoilt_MODULE: that module of the teacher has its layers in reverse.
teachers_image_encoder: the student has the teacher's image encoder. shipped_start: it starts from the shipped weights.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from optima.assets import STUDENT, TEACHER
from optima.coca import MODULES, CoCa
from optima.coca.checkpoint import load_coca, save_coca

_SPOILT = "spoilt_"
WORLDS = ("plain", *(f"{_SPOILT}{module}" for module in MODULES), "teachers_image_encoder", "shipped_start")


def options(world: str, folder: Path) -> dict[str, Any]:
    """Where options of `optima distill` differ from their defaults; the weights that they name are put in `folder`."""
    if world.startswith(_SPOILT):
        teacher = load_coca(TEACHER)
        _reverse_layers(getattr(teacher, world.removeprefix(_SPOILT)))
        return {"teacher": _saved(teacher, folder / f"{world}.safetensors")}
    if world == "teachers_image_encoder":
        sizes, image_encoder = load_coca(STUDENT), load_coca(TEACHER).config.image_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mixed = CoCa(replace(sizes.config, image_encoder=image_encoder), sizes.head_specs)
        # Streams of equal widths are copied: the image encoder becomes the teacher's, weight by weight.
        return {"student": _saved(mixed, folder / f"{world}.safetensors"), "init": "teacher_pca"}
    if world == "shipped_start":
        return {"student": str(STUDENT), "init": "checkpoint"}
    return {}


def words(world: str, folder: Path) -> list[str]:
    """`options` as words of a command line."""
    return [word for name, value in options(world, folder).items() for word in (f"--{name}", value)]


def _saved(model: CoCa, path: Path) -> str:
    save_coca(model, path)
    return str(path.resolve())


def _reverse_layers(module: nn.Module) -> None:
    """The last layer's weights become the first's."""
    layers = next(child for child in module.children() if isinstance(child, nn.ModuleList))
    weights = [copy.deepcopy(layer.state_dict()) for layer in layers]
    for layer, state in zip(layers, reversed(weights), strict=True):
        layer.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for world in WORLDS:
        found = options(world, folder)
        for name, content in (
            (world, found | {"run": f"runs/{world}"}),
            (f"compare_{world}", {"run": f"runs/compare_{world}", "distill": found}),
        ):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        print(folder / f"{world}.yaml")


if __name__ == "__main__":
    main()
