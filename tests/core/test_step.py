"""One optimiser step, beside the same step written out with torch's own losses and AdamW."""

from dataclasses import replace

import pytest
import torch
from plain_models import MODULES, QUICK, Batch, TwoModules, load
from torch import Tensor
from torch.nn import functional as F

from optima_core import DistillerConfig, LogitPrediction, Step
from optima_core.objective import Gates
from optima_core.terms import LAYER_KINDS

CONFIG = DistillerConfig(rounds=2, steps_per_round=3, optimiser=replace(QUICK, weight_decay=0.1))
OPEN, CLOSED = torch.ones(()), torch.zeros(())


def make_step(config: DistillerConfig = CONFIG, seed: int = 0) -> Step[Batch]:
    """Of fresh models; equal seeds give equal ones."""
    torch.manual_seed(seed)
    teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1)
    return Step(student, student, teacher, MODULES, config)


def weights(step: Step[Batch]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in step.learner.state_dict().items()}


def run(step: Step[Batch], gates: Gates, steps: int = 3) -> list[Tensor]:
    return [step.run([load(i)], gates).values for i in range(steps)]


def total_written_out(student: TwoModules, teacher: TwoModules, step: Step[Batch], batch: Batch) -> Tensor:
    """The default objective of module "front", from its definition."""
    with torch.no_grad():
        taught = teacher(batch, {"front": (1, 3)})
    shown = student(batch, {"front": (0, 1)})
    assert isinstance(shown.prediction, LogitPrediction)
    assert isinstance(taught.prediction, LogitPrediction)
    ours, theirs = ((x.prediction.logits / 2).log_softmax(-1) for x in (shown, taught))
    total = shown.task_loss + 4 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    for s, t, projection in zip(shown.taps["front"], taught.taps["front"], step.objective.projections["front"]):  # type: ignore[call-overload]  # noqa: B905
        states = [F.layer_norm(x, (16,)) for x in (projection(s.hidden), t.hidden)]
        ours, theirs = (
            (tap.attention[0].q @ tap.attention[0].k.mT / tap.attention[0].q.shape[-1] ** 0.5).log_softmax(-1)
            for tap in (s, t)
        )
        maps = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()
        total = total + 1 / 2 * (F.mse_loss(*states) + maps)
    return total


def test_a_step_is_what_torch_makes_of_its_definition(seed: int) -> None:
    ours, theirs = make_step(seed=seed), make_step(seed=seed)
    teacher = ours.teacher_forward
    assert isinstance(teacher, TwoModules)
    assert isinstance(theirs.student, TwoModules)
    matrices = [p for p in theirs.trained if p.ndim >= 2]
    rest = [p for p in theirs.trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), fused=False, foreach=False)
    found = [float(values[0]) for values in run(ours, {"front": None}, 1)]
    optimiser.zero_grad()
    total_written_out(theirs.student, teacher, theirs, load(0)).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(theirs.trained, 1.0)
    optimiser.step()
    with torch.no_grad():
        assert found == pytest.approx([float(make_step(seed=seed).student(load(0), {}).task_loss)])
    for (name, one), other in zip(weights(ours).items(), weights(theirs).values(), strict=True):
        if not name.endswith("k.bias"):  # softmax ignores it: its gradient is rounding, which AdamW makes a step of
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_open_gate_changes_no_bit(seed: int) -> None:
    """It multiplies by one; that the host knows the arm is a matter of time alone."""
    known, gated = make_step(seed=seed), make_step(seed=seed)
    for ours, theirs in zip(
        run(known, {"front": None, "back": None}), run(gated, {"front": OPEN, "back": OPEN}), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(x, y) for x, y in zip(weights(known).values(), weights(gated).values(), strict=True))


def test_a_module_behind_a_closed_gate_learns_as_one_that_is_not_named(seed: int) -> None:
    """Bit for bit without clipping: zeros among the gradients group the sum of the joint norm differently."""
    unclipped = replace(CONFIG, optimiser=replace(CONFIG.optimiser, clip=0.0))
    named, gated = make_step(unclipped, seed), make_step(unclipped, seed)
    run(named, {"front": None})
    run(gated, {"front": OPEN, "back": CLOSED})
    for (name, ours), theirs in zip(weights(named).items(), weights(gated).values(), strict=True):
        assert torch.equal(ours, theirs), name
    states = [{k: v["step"].item() for k, v in s.optimiser.state_dict()["state"].items()} for s in (named, gated)]
    assert states[0].items() <= states[1].items()
    assert all(not count for key, count in states[1].items() if key not in states[0])


def test_measuring_changes_nothing(seed: int) -> None:
    step = make_step(seed=seed)
    before = weights(step)
    taught = step.teach(load(9), step.names)
    first, second = step.measure(load(9), taught), step.measure(load(9), taught)
    assert torch.equal(first.values, second.values)
    assert all(torch.equal(x, y) for x, y in zip(before.values(), weights(step).values(), strict=True))
    assert all(parameter.grad is None for parameter in step.trained)
    assert step.student.training


def test_the_average_follows_the_student(seed: int) -> None:
    step = make_step(replace(CONFIG, ema=0.5), seed)
    run(step, {"back": None}, 1)
    assert step.average is not None
    for ours, theirs in zip(step.average.module.parameters(), step.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    run(step, {"back": None}, 1)
    assert not torch.equal(step.average.module.head.weight, step.student.head.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_looked_at_module_by_module_is_the_same_step(accumulate: int, seed: int) -> None:
    config = replace(CONFIG, accumulate=accumulate)
    apart, plain = make_step(config, seed), make_step(config, seed)
    strengths = {(name, kind): torch.rand(()) * 3 for name in plain.names for kind in LAYER_KINDS}
    plain.objective.strengths.copy_(torch.stack(list(strengths.values())).view(2, 2))
    batches = [load(i) for i in range(accumulate)]
    gates: Gates = {"front": None, "back": None}
    ours = apart.run_apart(batches, gates, list(strengths), lambda name, kind, _: strengths[name, kind])
    theirs = plain.run(batches, gates)
    assert ours.terms == theirs.terms
    torch.testing.assert_close(ours.values, theirs.values)
    for (name, one), other in zip(weights(apart).items(), weights(plain).values(), strict=True):
        if not name.endswith("k.bias"):  # softmax ignores it: its gradient is rounding, which AdamW makes a step of
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_modules_pull_as_their_gradients_say(seed: int) -> None:
    """Beside gradients that autograd gives for each part alone."""
    step, told = make_step(seed=seed), {}
    gates: Gates = {"front": None, "back": None}
    parts = [(name, kind) for name in step.names for kind in LAYER_KINDS]
    step.run_apart([load(0)], gates, parts, lambda name, kind, pull: told.setdefault((name, kind), pull).ratio)
    fresh = make_step(seed=seed)
    losses = fresh.losses(load(0), gates)
    student = [p for p in fresh.student.parameters() if p.ndim]

    def gradient(module: str | None, kinds: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """And where there is one."""
        part = {group: x for group, x in losses.items() if group.module == module and group.kind in kinds}
        found = torch.autograd.grad(fresh.objective.total(part), student, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) if x is None else x for p, x in zip(student, found, strict=True)]
        reached = [torch.full_like(p, x is not None) for p, x in zip(student, found, strict=True)]
        ours, theirs = (torch.cat([x.flatten() for x in of]).double() for of in (zeros, reached))
        return ours, theirs

    assert len(told) == 4
    predictions, _ = gradient(None, ("task", "logits"))
    for (name, kind), pull in told.items():
        ours, reached = gradient(name, (kind,))
        assert pull.ratio.item() == pytest.approx((predictions.norm() / ours.norm()).item(), rel=1e-4)
        cosine = ours @ predictions / ours.norm() / (predictions * reached).norm()
        assert pull.agreement.item() == pytest.approx(cosine.item(), abs=1e-4)
