"""Sizes that no model can have are refused in one line that names them, wherever they come from."""

import dataclasses

import pytest

from optima.coca.checkpoint import shapes
from optima.coca.config import CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.model import HeadSpec
from optima.coca.presets import PRESETS, preset
from optima.run import main

BAD = (-1, 0, 10**9, 2.0, "8", None, True, [1], float("nan"))
SIZES = {
    ImageEncoderConfig: ("image_size", "patch_size", "width", "layers", "heads", "pooler_heads"),
    TextDecoderConfig: ("vocab_size", "context_length", "width", "layers", "heads"),
    MultimodalDecoderConfig: ("width", "layers", "heads"),
    CoCaConfig: ("embed_dim",),
    HeadSpec: ("classes", "images"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SIZES.items() for name in names])
def test_a_size_is_a_whole_number_within_bounds(kind: type, name: str) -> None:
    others = {"classes": 2} if kind is HeadSpec and name != "classes" else {}
    for value in BAD:
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 to"):
            kind(**others, **{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (ImageEncoderConfig, "mlp_ratio", (0, -1.0, float("nan"), float("inf"), 1e9, "4", None)),
        (ImageEncoderConfig, "mean", ((0.5,) * 2, [0.5] * 3, (0.5, 0.5, float("nan")), None, ("a",) * 3)),
        (ImageEncoderConfig, "activation", ("relu", None, 3)),
        (ImageEncoderConfig, "norm_input", (1, "true", None)),
        (ImageEncoderConfig, "pooler_queries", (-1, 10**9, 2.0)),
        (TextDecoderConfig, "pad_id", (-1, 200, "0")),
        (TextDecoderConfig, "class_mask", ("none", None)),
    ],
)
def test_every_other_field_is_checked_too(kind: type, name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})


def test_every_preset_is_within_the_bounds() -> None:
    for name in PRESETS:
        config = preset(name)
        assert dataclasses.replace(config) == config
    assert shapes(CoCaConfig())


@pytest.mark.parametrize(
    "option",
    [
        "text_decoder.heads=-1",
        "text_decoder.vocab_size=-1",
        "image_encoder.layers=1000000",
        "image_encoder.patch_size=0",
        "embed_dim=-8",
        "multimodal_decoder.mlp_ratio=nan",
    ],
)
def test_pretrain_says_so_in_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", f"--model.{option}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert option.partition("=")[0] in said
