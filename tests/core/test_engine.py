"""Rounds: what is distilled, what a round earns, and that a resumed run equals an uninterrupted one."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from plain_models import QUICK, Batch, TwoModules, load, make_distiller
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from optima_core import (
    BanditConfig,
    Distiller,
    DistillerConfig,
    Forward,
    LayerTap,
    LogitPrediction,
    ModulePair,
    ObjectiveConfig,
    OptimaError,
    RewardConfig,
    RoundRecord,
    WantedTaps,
)
from optima_core.bandit import POLICIES, make_policy
from optima_core.bandit.catalogue import FACTORED
from optima_core.records import Sent

CONFIG = DistillerConfig(rounds=8, steps_per_round=3, optimiser=QUICK, bandit=BanditConfig())


def weights(distiller: Distiller[Batch]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in distiller.student.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(("arm", "name", "other"), [(0, "front", "back"), (1, "back", "front")])
def test_only_the_chosen_module_is_distilled(arm: int, name: str, other: str) -> None:
    config = replace(CONFIG, bandit=BanditConfig("fixed_arm", options={"arm": arm}))
    distiller = make_distiller(config)
    before = [parameter.clone() for parameter in distiller.objective.projections[other].parameters()]
    for _ in range(2):
        record = distiller.run_round()
        assert record.arm == arm
        assert record.modules == (name,)
        assert {term.split("/")[1] for term in record.losses if "/" in term} == {name}
        assert {term.split("/")[1] for term in record.probe if "/" in term} == {"front", "back"}
    after = list(distiller.objective.projections[other].parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_all_modules_at_once() -> None:
    record = make_distiller(replace(CONFIG, bandit=BanditConfig("all_modules"))).run_round()
    assert record.arm == -1
    assert record.modules == ("front", "back")
    assert {"hidden/front/0", "hidden/front/1", "hidden/back/0"} <= set(record.losses)


def test_subsets_are_arms_with_names_of_their_own() -> None:
    config = replace(CONFIG, rounds=3, bandit=BanditConfig("round_robin", arms="subsets"))
    distiller = make_distiller(config)
    records = [distiller.run_round() for _ in range(3)]
    assert [record.modules for record in records] == [("front",), ("back",), ("front", "back")]
    assert set(records[0].mean) == {"front"}
    assert set(records[2].mean) == {"front", "back", "front+back"}


def test_the_losses_fall() -> None:
    distiller = make_distiller(replace(CONFIG, rounds=30))
    start = distiller.initial_probe.named()
    end = [distiller.run_round() for _ in range(30)][-1].probe
    assert end["task"] < 0.7 * start["task"]
    assert end["hidden/front/1"] < 0.9 * start["hidden/front/1"]
    assert end["hidden/back/0"] < 0.9 * start["hidden/back/0"]


def test_the_teacher_stays_as_it_is() -> None:
    torch.manual_seed(0)
    teacher = TwoModules(16, 4, 2).eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    make_distiller(CONFIG, teacher_forward=teacher).run_round()
    assert same(before, teacher.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_same_seed_gives_the_same_records_and_weights(seed: int) -> None:
    first, second = make_distiller(CONFIG, seed), make_distiller(CONFIG, seed)
    assert [first.run_round() for _ in range(6)] == [second.run_round() for _ in range(6)]
    assert same(weights(first), weights(second))


RESUMED = {
    "probe": replace(CONFIG, reward=RewardConfig(source="probe", normaliser="quantile")),
    "training": replace(CONFIG, reward=RewardConfig(source="training", normaliser="quantile")),
    "accumulated_average": replace(CONFIG, accumulate=2, ema=0.8, optimiser=replace(QUICK, schedule="linear")),
    "fp16": replace(CONFIG, precision="fp16"),
}


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config: DistillerConfig, seed: int) -> None:
    whole = make_distiller(config, seed, dropout=0.2)
    expected = [whole.run_round() for _ in range(8)]

    first = make_distiller(config, seed, dropout=0.2)
    records = [first.run_round() for _ in range(4)]
    state = through_a_file(first.state_dict())
    resumed = make_distiller(config, seed, dropout=0.2)
    torch.manual_seed(seed + 1)
    resumed.load_state_dict(state)
    records += [resumed.run_round() for _ in range(4)]

    assert records == expected
    assert same(weights(whole), weights(resumed))
    assert same(whole.objective.state_dict(), resumed.objective.state_dict())
    assert same(whole.result.state_dict(), resumed.result.state_dict())
    assert whole.training.scaler.state_dict() == resumed.training.scaler.state_dict()


def decrement(before: dict[str, float], after: dict[str, float], initial: dict[str, float]) -> float:
    """The mean over task, logits and every layer's hidden and attention loss, written out."""
    relative = [(before[name] - after[name]) / (before[name] + 0.3 * initial[name]) for name in initial]
    assert len(relative) == 8
    return sum(relative) / len(relative)


def test_the_reward_is_the_relative_decrement_of_the_probe_losses() -> None:
    distiller = make_distiller(replace(CONFIG, reward=RewardConfig(kind="relative", normaliser="none")))
    initial = distiller.initial_probe.named()
    before = initial
    for _ in range(3):
        record = distiller.run_round()
        assert record.reward == pytest.approx(decrement(before, record.probe, initial), rel=1e-4, abs=1e-7)
        before = record.probe


def test_the_reward_from_training_smooths_the_losses_that_were_measured() -> None:
    config = replace(CONFIG, steps_per_round=1, reward=RewardConfig("training", "relative", normaliser="none"))
    distiller = make_distiller(config)
    initial = distiller.initial_probe.named()
    before = dict(initial)
    for _ in range(4):
        record = distiller.run_round()
        after = {name: 0.9 * old + 0.1 * record.losses.get(name, old) for name, old in before.items()}
        assert record.reward == pytest.approx(decrement(before, after, initial), rel=1e-4, abs=1e-7)
        before = after


def test_the_probe_is_measured_without_dropout_and_leaves_modes_alone() -> None:
    distiller = make_distiller(CONFIG, dropout=0.9)
    distiller.student.front.eval()  # type: ignore[union-attr]
    record = distiller.run_round()
    assert distiller.student.training
    assert not distiller.student.front.training  # type: ignore[union-attr]
    distiller.student.eval()
    with torch.no_grad():
        taken = float(distiller.student(distiller.probe, {}).task_loss)
    assert record.probe["task"] == pytest.approx(taken, rel=1e-5)


def test_records_count_rounds_and_steps_and_tell_the_learning_rate() -> None:
    distiller = make_distiller(CONFIG)
    records = [distiller.run_round() for _ in range(8)]
    assert [(record.round, record.step) for record in records] == [(i, 3 * i) for i in range(1, 9)]
    assert records[-1].learning_rate == pytest.approx(0.0, abs=1e-9)
    assert all(sum(record.pulls.values()) == record.round for record in records)
    assert all(set(record.mean) == set(record.std) == set(record.pulls) for record in records)


def test_batches_are_asked_for_by_step() -> None:
    asked: list[int] = []

    def noted(step: int) -> Batch:
        asked.append(step)
        return load(step)

    distiller = make_distiller(CONFIG, load=noted)
    asked.clear()
    distiller.run_round()
    distiller.run_round()
    assert asked == [0, 1, 2, 3, 4, 5]


def first_gradients(distiller: Distiller[Batch]) -> dict[str, Tensor]:
    """The gradients that the optimiser is given in the first step."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        grads = {name: p.grad for name, p in distiller.training.learner.named_parameters() if p.grad is not None}
        found.update({name: grad.clone() for name, grad in grads.items() if name not in found})

    distiller.training.optimiser.register_step_pre_hook(keep)
    distiller.run_round()
    return found


ONE_STEP = replace(CONFIG, steps_per_round=1, optimiser=replace(QUICK, clip=0.0), bandit=BanditConfig("all_modules"))


def in_one(load: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Batches 2 s and 2 s + 1 as one."""
    return lambda step: tuple(torch.cat(part) for part in zip(load(2 * step), load(2 * step + 1), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_accumulated_batches_give_the_step_of_the_larger_batch(clip: float, seed: int) -> None:
    config = replace(ONE_STEP, optimiser=replace(QUICK, clip=clip))
    halves, whole = make_distiller(replace(config, accumulate=2), seed), make_distiller(config, seed, load=in_one(load))
    ours, theirs = first_gradients(halves), first_gradients(whole)
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(list(halves.training.learner.parameters()))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    assert (torch.cat([grad.flatten() for grad in ours.values()]).norm() <= 0.1 * 1.001) == (clip > 0)


def test_accumulated_batches_weigh_the_same_whatever_their_masks_leave(seed: int) -> None:
    def masked(distiller: Distiller[Batch]) -> Distiller[Batch]:
        student = distiller.student

        def forward(batch: Batch, wanted: WantedTaps) -> Forward:
            output = student(batch, wanted)
            valid = batch[0][..., 0] > batch[0][0, 0, 0]  # another number in every batch
            taps = {name: tuple(tap._replace(valid=valid) for tap in found) for name, found in output.taps.items()}
            return output._replace(taps=taps)

        distiller.training.learner._student_forward = (forward,)
        return distiller

    config = replace(ONE_STEP, objective=ObjectiveConfig(task=0, logits=0, attention=0))
    both = first_gradients(masked(make_distiller(replace(config, accumulate=2), seed)))
    each = [first_gradients(masked(make_distiller(config, seed, load=lambda _, i=i: load(i)))) for i in range(2)]  # type: ignore[misc]
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2, rtol=1e-3, atol=1e-6)


def test_the_average_of_the_student_follows_its_definition(seed: int) -> None:
    distiller = make_distiller(replace(CONFIG, steps_per_round=1, ema=0.7), seed, dropout=0.1)
    expected = None
    for _ in range(5):
        distiller.run_round()
        now = weights(distiller)
        expected = now if expected is None else {name: 0.7 * expected[name] + 0.3 * now[name] for name in now}
    assert expected is not None
    for name, tensor in distiller.result.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert not same(weights(distiller), distiller.result.state_dict())


def test_without_an_average_the_result_is_the_student() -> None:
    distiller = make_distiller(CONFIG)
    assert distiller.result is distiller.student


def test_fp16_skips_a_step_that_overflows_and_lowers_its_scale() -> None:
    distiller = make_distiller(replace(CONFIG, precision="fp16", steps_per_round=1))
    distiller.training.scaler.load_state_dict(distiller.training.scaler.state_dict() | {"scale": 1e38})
    before, scale = weights(distiller), distiller.training.scaler.get_scale()
    record = distiller.run_round()
    assert same(before, weights(distiller))
    assert distiller.training.scaler.get_scale() < scale
    assert math.isfinite(record.losses["task"])
    distiller.training.scaler.load_state_dict(distiller.training.scaler.state_dict() | {"scale": 1024.0})
    distiller.run_round()
    assert not same(before, weights(distiller))


def test_one_compiled_graph_serves_every_arm_with_the_losses_of_eager_steps(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    config = replace(CONFIG, rounds=8, bandit=BanditConfig("round_robin", arms="subsets"))
    compiled, eager = make_distiller(replace(config, compile=True), seed), make_distiller(config, seed)
    for _ in range(8):
        ours, theirs = compiled.run_round(), eager.run_round()
        assert ours.modules == theirs.modules
        assert ours.losses.keys() == theirs.losses.keys()
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4, abs=1e-6)
        assert ours.probe == pytest.approx(theirs.probe, rel=1e-4, abs=1e-6)
        assert (ours.tapped, theirs.tapped) == (1.0, {("front",): 2 / 3, ("back",): 1 / 3}.get(ours.modules, 1.0))
    assert counter.frame_count == 1, "the step was compiled again for another arm"


@pytest.mark.parametrize("source", ["probe", "training"])
def test_an_arm_that_stays_on_the_device_is_distilled_as_one_that_is_read(
    source: Literal["probe", "training"], seed: int
) -> None:
    config = replace(CONFIG, bandit=BanditConfig(arms="subsets"), reward=RewardConfig(source))
    read, unread = make_distiller(config, seed), make_distiller(replace(config, read_arm=False), seed)
    for _ in range(8):
        ours, theirs = read.run_round(), unread.run_round()
        assert ours.modules == theirs.modules
        assert ours.reward == pytest.approx(theirs.reward, rel=1e-3, abs=1e-6)
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4, abs=1e-6)
        assert ours.probe == pytest.approx(theirs.probe, rel=1e-4, abs=1e-6)
        assert theirs.tapped == 1.0
    share = {("front",): 2 / 3, ("back",): 1 / 3}.get(ours.modules, 1.0)
    assert ours.tapped == pytest.approx(share)


def test_models_are_asked_for_the_arms_modules_alone() -> None:
    """Of both models, in every step; the probe is measured for all."""
    asked: list[tuple[str, ...]] = []
    teacher = TwoModules(16, 4, 2).eval()

    def noted(batch: Batch, wanted: WantedTaps) -> Forward:
        asked.append(tuple(wanted))
        output: Forward = teacher(batch, wanted)
        return output

    distiller = make_distiller(replace(CONFIG, bandit=BanditConfig("round_robin")), teacher_forward=noted)
    for _ in range(2):
        distiller.run_round()
    assert asked == [("front", "back"), *[("front",)] * 3, *[("back",)] * 3]


def test_a_batch_is_loaded_before_the_arm_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    value = Sent.value

    def told(sent: Sent) -> Tensor:
        done.append("arm")
        return value(sent)

    def noted(number: int) -> Batch:
        done.append(str(number))
        return load(number)

    distiller = make_distiller(replace(CONFIG, accumulate=2), load=noted)
    done.clear()
    monkeypatch.setattr(Sent, "value", told)
    for _ in range(2):
        distiller.launch_round()
    assert done == ["0", "arm", *map(str, range(1, 6)), "6", "arm", *map(str, range(7, 12))]


def test_rounds_may_be_launched_before_the_records_of_those_before_are_read(seed: int) -> None:
    ahead, waiting = make_distiller(CONFIG, seed), make_distiller(CONFIG, seed)
    pending = [ahead.launch_round() for _ in range(5)]
    expected = [waiting.run_round() for _ in range(5)]
    assert all(record.ready() for record in pending)
    assert [record.result() for record in reversed(pending)] == expected[::-1]
    assert all(record.step_seconds > 0 for record in expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_itself_alone() -> None:
    teacher = TwoModules(16, 4, 2).eval()
    calls = 0

    def poisoned(batch: Batch, wanted: WantedTaps) -> Forward:
        nonlocal calls
        calls += 1
        output: Forward = teacher(batch, wanted)
        if calls == 3:  # the probe, then the steps
            last = output.taps["back"][-1]
            output.taps["back"] = (last._replace(hidden=torch.full_like(last.hidden, math.nan)),)
        return output

    config = replace(CONFIG, bandit=BanditConfig("fixed_arm", options={"arm": 1}))
    distiller = make_distiller(config, teacher_forward=poisoned)
    with pytest.raises(OptimaError, match=r"loss hidden/back/0 became NaN or infinite in round 1, at step 2;"):
        distiller.run_round()


def test_weights_that_explode_in_the_last_step_are_seen_on_the_probe() -> None:
    config = replace(CONFIG, steps_per_round=1, optimiser=replace(QUICK, learning_rate=1e30))
    with pytest.raises(OptimaError, match=r"became NaN or infinite in round 1, at the probe after step 1"):
        make_distiller(config).run_round()


def test_bf16_stays_close_to_fp32() -> None:
    precise, fast = make_distiller(CONFIG), make_distiller(replace(CONFIG, precision="bf16"))
    expected = precise.initial_probe.named()
    assert fast.initial_probe.named() == pytest.approx(expected, rel=0.1, abs=0.02)
    assert all(math.isfinite(value) for value in fast.run_round().losses.values())


@pytest.mark.parametrize("ema", [-0.1, 1.0, math.nan])
def test_a_decay_that_is_none_is_refused(ema: float) -> None:
    with pytest.raises(ValueError, match="ema must be"):
        DistillerConfig(ema=ema)


@pytest.mark.parametrize("name", ["rounds", "steps_per_round", "accumulate"])
def test_no_rounds_steps_and_batches_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        DistillerConfig(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engines_settings_reach_the_policies_that_know_them(policy: str) -> None:
    made = make_distiller(replace(CONFIG, bandit=BanditConfig(policy, min_share=0.2, gamma=0.7))).policy
    assert made.arms == (16 if policy in FACTORED else 2)
    own = make_policy(policy, arms=made.arms)
    discounts = policy in ("discounted_thompson", "linear_thompson", "discounted_ucb", "exp3s", "epsilon_greedy")
    for name, setting, known in (("min_share", 0.2, hasattr(own, "min_share")), ("gamma", 0.7, discounts)):
        if known:
            assert getattr(made, name) == setting
    option = make_distiller(replace(CONFIG, bandit=BanditConfig(gamma=0.7, options={"gamma": 0.9}))).policy
    assert option == make_policy("discounted_thompson", arms=2, gamma=0.9, min_share=BanditConfig.min_share)


def test_two_plain_models_are_distilled_in_a_few_lines() -> None:
    """The snippet of the README."""

    class Net(nn.Module):
        def __init__(self, width: int, layers: int) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(nn.Linear(8 if i == 0 else width, width) for i in range(layers))
            self.head = nn.Linear(width, 3)

        def forward(self, batch: tuple[Tensor, Tensor], wanted: WantedTaps) -> Forward:
            (x, labels), taps = batch, []
            for i, layer in enumerate(self.encoder):
                x = layer(x).relu()
                if i in wanted.get("encoder", ()):
                    taps.append(LayerTap(x))
            logits = self.head(x.mean(dim=1))
            return Forward(F.cross_entropy(logits, labels), LogitPrediction(logits), {"encoder": tuple(taps)})

    def load(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(step))
        return x, x.mean(dim=1)[:, :3].argmax(dim=-1)

    torch.manual_seed(0)
    teacher, student = Net(64, 4).eval(), Net(16, 2)
    encoder = ModulePair("encoder", student_layers=2, teacher_layers=4, student_width=16, teacher_width=64)
    config = DistillerConfig(rounds=6, steps_per_round=5, objective=ObjectiveConfig(attention=0))
    distiller = Distiller(student, student, teacher, [encoder], load, load(10**6), config)
    start = distiller.initial_probe.named()
    records: list[RoundRecord] = [distiller.run_round() for _ in range(6)]
    assert records[-1].probe["hidden/encoder/1"] < start["hidden/encoder/1"]
    assert records[-1].probe["task"] < start["task"]


@pytest.mark.parametrize("first", [1.0, 7.0])
def test_an_objectives_weight_is_how_hard_a_part_pulls_beside_the_predictions(first: float, seed: int) -> None:
    """Gradients of the first step, by autograd, at the weights that the round's record tells."""
    asked = {"hidden": 0.3, "attention": 2.5}
    config = replace(CONFIG, bandit=BanditConfig("all_modules"), objective=ObjectiveConfig(**asked), steps_per_round=1)
    config = replace(config, strength_first=first, strength_last=0.2)
    distiller = make_distiller(config, seed)
    fresh = make_distiller(config, seed).training
    record = distiller.run_round()
    losses = fresh.losses(load(0), {"front": None, "back": None})
    student = [p for p in fresh.student.parameters() if p.ndim]

    def norm(loss: Tensor) -> float:
        found = torch.autograd.grad(loss, student, retain_graph=True, allow_unused=True)
        return math.sqrt(sum(float((x.double() ** 2).sum()) for x in found if x is not None))

    predictions = norm(fresh.objective.total({group: x for group, x in losses.items() if group.module is None}))
    parts = [group for group in losses if group.module is not None]
    assert len(parts) == 4
    for group in parts:
        alone = norm(losses[group].mean())
        weight = record.weights[f"{group.kind}/{group.module}"]
        assert weight * alone == pytest.approx(first * asked[group.kind] * predictions, rel=1e-3)
