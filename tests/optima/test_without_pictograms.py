"""Pictograms are one data set among others: without the package, everything but what is theirs works."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WITHOUT = """
import importlib, pkgutil, sys
from pathlib import Path


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "optima.data.pictograms" or name.startswith("optima.data.pictograms."):
            raise ModuleNotFoundError(f"{name} is hidden")


sys.meta_path.insert(0, Hidden())

import optima

# `pretrain` trains on pictograms alone.
THEIRS = ("optima.tasks.pictograms", "optima.commands.pretrain")
OPTIONAL = ("optima.data.dali_engine",)


def walk(path, prefix):
    for found in pkgutil.iter_modules(path, prefix):
        if found.name in (*THEIRS, *OPTIONAL) or found.name == "optima.data.pictograms":
            continue
        module = importlib.import_module(found.name)
        imported.append(found.name)
        if found.ispkg:
            walk(module.__path__, f"{found.name}.")


imported = []
walk(optima.__path__, "optima.")
assert not any("pictograms" in name for name in sys.modules), [name for name in sys.modules if "pictograms" in name]

import torch
from optima.coca import CoCa, CoCaConfig, HeadSpec, TextDecoderConfig
from optima.data.config import DataConfig
from optima.tasks.choose import open_data
from optima.tasks.evaluate import evaluate
from optima.tasks.forward import TaskForward

torch.manual_seed(int(sys.argv[2]))
config = CoCaConfig(text_decoder=TextDecoderConfig(vocab_size=300))
model = CoCa(config, {"nlvr2": HeadSpec(2, 2)})
data = open_data(DataConfig("nlvr2", Path(sys.argv[1]), tokenizer="words", max_unknown=1.0), "nlvr2", config)
loss = TaskForward(model, "nlvr2")(data.training_batch(0, 3), {}).task_loss
data.close()
print(len(imported), loss.isfinite().item(), len(evaluate(model, data, "test").predictions))
"""


@pytest.fixture
def nlvr2(tmp_path: Path, seed: int) -> Path:
    """Four statements a split, about noise."""
    draws = np.random.default_rng(seed)
    for split in ("train", "dev", "test1"):
        rows = []
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for pair in range(4):
            for side in (0, 1):
                pixels = draws.integers(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}-{pair}-0-img{side}.png")
            rows.append({"identifier": f"{split}-{pair}-0-0", "sentence": "a statement", "label": str(pair % 2 == 0)})
        (tmp_path / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_everything_else_works_where_the_package_is_hidden(nlvr2: Path, seed: int) -> None:
    words = [sys.executable, "-c", WITHOUT, str(nlvr2), str(seed)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    modules, finite, predictions = found.stdout.split()[-3:]
    assert int(modules) > 60
    assert finite == "True"
    assert predictions == "4"
