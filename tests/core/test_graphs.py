"""Recorded steps learn as launched ones do; on a CPU, where the recording runs the work again. See also tests/gpu."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from plain_models import MODULES, QUICK, Batch, TwoModules, load, make_distiller
from torch import Tensor

from optima_core import BanditConfig, Distiller, DistillerConfig, OptimaError, Step
from optima_core.ahead import TeacherAhead
from optima_core.graphs import WARM_UP, ReplayedStep, Work
from optima_core.objective import Gates, LossVector

# A learning rate that float32 holds exactly, as the recordings' tensor must.
CONFIG = DistillerConfig(optimiser=replace(QUICK, learning_rate=2.0**-7, schedule="constant"), ema=0.5)


def tensors_of(step: Step[Any]) -> list[Tensor]:
    """Everything that a step changes, live."""
    states = [x for state in step.optimiser.state.values() for x in state.values() if isinstance(x, Tensor)]
    return [*(p.detach() for p in step.trained), *states]


class Again:
    """Replays by running the work again, into the same losses. What it is asked is noted; a recording runs nothing."""

    def __init__(self, step: Step[Any]) -> None:
        self.step = step
        self.asked: list[str] = []

    def warm(self, work: Work) -> LossVector:
        self.asked.append("warm")
        return work()

    def record(self, work: Work) -> tuple[Callable[[], None], LossVector]:
        self.asked.append("record")
        live = tensors_of(self.step)
        before = [tensor.clone() for tensor in live]
        found = work()
        for tensor, old in zip(live, before, strict=True):
            tensor.copy_(old)

        def replay() -> None:
            self.asked.append("replay")
            found.values.copy_(work().values)

        return replay, found


def make_steps(config: DistillerConfig = CONFIG, seed: int = 0) -> tuple[Step[Any], ReplayedStep[Any]]:
    """One to launch and one to replay, of equal models."""
    steps = []
    for _ in range(2):
        torch.manual_seed(seed)
        teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1)
        steps.append(Step(student, student, teacher, MODULES, config))
    return steps[0], ReplayedStep(steps[1], Again(steps[1]))


def asked(replayed: ReplayedStep[Any]) -> list[str]:
    assert isinstance(replayed.recorder, Again)
    return replayed.recorder.asked


FRONT, BOTH = {"front": None}, {"front": None, "back": None}
ARMS: list[Gates] = [*(FRONT,) * 6, *(BOTH,) * 6, FRONT, BOTH, FRONT]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_are_launched_ones_bit_for_bit(accumulate: int, seed: int) -> None:
    launched, replayed = make_steps(replace(CONFIG, accumulate=accumulate), seed)
    for i, gates in enumerate(ARMS):
        batches = [load(accumulate * i + k) for k in range(accumulate)]
        ours, theirs = launched.run(batches, gates), replayed.run(batches, gates)
        assert ours.terms == theirs.terms
        assert torch.equal(ours.values, theirs.values), i
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(launched), tensors_of(replayed.step), strict=True))
    assert launched.average is not None
    assert replayed.step.average is not None
    for x, y in zip(launched.average.module.parameters(), replayed.step.average.module.parameters(), strict=True):
        assert torch.equal(x, y)


def test_each_set_of_modules_is_recorded_once_and_then_replayed() -> None:
    _, replayed = make_steps()
    for i, gates in enumerate(ARMS):
        replayed.run([load(i)], gates)
    one = [*["warm"] * WARM_UP, "record", *["replay"] * (6 - WARM_UP)]
    assert asked(replayed) == [*one, *one, *["replay"] * 3]


def test_a_falling_learning_rate_reaches_the_recordings(seed: int) -> None:
    config = replace(CONFIG, rounds=1, steps_per_round=12, optimiser=replace(QUICK, learning_rate=0.1))
    launched, replayed = make_steps(config, seed)
    for i in range(12):
        ours, theirs = launched.run([load(i)], BOTH), replayed.run([load(i)], BOTH)
        torch.testing.assert_close(theirs.values, ours.values, rtol=1e-4, atol=1e-5)
    rate = replayed.step.optimiser.param_groups[0]["lr"]
    assert rate == launched.optimiser.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_losses_of_a_step_stay_when_the_next_is_replayed() -> None:
    _, replayed = make_steps()
    found = [replayed.run([load(i)], BOTH).values for i in range(7)]
    assert len({tuple(values.tolist()) for values in found}) == 7


def test_a_batch_of_another_shape_is_learnt_from_without_a_recording_and_said_once(seed: int) -> None:
    launched, replayed = make_steps(seed=seed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(9):
            x, labels = load(i)
            batch = (x[:5], labels[:5]) if i in (6, 7) else (x, labels)
            assert torch.equal(launched.run([batch], BOTH).values, replayed.run([batch], BOTH).values)
    assert [str(warning.message) for warning in said] == [
        "cuda_graphs: batches differ in shape; steps on such batches are not replayed"
    ]
    assert asked(replayed).count("record") == 1
    assert asked(replayed).count("replay") == 9 - WARM_UP - 2


@dataclass
class Box:
    """No structure that torch knows to look into."""

    batch: Batch


def test_what_is_no_structure_of_tensors_is_learnt_from_as_it_is(seed: int) -> None:
    torch.manual_seed(seed)
    teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1)
    forwards = (lambda box, wanted, model=model: model(box.batch, wanted) for model in (student, teacher))
    step: Step[Box] = Step(student, *forwards, MODULES, CONFIG)
    replayed = ReplayedStep(step, Again(step))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(6):
            replayed.run([Box(load(i))], BOTH)
    assert [str(warning.message).partition(";")[0] for warning in said] == [
        "cuda_graphs: a batch holds a Box, which is no tensor and no structure of tensors"
    ]
    assert asked(replayed) == []


def test_what_cannot_be_recorded_ends_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _, replayed = make_steps()

    def refuse(self: Again, work: Work) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmany more lines")

    monkeypatch.setattr(Again, "record", refuse)
    for i in range(WARM_UP):
        replayed.run([load(i)], FRONT)
    with pytest.raises(
        OptimaError, match=r"^cuda_graphs: the step of front cannot be recorded \(operation not perm"
    ) as told:
        replayed.run([load(9)], FRONT)
    assert "\n" not in str(told.value)


ROUNDS = DistillerConfig(rounds=6, steps_per_round=4, optimiser=CONFIG.optimiser, bandit=BanditConfig(arms="subsets"))


def teacher_of(distiller: Distiller[Batch]) -> TwoModules:
    forward = distiller.training.teacher_forward
    teacher = forward.forward if isinstance(forward, TeacherAhead) else forward
    assert isinstance(teacher, TwoModules)
    return teacher


def replaying(config: DistillerConfig, seed: int) -> Distiller[Batch]:
    distiller = make_distiller(config, seed)
    distiller._replayed = ReplayedStep(distiller.training, Again(distiller.training))
    return distiller


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rounds_of_replayed_steps_have_the_records_of_launched_ones(accumulate: int, seed: int) -> None:
    config = replace(ROUNDS, accumulate=accumulate)
    launched, replayed = make_distiller(config, seed), replaying(config, seed)
    assert [replayed.run_round() for _ in range(6)] == [launched.run_round() for _ in range(6)]


def test_a_loaded_state_is_recorded_anew(seed: int) -> None:
    """The optimiser's state lies elsewhere then."""
    config = replace(ROUNDS, bandit=BanditConfig("all_modules"))
    whole, loaded = replaying(config, seed), replaying(config, seed + 1)
    # The same data and teacher, or their rewards would differ.
    theirs, ours = (teacher_of(distiller) for distiller in (loaded, whole))
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        whole.run_round()
        loaded.run_round()
    loaded.load_state_dict(copy.deepcopy(whole.state_dict()))
    losses = [[distiller.run_round().losses for _ in range(3)] for distiller in (whole, loaded)]
    assert losses[0] == losses[1]
    assert loaded._replayed is not None
    assert asked(loaded._replayed).count("record") == 2


@pytest.mark.parametrize(
    "other", [{"compile": True}, {"read_arm": False}, {"optimiser": replace(QUICK, implementation="apex")}]
)
def test_what_recordings_exclude_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs and .* exclude each other"):
        DistillerConfig(cuda_graphs=True, **other)
