"""Weights on disk: a round trip, and every way a file can be wrong."""

import ctypes
import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optima.coca.checkpoint import FORMAT, config_from_dict, load_coca, read_config, save_coca, write_safetensors
from optima.coca.config import CoCaConfig
from optima_core import OptimaError


def test_a_round_trip_is_exact(make_coca, tmp_path: Path, seed: int) -> None:
    model = make_coca(16, 2, pooler_queries=4)
    save_coca(model, tmp_path / "model.safetensors")
    loaded = load_coca(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert loaded.head_specs == model.head_specs
    assert not loaded.training
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_equal_models_are_equal_files(make_coca, tmp_path: Path, seed: int) -> None:
    model = make_coca()
    for name in "abcdef":
        save_coca(model, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1
    # What another reader sees in it.
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_a_file_is_written_with_the_memory_of_one_tensor(tmp_path: Path, seed: int) -> None:
    # glibc keeps what large blocks it was given back, the more the larger they were, unless it is told from what size.
    ctypes.CDLL(None).mallopt(-3, 2**20)
    part = 2**24
    tensors = {f"part {i}": torch.randn(part // 4) for i in range(8)} | {"scalar": torch.randn(())}
    first = {"part": tensors["part 0"]}
    write_safetensors(tmp_path / "first", first, {}, torch.float16)  # what libraries keep from a first call
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    write_safetensors(tmp_path / "all", tensors, {"format": "any"}, torch.float16)
    assert resident("VmHWM") - before < 1.5 * part
    read = load_file(tmp_path / "all")
    assert all(torch.equal(tensor.half(), read[name]) for name, tensor in tensors.items())


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def test_a_configuration_is_read_without_the_weights(make_coca, tmp_path: Path, seed: int) -> None:
    model, path = make_coca(), tmp_path / "model.safetensors"
    save_coca(model, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:end] + b"\xff" * (len(content) - end))  # NaN
    assert read_config(path) == model.config
    with pytest.raises(OptimaError, match="not finite"):
        load_coca(path)
    with pytest.raises(OptimaError, match="does not exist"):
        read_config(tmp_path / "nowhere")


def test_half_precision_is_stored_when_asked_for_and_read_as_float32(make_coca, tmp_path: Path, seed: int) -> None:
    model = make_coca()
    save_coca(model, tmp_path / "whole.safetensors")
    save_coca(model, tmp_path / "half.safetensors", torch.float16)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.safetensors", "whole.safetensors")]
    assert sizes[0] < 0.7 * sizes[1]
    for name, tensor in load_coca(tmp_path / "half.safetensors").state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptimaError, match=r"nowhere\.safetensors does not exist"):
        load_coca(tmp_path / "nowhere.safetensors")


def test_a_truncated_file_is_refused_wherever_it_ends(make_coca, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.safetensors"
    save_coca(make_coca(), path)
    whole = path.read_bytes()
    for length in [0, 4, 8, len(whole) - 1, *random.Random(seed).sample(range(len(whole)), 5)]:
        path.write_bytes(whole[:length])
        with pytest.raises(OptimaError, match="no readable safetensors") as caught:
            load_coca(path)
        assert "\n" not in str(caught.value), length


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("these are not weights, and never were\n" * 10)
    with pytest.raises(OptimaError, match="no readable safetensors"):
        load_coca(tmp_path / "text.safetensors")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(OptimaError, match="no readable safetensors"):
        load_coca(tmp_path / "pickle.safetensors")
    save_file({"weights": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(OptimaError, match="is not an OPTIMA CoCa model"):
        load_coca(tmp_path / "foreign.safetensors")


def rewrite(path: Path, change) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def other_width(metadata: dict[str, str], _: object) -> None:
    config = json.loads(metadata["config"])
    config["image_encoder"]["width"] = 32
    metadata["config"] = json.dumps(config)


def unknown_field(metadata: dict[str, str], _: object) -> None:
    config = json.loads(metadata["config"])
    config["text_decoder"]["flavour"] = "sweet"
    metadata["config"] = json.dumps(config)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (other_width, "tensor image_encoder.* has shape .*16.*expected .*32"),
        (unknown_field, "no configuration that this version can read.*flavour"),
        (lambda metadata, _: metadata.update(config="{"), "no configuration that this version can read"),
        (lambda metadata, _: metadata.pop("heads"), "no configuration that this version can read"),
        (lambda _, tensors: tensors.pop("logit_scale"), "tensor logit_scale has shape missing"),
        (lambda _, tensors: tensors.update(extra=torch.zeros(1)), r"tensor extra has shape \[1\], expected none"),
        (lambda metadata, _: metadata.update(format="optima-coca-99"), f"expected '{FORMAT}'"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(make_coca, tmp_path: Path, change, complaint: str) -> None:
    path = tmp_path / "model.safetensors"
    save_coca(make_coca(), path)
    rewrite(path, change)
    with pytest.raises(OptimaError, match=complaint) as caught:
        load_coca(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_configuration_in_the_file_is_the_models(make_coca, tmp_path: Path) -> None:
    model = make_coca()
    save_coca(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert config_from_dict(json.loads(file.metadata()["config"])) == model.config


def described(change) -> dict[str, str]:
    config = dataclasses.asdict(CoCaConfig())
    change(config)
    return {"format": FORMAT, "config": json.dumps(config), "heads": "{}"}


@pytest.mark.parametrize(
    "metadata",
    [
        described(lambda config: config["image_encoder"].update(layers=10**6)),
        described(lambda config: config["image_encoder"].update(heads=[4])),
        described(lambda config: config["image_encoder"].update(heads=0)),
        described(lambda config: config["image_encoder"].update(patch_size=0)),
        described(lambda config: config["text_decoder"].update(vocab_size=2**62)),
        described(lambda config: config.update(image_encoder=[1])),
        described(lambda config: config.update(text_decoder=None)),
        {"format": FORMAT, "config": "[" * 100_000, "heads": "{}"},
        {"format": FORMAT, "config": '"' + "a" * 2**20 + '"', "heads": "{}"},
        {"format": FORMAT, "config": "[]", "heads": "{}"},
        described(lambda _: None) | {"heads": "[]"},
        described(lambda _: None) | {"heads": "3"},
        described(lambda _: None) | {"heads": '{"vqa": 3}'},
        described(lambda _: None) | {"heads": '{"vqa": {"classes": -3}}'},
        described(lambda _: None) | {"heads": '{"a.b": {"classes": 3}}'},
        described(lambda _: None) | {"heads": json.dumps({str(i): {"classes": 2} for i in range(99)})},
    ],
)
def test_hostile_metadata_end_in_one_short_line_at_once(metadata: dict[str, str], tmp_path: Path) -> None:
    save_file({"weights": torch.zeros(2)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(OptimaError, match=r"holds no configuration|describes no model|does not fit") as caught:
        load_coca(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_and_its_tensor_named(
    value: float, make_coca, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "model.safetensors"
    model = make_coca()
    names = sorted(name for name, tensor in model.state_dict().items() if tensor.ndim)
    name = random.Random(seed).choice(names)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = value
    save_coca(model, path)
    with pytest.raises(OptimaError, match=rf"tensor {re.escape(name)} holds 1 values that are not finite"):
        load_coca(path)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    kind: torch.dtype, make_coca, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "model.safetensors"
    save_coca(make_coca(), path)
    rewrite(path, lambda _, tensors: tensors.update(logit_scale=tensors["logit_scale"].to(kind)))
    with pytest.raises(OptimaError, match="tensor logit_scale is of type"):
        load_coca(path)
