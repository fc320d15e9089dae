"""open_clip's CoCa: the same outputs, the same weights there and back, and an account of every tensor."""

import argparse
import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_oracle import CASES, MODELS, build, inputs, load_open_clip, outputs, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from optima.coca import MODULES, CoCa
from optima.coca.checkpoint import load_coca, save_coca
from optima.coca.open_clip import from_open_clip, read_state_dict, to_open_clip
from optima.coca.open_clip_config import from_open_clip_config, open_clip_config, read_open_clip_config
from optima.coca.presets import CLIP_MEAN, CLIP_STD, PRESETS, TEACHERS
from optima.run import main
from optima_core import OptimaError


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, open_clip's state dict and open_clip's outputs of a case."""
    path = MODELS / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["config"]), weights(json.loads(metadata["shapes"])), load_file(path)


@pytest.fixture
def theirs() -> dict[str, Tensor]:
    """A small checkpoint of open_clip's, the one that `CASES["pooler"]` describes."""
    return golden("pooler")[1]


CONFIG = from_open_clip_config(CASES["pooler"])


@torch.no_grad()
def ours(model: CoCa, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Our outputs under the names of `open_clip_oracle.outputs`."""
    images = 2 * pixels[:, None] - 1
    wanted = {module: tuple(range(getattr(model.config, module).layers)) for module in MODULES}
    output = model(images, tokens, wanted, with_class=True)
    text = dataclasses.replace(model.config.text_decoder, class_mask="exact")
    exact = CoCa(dataclasses.replace(model.config, text_decoder=text)).eval()
    exact.load_state_dict(model.state_dict())
    return {
        "image_feature": F.normalize(output.image_feature, dim=-1),
        "text_feature": F.normalize(output.text_feature, dim=-1),
        "text_feature_exact": F.normalize(exact(images, tokens, with_class=True).text_feature, dim=-1),
        "logits": model.caption_logits(output.states),
        **{f"{module}.{i}": tap.hidden for module in MODULES for i, tap in enumerate(output.taps[module])},
    }


def assert_equal_outputs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest value; the states of the CLS token count as hidden states, too."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_that_open_clip_gave(name: str) -> None:
    config, state, expected = golden(name)
    assert config == CASES[name]
    model, _ = from_open_clip(state, from_open_clip_config(config))
    assert_equal_outputs(ours(model, *inputs(config)), expected)


@pytest.mark.parametrize("name", [*CASES, "coca_ViT-B-32"])
def test_outputs_are_open_clips_on_fresh_weights(name: str, seed: int) -> None:
    open_clip = load_open_clip()
    config = CASES.get(name) or open_clip.get_model_config(name)
    oracle = build(config)
    with torch.no_grad():
        oracle.text_decoder.text_projection.normal_(std=0.05)  # open_clip leaves it as the memory was
        for parameter in oracle.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model, _ = from_open_clip(oracle.state_dict(), from_open_clip_config(config))
    pixels, tokens = inputs(config)
    assert_equal_outputs(ours(model, pixels, tokens), outputs(oracle, pixels, tokens, CLIP_MEAN, CLIP_STD))


@pytest.mark.parametrize("name", TEACHERS)
def test_presets_are_open_clips_configurations(name: str) -> None:
    config = from_open_clip_config(load_open_clip().get_model_config(name))
    text = dataclasses.replace(config.text_decoder, class_mask="exact")
    assert dataclasses.replace(config, text_decoder=text) == PRESETS[name]


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_bit_for_bit(name: str) -> None:
    config, state, _ = golden(name)
    model, account = from_open_clip(state, from_open_clip_config(config))
    assert set(account.read) == set(state)
    exported = to_open_clip(model)
    assert set(exported) == set(state)
    assert all(torch.equal(exported[key], tensor) for key, tensor in state.items())
    again, _ = from_open_clip(exported, model.config)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert from_open_clip_config(open_clip_config(model.config)) == model.config


def test_both_layouts_wrappers_and_old_buffers_are_understood(theirs: dict[str, Tensor]) -> None:
    expected = from_open_clip(theirs, CONFIG)[0].state_dict()
    mask = torch.full((8, 8), -torch.inf).triu(1)
    flat = {key.removeprefix("text.") if key.startswith("text.") else key: value for key, value in theirs.items()}
    variants = {
        "flat": flat,
        "wrapped": {f"module.{key}": value for key, value in theirs.items()},
        "compiled and wrapped": {f"module._orig_mod.{key}": value for key, value in theirs.items()},
        "masks": theirs | {"text.attn_mask": mask, "text_decoder.attn_mask": mask[:7, :7]},
        "vector scale": theirs | {"logit_scale": theirs["logit_scale"][None]},
    }
    for name, state in variants.items():
        model, account = from_open_clip(state, CONFIG)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items()), name
        assert account.constants == (("text.attn_mask", "text_decoder.attn_mask") if name == "masks" else ())
    with pytest.raises(OptimaError, match=r"text\.attn_mask is no causal mask"):
        from_open_clip(theirs | {"text.attn_mask": torch.zeros(8, 8)}, CONFIG)


def test_half_precision_is_read_as_float32(theirs: dict[str, Tensor]) -> None:
    half = {key: tensor.bfloat16() for key, tensor in theirs.items()}
    model, _ = from_open_clip(half, CONFIG)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, half[key].float()) for key, tensor in to_open_clip(model).items())


def test_every_tensor_that_does_not_fit_is_named_in_one_line(theirs: dict[str, Tensor]) -> None:
    state = dict(theirs)
    del state["text.cls_emb"], state["visual.transformer.resblocks.0.ln_1.bias"]
    del state["visual.transformer.resblocks.1.ln_1.bias"]
    state["text.transformer.resblocks.0.ls_1.gamma"] = torch.zeros(8)
    state["logit_bias"] = torch.zeros(())
    state["visual.proj"] = torch.zeros(8, 9)
    state["text_decoder.text_projection"] = torch.zeros(8, 21)
    with pytest.raises(OptimaError) as caught:
        from_open_clip(state, CONFIG, "checkpoint x.pt")
    assert str(caught.value) == (
        "checkpoint x.pt does not fit the configuration: "
        "missing visual.transformer.resblocks.0-1.ln_1.bias, text.cls_emb; "
        "unexpected text.transformer.resblocks.0.ls_1.gamma, logit_bias; "
        "misshapen visual.proj ([8, 9], expected [8, 8]); "
        "misshapen text_decoder.text_projection ([8, 21], expected [8, 20])"
    )


def test_a_checkpoint_of_another_size_is_refused(theirs: dict[str, Tensor]) -> None:
    with pytest.raises(OptimaError, match=r"missing visual\.transformer\.resblocks\.2-11\.ln_1\.weight.* misshapen"):
        from_open_clip(theirs, PRESETS["coca_ViT-B-32"])
    with pytest.raises(OptimaError, match=r"unexpected visual\.attn_pool\.query"):
        from_open_clip(theirs, from_open_clip_config(CASES["no_pooler"]))


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.safetensors", "training.pt", "named.pt"])
def test_every_kind_of_file_is_read(name: str, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(theirs, path)
    else:
        training = {"epoch": 3, "name": "run", "state_dict": theirs, "optimizer": {"state": {}}}
        torch.save(training if name == "training.pt" else theirs, path)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in read_state_dict(path).items())


def test_unreadable_files_are_refused_in_one_line(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": theirs, "arguments": argparse.Namespace(lr=1)}, tmp_path / "code.pt")
    torch.save({"a": 1, "b": theirs["visual.proj"]}, tmp_path / "mixed.pt")
    torch.save([theirs["visual.proj"]], tmp_path / "list.pt")
    torch.save(theirs, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:1000])
    save_file(theirs, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:1000])
    for name, complaint in {
        "nowhere.pt": "does not exist",
        "code.pt": "holds more than tensors and plain values",
        "mixed.pt": "a are no tensors",
        "list.pt": "holds no state dict",
        "cut.pt": "cannot be read",
        "cut.safetensors": "cannot be read",
    }.items():
        with pytest.raises(OptimaError, match=complaint) as caught:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    ("section", "options", "complaint"),
    [
        ("vision_cfg", {"ls_init_value": 1e-5}, r"vision_cfg\.ls_init_value = 1e-05 is not supported"),
        ("vision_cfg", {"attentional_pool": "cascade"}, "attentional_pool = 'cascade' is not supported"),
        ("vision_cfg", {"timm_model_name": "vit"}, r"vision_cfg\.timm_model_name = 'vit' is not supported"),
        ("vision_cfg", {"pool_type": "avg"}, r"vision_cfg\.pool_type = 'avg' is not supported"),
        ("vision_cfg", {"image_size": [224, 288]}, r"vision_cfg\.image_size must be a whole number"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, r"vision_cfg\.layers must be a whole number"),
        ("text_cfg", {"embed_cls": False}, r"text_cfg\.embed_cls must be true"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, r"text_cfg\.hf_model_name = 'roberta-base' is not supported"),
        ("text_cfg", {"proj_type": "none"}, r"text_cfg\.proj_type = 'none' is not supported"),
        ("text_cfg", {"heads": 3}, "text_decoder.width 8 is no multiple of heads 3"),
        ("multimodal_cfg", {"width": 16}, r"must equal text_decoder\.width 8"),
        ("multimodal_cfg", {"qk_norm": True}, r"multimodal_cfg\.qk_norm = True is not supported"),
    ],
)
def test_options_that_we_cannot_compute_are_refused(section: str, options: dict[str, Any], complaint: str) -> None:
    values = CASES["pooler"] | {section: CASES["pooler"][section] | options}
    with pytest.raises(OptimaError, match=complaint) as caught:
        from_open_clip_config(values, "configuration c.json")
    assert str(caught.value).startswith("configuration c.json: ")


def test_options_that_change_nothing_are_accepted() -> None:
    values = CASES["pooler"] | {
        "vision_cfg": CASES["pooler"]["vision_cfg"] | {"patch_dropout": 0.5, "ls_init_value": None, "qk_norm": False},
        "multimodal_cfg": CASES["pooler"]["multimodal_cfg"] | {"mlp_ratio": 4, "dim_head": 64, "n_queries": 256},
    }
    assert from_open_clip_config(values) == CONFIG


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"multimodal_decoder": {"mlp_ratio": 2.0}}, "open_clip's is always 4"),
        ({"text_decoder": {"activation": "quick_gelu"}}, "open_clip has one for all"),
        ({"image_encoder": {"pooler_queries": 0, "width": 24, "heads": 2}}, "cross-attention needs equal ones"),
    ],
)
def test_a_shape_that_open_clip_lacks_is_not_exported(changes: dict[str, dict[str, Any]], complaint: str) -> None:
    towers = {name: dataclasses.replace(getattr(CONFIG, name), **values) for name, values in changes.items()}
    with pytest.raises(OptimaError, match=f"cannot be exported to open_clip: .*{complaint}"):
        to_open_clip(CoCa(dataclasses.replace(CONFIG, **towers)))


def test_the_commands_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, state, _ = golden("no_pooler")
    torch.save({"state_dict": state}, tmp_path / "epoch_3.pt")
    (tmp_path / "model.json").write_text(json.dumps(config))
    arguments = ["import", "--checkpoint", str(tmp_path / "epoch_3.pt"), "--output", str(tmp_path / "m.safetensors")]
    assert main([*arguments, "--model_config", str(tmp_path / "model.json"), "--class_mask", "exact"]) == 0
    said = capsys.readouterr().out
    assert f"{len(state)} tensors read, none missing, none unexpected, none misshapen" in said
    model = load_coca(tmp_path / "m.safetensors")
    assert model.config.text_decoder.class_mask == "exact"
    assert (
        main(
            [
                "export",
                "--model",
                str(tmp_path / "m.safetensors"),
                "--output",
                str(tmp_path / "out"),
                "--format",
                "open_clip",
            ]
        )
        == 0
    )
    assert "correct_cls_mask" in capsys.readouterr().out
    back = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    # A directory that open_clip could load needs no configuration on the command line.
    arguments[2] = str(tmp_path / "out" / "open_clip_model.safetensors")
    assert main(arguments) == 0
    assert load_coca(tmp_path / "m.safetensors").config.text_decoder.class_mask == "shifted"
    assert read_open_clip_config(tmp_path / "out" / "open_clip_config.json") == from_open_clip_config(config)


def test_mistakes_on_the_command_line_end_in_one_line(
    theirs: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(theirs, tmp_path / "w.safetensors")
    arguments = ["import", "--checkpoint", str(tmp_path / "w.safetensors"), "--output", str(tmp_path / "m.safetensors")]
    for more, complaint in (
        ([], "give --preset, or --model_config"),
        (["--preset", "coca_ViT-B32"], "did you mean coca_ViT-B-32?"),
        (["--preset", "coca_ViT-B-32"], "does not fit the configuration: missing"),
        (["--preset", "coca_base", "--model_config", "c.json"], "both given"),
        (["--model_config", "nowhere.json"], "does not exist"),
    ):
        assert main([*arguments, *more]) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("\n") == 1


def test_other_image_sizes_interpolate_the_positions(theirs: dict[str, Tensor], seed: int) -> None:
    image = dataclasses.replace(CONFIG.image_encoder, image_size=96)
    larger = dataclasses.replace(CONFIG, image_encoder=image)
    with pytest.raises(OptimaError, match=r"misshapen visual\.positional_embedding"):
        from_open_clip(theirs, larger)
    model, account = from_open_clip(theirs, larger, resize=True)
    assert account.resized == ("visual.positional_embedding",)
    before, after = theirs["visual.positional_embedding"], model.image_encoder.position
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:].mean(dim=0), before[1:].mean(dim=0), rtol=0, atol=1e-5)  # symmetric about it
    same, account = from_open_clip(theirs, CONFIG, resize=True)
    assert account.resized == ()
    assert torch.equal(same.image_encoder.position, before)


def test_open_clip_loads_what_we_export(tmp_path: Path, seed: int) -> None:
    open_clip = load_open_clip()
    student = CoCa(CONFIG).eval()
    save_coca(student, tmp_path / "student.safetensors")
    assert (
        main(
            [
                "export",
                "--model",
                str(tmp_path / "student.safetensors"),
                "--output",
                str(tmp_path / "out"),
                "--format",
                "open_clip",
            ]
        )
        == 0
    )
    oracle = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    pixels, tokens = inputs(CASES["pooler"])
    assert_equal_outputs(ours(student, pixels, tokens), outputs(oracle, pixels, tokens, CLIP_MEAN, CLIP_STD))
    larger = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", force_image_size=96)
    image = dataclasses.replace(CONFIG.image_encoder, image_size=96)
    resized, _ = from_open_clip(to_open_clip(student), dataclasses.replace(CONFIG, image_encoder=image), resize=True)
    torch.testing.assert_close(resized.image_encoder.position, larger.visual.positional_embedding)


class Views:
    """A tensor of 10^12 numbers in a file of one."""

    huge = torch.zeros(1).expand(10**6, 10**6)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({1: torch.zeros(2)}, "1 are no tensors of numbers"),
        ({"a": torch.zeros(2).to_sparse()}, "a are no tensors of numbers"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a are no tensors of numbers"),
        ({"visual.positional_embedding": Views.huge}, "are no tensors of numbers"),
        ({"state_dict": {}}, "holds no state dict"),
        (3, "holds no state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: object, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(OptimaError, match=complaint):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x02)\x81.", b"\x80\x02K\x01K\x02R.", b"cos\nsystem\n."])
def test_malformed_pickles_end_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(OptimaError, match=r"model\.pt (cannot be read|is refused)") as caught:
        read_state_dict(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part.filename))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(OptimaError, match="it is compressed"):
        read_state_dict(tmp_path / "bomb.pt")


def test_weights_that_are_not_finite_are_refused(theirs: dict[str, Tensor]) -> None:
    name = "visual.conv1.weight"
    broken = theirs | {name: theirs[name].clone().fill_(float("nan"))}
    with pytest.raises(OptimaError, match=r"image_encoder\.patch\.weight holds \d+ values that are not finite"):
        from_open_clip(broken, CONFIG)


def test_a_checkpoint_of_another_model_is_refused_in_a_line_that_can_be_read() -> None:
    theirs = {f"stranger_{letter}.weight": torch.zeros(1) for letter in "abcdefghijklmnopqrstuvwxyz"}
    with pytest.raises(OptimaError, match=r"unexpected stranger_a\.weight.* and 18 more") as raised:
        from_open_clip(theirs, from_open_clip_config(CASES["no_pooler"]), "checkpoint x.pt")
    assert len(str(raised.value)) < 1500
