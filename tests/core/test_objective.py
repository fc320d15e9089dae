"""The loss terms, their weights, their gates, and which projections learn from them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from plain_models import MODULES, TwoModules, load
from torch import Tensor

from optima_core import (
    AttentionTap,
    Forward,
    LayerTap,
    LinearPrediction,
    LogitPrediction,
    ModulePair,
    Objective,
    ObjectiveConfig,
)
from optima_core import objective as objectives
from optima_core.objective import Losses, as_vector
from optima_core.terms import LossGroup, LossTerm
from optima_kernels import reference

ON, OFF = torch.ones(()), torch.zeros(())


def by_name(losses: Losses) -> dict[str, Tensor]:
    """Every loss, with its graph, by its name in records."""
    return {
        LossTerm(group.kind, group.module, layer).name: loss
        for group, values in losses.items()
        for layer, loss in zip(group.layers or (None,), values.unbind() if group.layers else (values,), strict=True)
    }


def forwards(objective: Objective, modules: tuple[str, ...] = ("front", "back")) -> tuple[Forward, Forward]:
    student, teacher = TwoModules(8, 2, 1), TwoModules(16, 4, 2)
    wanted_student, wanted_teacher = objective.wanted(modules)
    with torch.no_grad():
        taught = teacher(load(1), wanted_teacher)
    return student(load(1), wanted_student), taught


def test_the_total_is_the_weights_times_the_terms(seed: int) -> None:
    config = ObjectiveConfig(task=0.5, logits=2.0, hidden=3.0, attention=0.25)
    objective = Objective(MODULES, config)
    losses = objective(*forwards(objective), {"front": ON, "back": ON})
    terms = by_name(losses)
    by_hand = (
        0.5 * terms["task"]
        + 2.0 * terms["logits"]
        + 3.0 * ((terms["hidden/front/0"] + terms["hidden/front/1"]) / 2 + terms["hidden/back/0"])
        + 0.25 * ((terms["attention/front/0"] + terms["attention/front/1"]) / 2 + terms["attention/back/0"])
    )
    torch.testing.assert_close(objective.total(losses), by_hand)
    assert len(terms) == 8


def test_each_term_is_the_reference_loss_of_the_mapped_layers(seed: int) -> None:
    objective = Objective(MODULES, ObjectiveConfig(temperature=3.0))
    student, teacher = forwards(objective)
    terms = by_name(objective(student, teacher, {"front": None, "back": ON}))
    # The uniform map of 2 layers onto 4 asks for the teacher's layers 1 and 3, in this order.
    for i in range(2):
        projection = objective.projections["front"][i]  # type: ignore[index]
        ours, theirs = student.taps["front"][i], teacher.taps["front"][i]
        expected = reference.hidden_mse(
            ours.hidden, theirs.hidden, projection.weight, projection.bias, normalize="layernorm"
        )
        torch.testing.assert_close(terms[f"hidden/front/{i}"], expected)
        maps = reference.attention_map_loss(*ours.attention[0][:2], *theirs.attention[0][:2])
        torch.testing.assert_close(terms[f"attention/front/{i}"], maps)
    assert isinstance(student.prediction, LogitPrediction)
    assert isinstance(teacher.prediction, LogitPrediction)
    expected = reference.prediction_kl(student.prediction.logits, teacher.prediction.logits, temperature=3.0)
    torch.testing.assert_close(terms["logits"], expected)


def test_taps_are_asked_of_the_mapped_teacher_layers_once_each() -> None:
    objective = Objective([ModulePair("encoder", 3, 5, 8, 16, [0, 4, 4])], ObjectiveConfig())
    assert objective.wanted(["encoder"]) == ({"encoder": (0, 1, 2)}, {"encoder": (0, 4)})


def test_two_student_layers_may_learn_from_one_teacher_layer(seed: int) -> None:
    objective = Objective([ModulePair("encoder", 3, 5, 8, 8, [0, 4, 4])], ObjectiveConfig(attention=0, normalize=None))
    first, last = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    student = Forward(OFF, None, {"encoder": tuple(LayerTap(torch.zeros(2, 5, 8)) for _ in range(3))})
    teacher = Forward(OFF, None, {"encoder": (LayerTap(first), LayerTap(last))})
    terms = by_name(objective(student, teacher, {"encoder": ON}))
    for i, target in enumerate((first, last, last)):
        bias = objective.projections["encoder"][i].bias  # type: ignore[index]
        torch.testing.assert_close(terms[f"hidden/encoder/{i}"], (bias - target).square().mean())


def test_a_closed_gate_takes_its_module_out(seed: int) -> None:
    objective = Objective(MODULES, ObjectiveConfig())
    losses = objective(*forwards(objective), {"front": ON, "back": OFF})
    terms = by_name(losses)
    assert terms["hidden/front/0"] > 0
    assert terms["hidden/back/0"] == 0
    assert terms["attention/back/0"] == 0
    objective.total(losses).backward()  # type: ignore[no-untyped-call]
    for parameter in objective.projections["back"].parameters():
        assert parameter.grad is None or not parameter.grad.any()
    for parameter in objective.projections["front"].parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_projections_of_modules_that_are_not_distilled_get_no_gradient_at_all(seed: int) -> None:
    objective = Objective(MODULES, ObjectiveConfig())
    losses = objective(*forwards(objective, ("back",)), {"back": ON})
    assert sorted(by_name(losses)) == ["attention/back/0", "hidden/back/0", "logits", "task"]
    objective.total(losses).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in objective.projections["front"].parameters())
    assert all(parameter.grad is not None for parameter in objective.projections["back"].parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_where_widths_are_equal(seed: int) -> None:
    """Projections between equal widths start as the identity, others from random numbers."""

    def hidden(width: int) -> Tensor:
        torch.manual_seed(seed)
        objective = Objective(
            [ModulePair("front", 2, 2, width, 8)], ObjectiveConfig(task=0.0, logits=0.0, attention=0.0)
        )
        states = [torch.randn(3, 5, 8) for _ in range(2)]
        teacher = Forward(None, None, {"front": tuple(LayerTap(state) for state in states)})
        student = Forward(None, None, {"front": tuple(LayerTap(state[..., :width]) for state in states)})
        return as_vector(objective(student, teacher, {"front": None})).values

    assert hidden(8).max() < 1e-10
    assert hidden(7).min() > 0.1


def test_terms_of_weight_zero_are_left_out(seed: int) -> None:
    objective = Objective(MODULES, ObjectiveConfig(logits=0, hidden=0, attention=0))
    assert list(objective(*forwards(objective), {"front": ON, "back": ON})) == [LossGroup("task")]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_states_and_head_give_the_same_loss_as_their_logits(divergence: str, seed: int) -> None:
    objective = Objective((), ObjectiveConfig(divergence=divergence))  # type: ignore[arg-type]
    mask = torch.rand(12) < 0.7
    mask[0] = True

    def both(width: int) -> tuple[LinearPrediction, LogitPrediction]:
        hidden, weight, bias = torch.randn(12, width), torch.randn(20, width), torch.randn(20)
        logits = hidden @ weight.T + bias
        return LinearPrediction(hidden, weight, bias, mask), LogitPrediction(logits, mask.float())

    (linear_s, logits_s), (linear_t, logits_t) = both(6), both(9)

    def loss(student: LinearPrediction | LogitPrediction, teacher: LinearPrediction | LogitPrediction) -> Tensor:
        return by_name(objective(Forward(OFF, student, {}), Forward(OFF, teacher, {}), {}))["logits"]

    torch.testing.assert_close(loss(linear_s, linear_t), loss(logits_s, logits_t), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="both"):
        loss(linear_s, logits_t)


def test_a_missing_prediction_leaves_the_logits_term_out() -> None:
    objective = Objective((), ObjectiveConfig())
    assert list(objective(Forward(ON, None, {}), Forward(ON, None, {}), {})) == [LossGroup("task")]


@pytest.mark.parametrize("heads", ["match", "mean", "relation"])
def test_rows_that_attention_kept_are_handed_on_unless_heads_are_cut_anew(heads: str, seed: int) -> None:
    relation_heads = 2 if heads == "relation" else None
    config = ObjectiveConfig(hidden=0, attention_heads=heads, relation_heads=relation_heads)  # type: ignore[arg-type]
    objective = Objective([ModulePair("encoder", 1, 1, 8, 8)], config)

    def loss(lse: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        sides = []
        for _ in range(2):
            q, k = torch.randn(2, 2, 4, 5, 2, generator=generator)
            tap = LayerTap(torch.zeros(2, 5, 8), (AttentionTap(q, k, lse=lse),))
            sides.append(Forward(ON, None, {"encoder": (tap,)}))
        return by_name(objective(*sides, {"encoder": ON}))["attention/encoder/0"]

    assert loss(None) > 0
    misshapen = torch.zeros(2, 4, 6)  # which the loss refuses, if it is given it
    if heads == "relation":
        torch.testing.assert_close(loss(misshapen), loss(None))
    else:
        with pytest.raises(ValueError, match="lse_s"):
            loss(misshapen)


@pytest.mark.parametrize("gate", [ON, None])
def test_a_modules_layers_are_compared_in_one_call_a_kind_of_map(
    gate: Tensor | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with a self- and a cross-attention map, one that has only the first, and one without attention."""
    calls: list[int] = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **named: Any) -> Tensor:
            calls.append(len(arguments[0]))
            return function(*arguments, **named)

        return call

    for name in ("hidden_mses", "attention_map_losses"):
        monkeypatch.setattr(objectives, name, counted(getattr(objectives, name)))

    def side() -> Forward:
        layers = []
        for maps in (2, 0, 1, 2):
            sizes = ((5, 5, True), (5, 7, False))[:maps]
            attention = tuple(AttentionTap(torch.randn(3, 2, n, 4), torch.randn(3, 2, m, 4), c) for n, m, c in sizes)
            layers.append(LayerTap(torch.randn(3, 5, 8), attention))
        return Forward(OFF, None, {"decoder": tuple(layers)})

    objective = Objective([ModulePair("decoder", 4, 4, 8, 8)], ObjectiveConfig())
    student, teacher = side(), side()
    losses = objective(student, teacher, {"decoder": gate})
    assert sorted(calls) == [1, 2, 2, 4]
    told = as_vector(losses)
    assert [term.name for term in told.terms] == [
        "task",
        *(f"{kind}/decoder/0" for kind in ("hidden", "attention")),
        "hidden/decoder/1",
        *(f"{kind}/decoder/{layer}" for layer in (2, 3) for kind in ("hidden", "attention")),
    ]
    found = told.named()
    for layer in (0, 2, 3):
        pairs = zip(student.taps["decoder"][layer].attention, teacher.taps["decoder"][layer].attention, strict=True)
        maps = [reference.attention_map_loss(s.q, s.k, t.q, t.k, causal=s.causal) for s, t in pairs]
        assert found[f"attention/decoder/{layer}"] == pytest.approx(float(torch.stack(maps).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_means_of_slices_are_weighed_by_what_they_are_means_over(
    kind: Literal["kl", "mse"], causal: bool, masked: bool, seed: int
) -> None:
    """Counted here with loops, from the definition."""
    told: list[Tensor] = []

    def weigh(counts: Tensor) -> Tensor:
        told.append(counts)
        return torch.arange(1.0, len(counts) + 1)

    batch, heads, queries, keys = 3, 2, 4, 6
    mask = torch.rand(batch, 1, queries, keys) < 0.5 if masked else None
    valid = torch.rand(batch, queries) < 0.5 if masked else None

    def forward() -> Forward:
        q, k = torch.randn(batch, heads, queries, 4), torch.randn(batch, heads, keys, 4)
        tap = LayerTap(torch.randn(batch, queries, 8), (AttentionTap(q, k, causal, mask),), valid)
        return Forward(ON, None, {"encoder": (tap,)}, task_count=7)

    config, student, teacher = ObjectiveConfig(attention_kind=kind), forward(), forward()
    pair = ModulePair("encoder", 1, 1, 8, 8)
    weighed = Objective([pair], config, weigh)
    plain = Objective([pair], config)
    plain.load_state_dict(weighed.state_dict())
    ours, theirs = (as_vector(one(student, teacher, {"encoder": None})).values for one in (weighed, plain))
    torch.testing.assert_close(ours, theirs * torch.tensor([1.0, 2.0, 3.0]))

    attends = [
        [[(mask is None or bool(mask[b, 0, i, j])) and (not causal or j <= i) for j in range(keys)]
         for i in range(queries)]
        for b in range(batch)
    ]  # fmt: skip
    rows = sum(any(row) for sample in attends for row in sample)
    elements = sum(sum(row) for sample in attends for row in sample)
    tokens = batch * queries if valid is None else int(valid.sum())
    assert told[0].tolist() == [7, tokens, rows if kind == "kl" else elements]


def test_a_module_without_maps_has_hidden_states_alone(seed: int) -> None:
    student, teacher, batch = TwoModules(8, 2, 1), TwoModules(16, 4, 2), load(seed)
    objective = Objective([replace(pair, maps=pair.name == "front") for pair in MODULES], ObjectiveConfig())
    wanted = objective.wanted(("front", "back"))
    losses = objective(student(batch, wanted[0]), teacher(batch, wanted[1]), dict.fromkeys(("front", "back")))
    assert {(group.kind, group.module) for group in losses if group.module} == {
        ("hidden", "front"), ("attention", "front"), ("hidden", "back")
    }  # fmt: skip


def test_two_modules_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        Objective([MODULES[0], MODULES[0]], ObjectiveConfig())
