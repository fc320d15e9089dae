"""Students that start from their teacher: copies where shapes are equal, the same function where nothing is lost."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from optima.coca import CoCa, CoCaConfig, HeadSpec, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.start import project_teacher, truncate_teacher

HEADS = {"vqa": HeadSpec(9), "nlvr2": HeadSpec(2, images=2)}


def make_model(
    width: int = 32, heads: int = 4, layers: int = 4, *, embed: int = 16, mlp_ratio: float = 2.0, pooler: int = 0
) -> CoCa:
    return CoCa(
        CoCaConfig(
            embed,
            ImageEncoderConfig(32, 8, width, layers, heads, mlp_ratio, pooler, 2),
            TextDecoderConfig(30, 10, width, layers, heads, mlp_ratio),
            MultimodalDecoderConfig(width, layers, heads, mlp_ratio),
        ),
        HEADS,
    ).double()


def trained(model: CoCa, gains_between_norms: bool = False) -> CoCa:
    """With gains, offsets and biases that differ, as after training; those between two norms only if wanted."""
    between = {model.multimodal_decoder.norm_output, model.image_encoder.norm_input}
    if model.image_encoder.pooler is not None:
        between.add(model.image_encoder.norm_output)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and (gains_between_norms or module not in between):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.add_(0.2 * torch.randn_like(module.bias))
        model.image_encoder.norm_input.weight.mul_(1.7)
        model.image_encoder.class_token.mul_(10)  # else the epsilon of the first norm counts
    return model


def make_batch(images: int = 1, size: int = 40) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 30, (size, 9))
    tokens[::3, 5:] = 0
    return torch.randn(size, images, 3, 32, 32, dtype=torch.float64), tokens


def said(model: CoCa, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Everything a model shows outside."""
    output = model(images, tokens, with_class=True)
    task = "vqa" if images.shape[1] == 1 else "nlvr2"
    return {
        "image feature": output.image_feature,
        "text feature": output.text_feature,
        "caption": model.caption_logits(output.states)[output.valid],
        task: model.class_logits(task, output),
    }


@torch.no_grad()
def error(found: Tensor, target: Tensor) -> float:
    return float((found - target).norm() / target.norm())


@pytest.mark.parametrize("pooler", [0, 5])
@pytest.mark.parametrize("layer_map", ["uniform", "last"])
@pytest.mark.parametrize("how", ["truncate", "project"])
def test_layers_of_equal_widths_are_the_teachers_of_the_layer_map(seed: int, how, layer_map, pooler: int) -> None:
    teacher, student = trained(make_model(pooler=pooler), True), make_model(layers=2, pooler=pooler)
    if how == "truncate":
        truncate_teacher(student, teacher, layer_map)
    else:
        project_teacher(student, teacher, *make_batch(), layer_map)
    for i, j in enumerate((1, 3) if layer_map == "uniform" else (2, 3)):
        for module, layers in (
            ("image_encoder", "blocks"),
            ("text_decoder", "blocks"),
            ("multimodal_decoder", "layers"),
        ):
            ours = student.get_submodule(f"{module}.{layers}.{i}").state_dict()
            theirs = teacher.get_submodule(f"{module}.{layers}.{j}").state_dict()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert all(
        torch.equal(ours[name], theirs[name]) for name in theirs if ".blocks." not in name and ".layers." not in name
    )


@pytest.mark.parametrize(("pooler", "images"), [(0, 1), (5, 1), (0, 2)])
def test_a_projection_that_loses_nothing_computes_what_the_teacher_does(seed: int, pooler: int, images: int) -> None:
    teacher, student = trained(make_model(pooler=pooler)), make_model(pooler=pooler)
    batch = make_batch(images)
    project_teacher(student, teacher, *batch, rotate=True)
    assert error(student.image_encoder.blocks[0].mlp[0].weight, teacher.image_encoder.blocks[0].mlp[0].weight) > 0.5
    theirs = said(teacher, *batch)
    for name, found in said(student, *batch).items():
        assert error(found, theirs[name]) < 1e-4, name


@pytest.mark.parametrize(("pooler", "images"), [(0, 1), (5, 1), (0, 2)])
def test_a_batch_watched_in_pieces_of_unequal_size_gives_the_same_projection(
    seed: int, monkeypatch: pytest.MonkeyPatch, pooler: int, images: int
) -> None:
    teacher, batch = trained(make_model(pooler=pooler)), make_batch(images)
    whole, pieces = make_model(pooler=pooler), make_model(pooler=pooler)
    pieces.load_state_dict(whole.state_dict())
    project_teacher(whole, teacher, *batch, rotate=True)
    monkeypatch.setattr("optima.coca.start.project.PIECE_BYTES", 8 * images * 17 * 64 * 11)  # 11 of 40 items
    sizes: list[int] = []
    teacher.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    project_teacher(pieces, teacher, *batch, rotate=True)
    assert sizes == [11, 11, 11, 7]
    theirs = said(whole, *batch)
    for name, found in said(pieces, *batch).items():
        assert error(found, theirs[name]) < 1e-9, name


@pytest.mark.parametrize("pooler", [0, 5])
def test_gains_between_norms_are_met_on_average(seed: int, pooler: int) -> None:
    teacher, student = trained(make_model(pooler=pooler), True), make_model(pooler=pooler)
    batch = make_batch()
    project_teacher(student, teacher, *batch, rotate=True)
    theirs = said(teacher, *batch)
    assert all(error(found, theirs[name]) < 0.3 for name, found in said(student, *batch).items())


def test_a_narrower_projection_keeps_far_more_of_the_teacher_than_truncation(seed: int) -> None:
    """Of weights with decaying spectra, as trained ones have."""
    teacher = trained(make_model(), True)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
        fading = basis * (0.7 ** torch.arange(32)) @ basis.T
        for block in itertools.chain(teacher.image_encoder.blocks, teacher.text_decoder.blocks):
            block.attention.out.weight.copy_(4 * fading @ block.attention.out.weight)
            block.mlp[2].weight.copy_(4 * fading @ block.mlp[2].weight)
        for layer in teacher.multimodal_decoder.layers:
            for block in (layer.self_block, layer.cross_block):
                block.attention.out.weight.copy_(4 * fading @ block.attention.out.weight)
                block.mlp[2].weight.copy_(4 * fading @ block.mlp[2].weight)
        for embedded in (teacher.text_decoder.token_embedding.weight, teacher.text_decoder.position):
            embedded.copy_(30 * embedded @ fading)
        teacher.image_encoder.patch.weight.copy_(
            torch.einsum("tcij,ts->scij", teacher.image_encoder.patch.weight, fading)
        )
        teacher.image_encoder.position.copy_(teacher.image_encoder.position @ fading)
    batch, fresh = make_batch(size=100), make_batch()
    theirs = said(teacher, *fresh)
    errors = {}
    for how in ("project", "truncate"):
        student = make_model(16, mlp_ratio=4.0)
        if how == "project":
            project_teacher(student, teacher, *batch)
        else:
            truncate_teacher(student, teacher)
        errors[how] = {name: error(found, theirs[name]) for name, found in said(student, *fresh).items()}
    print(errors)
    for name in theirs:
        assert errors["project"][name] < 0.7 * errors["truncate"][name], name


def test_fewer_heads_are_those_that_contribute_most(seed: int) -> None:
    teacher, student = trained(make_model()), make_model(16, heads=2)
    with torch.no_grad():
        for block in teacher.image_encoder.blocks:
            block.attention.out.weight.unflatten(1, (4, 8))[:, [0, 2]] = 0.0
    project_teacher(student, teacher, *make_batch())
    block, its = student.image_encoder.blocks[0], teacher.image_encoder.blocks[0]
    queries = its.attention.qkv.bias.double() + its.attention.qkv.weight @ its.norm_attention.bias
    torch.testing.assert_close(block.attention.qkv.bias[:16], queries[:32].view(4, 8)[[1, 3]].flatten())


@pytest.mark.parametrize("how", ["truncate", "project"])
def test_every_size_that_can_be_narrower_may_be(seed: int, how: str) -> None:
    teacher = trained(make_model(pooler=5), True)
    for options in (
        {"width": 16},
        {"width": 24, "heads": 3},
        {"heads": 4, "mlp_ratio": 1.0},
        {"embed": 8, "width": 16},
    ):
        for images in (1, 2):
            student = make_model(layers=2, pooler=5, **options)
            if how == "truncate":
                truncate_teacher(student, teacher)
            else:
                project_teacher(student, teacher, *make_batch(images))
            shown = said(student, *make_batch(images, 3))
            assert all(bool(found.isfinite().all()) for found in shown.values())


def test_a_wider_student_is_refused_by_projection_and_keeps_its_own_rest_under_truncation(seed: int) -> None:
    teacher, student = make_model(16), make_model(32)
    with pytest.raises(ValueError, match="image_encoder: the student's width 32 is above the teacher's 16"):
        project_teacher(student, teacher, *make_batch())
    before = student.text_decoder.class_token.clone()
    truncate_teacher(student, teacher)
    torch.testing.assert_close(student.text_decoder.class_token[:16], teacher.text_decoder.class_token)
    torch.testing.assert_close(student.text_decoder.class_token[16:], before[16:])


def test_truncation_takes_the_leading_features_of_every_head(seed: int) -> None:
    teacher, student = make_model(32, heads=4), make_model(16, heads=4)
    truncate_teacher(student, teacher)
    ours, theirs = (
        model.text_decoder.blocks[0].attention.qkv.weight.view(3, 4, -1, w)
        for model, w in ((student, 16), (teacher, 32))
    )
    torch.testing.assert_close(ours, theirs[:, :, :4, :16])


def test_a_deeper_student_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="4 student layers cannot learn from 2 teacher layers"):
        truncate_teacher(make_model(layers=4), make_model(layers=2))


@pytest.mark.parametrize("how", ["truncate", "project"])
def test_everything_is_made_on_the_devices_of_the_models_and_not_on_the_default_one(seed: int, how: str) -> None:
    teacher, batch = trained(make_model(pooler=5), True), make_batch()
    student = make_model(16, 2, 2, embed=8, pooler=5)
    other = make_model(16, 2, 2, embed=8, pooler=5)
    other.load_state_dict(student.state_dict())

    def start(model: CoCa) -> None:
        if how == "truncate":
            truncate_teacher(model, teacher)
        else:
            project_teacher(model, teacher, *batch)

    start(student)
    with torch.device("meta"):  # a tensor made there cannot be copied into a student
        start(other)
    for name, tensor in student.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
