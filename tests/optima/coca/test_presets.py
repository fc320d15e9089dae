"""The named configurations: their sizes, and which may teach which."""

import pytest
import torch

from optima.coca import MODULES, CoCa, HeadSpec
from optima.coca.pairs import module_pairs
from optima.coca.presets import PRESETS, TEACHERS, preset
from optima_core import OptimaError


def on_no_device(name: str) -> CoCa:
    with torch.device("meta"):
        return CoCa(PRESETS[name])


# Counted on open_clip 3.3.0's own models of these names.
@pytest.mark.parametrize(
    ("name", "towers", "total"),
    [
        ("coca_ViT-L-14", [306_724_864, 123_651_072, 208_074_240], 638_450_177),
        ("coca_ViT-B-32", [89_164_032, 63_428_608, 100_967_424], 253_560_065),
        ("coca_base", [86_395_392, 134_661_120, 219_280_896], 440_337_409),
    ],
)
def test_teachers_have_as_many_parameters_as_open_clips_models(name: str, towers: list[int], total: int) -> None:
    model = on_no_device(name)
    found = [sum(p.numel() for p in getattr(model, module).parameters()) for module in MODULES]
    assert found == towers
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("student", "layers"), [("base", 12), ("tiny12", 12), ("tiny6", 6)])
def test_every_student_fits_the_teacher_of_its_patch_size(teacher: str, student: str, layers: int) -> None:
    config = preset(student, PRESETS[teacher])
    assert config == PRESETS[f"{student}-{PRESETS[teacher].image_encoder.patch_size}"]
    assert {getattr(config, module).layers for module in MODULES} == {layers}
    assert {getattr(config, module).width // getattr(config, module).heads for module in MODULES} == {64}
    with torch.device("meta"):
        pairs = module_pairs(CoCa(config), on_no_device(teacher))
    assert [pair.name for pair in pairs] == list(MODULES)
    assert config.text_decoder.vocab_size == PRESETS[teacher].text_decoder.vocab_size


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptimaError, match=r"unknown preset coca_ViT-L14; did you mean coca_ViT-L-14\?"):
        preset("coca_ViT-L14")
    with pytest.raises(OptimaError, match=r"unknown preset tiny12; did you mean tiny12-14 or tiny12-32 or tiny12-18\?"):
        preset("tiny12")
    with pytest.raises(OptimaError, match=r"unknown preset resnet; the presets are coca_ViT-L-14, "):
        preset("resnet")


@pytest.mark.parametrize("name", PRESETS)
def test_task_heads_fit_every_size_and_any_number_of_answers(name: str) -> None:
    heads = {"vqa": HeadSpec(3129), "nlvr2": HeadSpec(2, images=2), "snli_ve": HeadSpec(3)}
    with torch.device("meta"):
        model = CoCa(PRESETS[name], heads)
        size = PRESETS[name].image_encoder.image_size
        for task, spec in heads.items():
            images = torch.zeros(2, spec.images, 3, size, size)
            output = model(images, torch.ones(2, 9, dtype=torch.int64))
            assert model.class_logits(task, output).shape == (2, spec.classes)
        assert model.caption_logits(output.states).shape == (2, 9, PRESETS[name].text_decoder.vocab_size)
