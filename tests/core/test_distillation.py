"""One module of all losses: the engine's own numbers and gradients, in anybody's loop."""

import pytest
import torch
from plain_models import MODULES, TwoModules, load
from torch import nn

from optima_core import Balancer, Distillation, DistillerConfig, ObjectiveConfig, OptimaError, Step


def make(seed: int, balancer: Balancer | None = None) -> tuple[Distillation, TwoModules, TwoModules]:
    torch.manual_seed(seed)
    student, teacher = TwoModules(8, 2, 1), TwoModules(16, 4, 2).eval()
    return Distillation(student, student, teacher, MODULES, ObjectiveConfig(hidden=2.0), balancer), student, teacher


def test_losses_and_gradients_are_the_engines(seed: int) -> None:
    module, _, teacher = make(seed)
    torch.manual_seed(seed)
    same = TwoModules(8, 2, 1)
    step = Step(same, same, teacher, MODULES, DistillerConfig(objective=ObjectiveConfig(hidden=2.0)))
    step.objective.load_state_dict(module.objective.state_dict())
    losses = step.losses(load(0), dict.fromkeys(module.names))
    total = step.backward(losses)
    found = module(load(0))
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], total, check_dtype=False)
    for ours, theirs in zip(module.parameters(), [*same.parameters(), *step.objective.parameters()], strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert set(found) - {"loss"} == {"task", "logits"} | {
        f"{kind}/{place}" for kind in ("hidden", "attention") for place in ("front/0", "front/1", "back/0")
    }
    assert not any(value.requires_grad for name, value in found.items() if name != "loss")


def test_the_teacher_is_neither_trained_nor_saved(seed: int) -> None:
    module, _, teacher = make(seed)
    ours = {id(parameter) for parameter in module.parameters()}
    assert not ours & {id(parameter) for parameter in teacher.parameters()}
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "objective"}
    module(load(0))["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_chosen_module_is_distilled_and_all_are_measured(seed: int) -> None:
    balancer = Balancer(["front", "back"], seed=seed)
    module, _, _ = make(seed, balancer)
    balancer.observe(1.0)
    names = set(module.train()(load(0)))
    assert {name.split("/")[1] for name in names if "/" in name} == set(balancer.chosen())
    names = set(module.eval()(load(0)))
    assert {name.split("/")[1] for name in names if "/" in name} == {"front", "back"}
    with pytest.raises(ValueError, match="must choose among"):
        make(seed, Balancer(["front", "middle"]))


def test_keyword_arguments_are_a_batch(seed: int) -> None:
    module, student, teacher = make(seed)
    named = Distillation(
        student,
        lambda batch, wanted: student(batch["x"], wanted),
        lambda batch, wanted: teacher(batch["x"], wanted),
        MODULES,
    )
    named.objective.load_state_dict(module.objective.state_dict())
    assert named(x=load(0))["task"] == module(load(0))["task"]


def test_other_masks_are_refused_at_the_first_batch(seed: int) -> None:
    class Causal(TwoModules):
        def forward(self, batch, wanted):  # type: ignore[no-untyped-def]
            shown = super().forward(batch, wanted)
            taps = {
                name: tuple(tap._replace(attention=(tap.attention[0]._replace(causal=True),)) for tap in layers)
                for name, layers in shown.taps.items()
            }
            return shown._replace(taps=taps)

    student: nn.Module = TwoModules(8, 2, 1)
    with pytest.raises(OptimaError, match="attend to different pairs"):
        Distillation(student, student, Causal(16, 4, 2), MODULES)(load(0))
