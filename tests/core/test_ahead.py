"""Steps whose teacher runs ahead in a thread, beside the same steps one after the other."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from plain_models import MODULES, QUICK, Batch, TwoModules, load, make_distiller
from torch import Tensor
from torch.nn import functional as F

from optima_core import BanditConfig, Distiller, DistillerConfig, Forward, LogitPrediction, Ranks, WantedTaps
from optima_core.ahead import TeacherAhead

CONFIG = DistillerConfig(
    rounds=6, steps_per_round=3, optimiser=QUICK, bandit=BanditConfig("round_robin", arms="subsets")
)
PATIENCE = 60.0
"""Seconds after which a thread that was to come has not come."""


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weights(distiller: Distiller[Batch]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in distiller.training.learner.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Watched:
    """A teacher and a `load` that note in which thread they run, and in what state of torch."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.teacher = TwoModules(16, 4, 2).eval()
        self.taught: list[tuple[bool, bool, bool, bool, int]] = []
        self.loaded: list[tuple[bool, bool, bool]] = []

    def __call__(self, batch: Batch, wanted: WantedTaps) -> Forward:
        flash = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        state = torch.is_autocast_enabled("cpu"), flash, torch.is_grad_enabled(), torch.get_num_threads()
        self.taught.append((_here(), *state))
        shown: Forward = self.teacher(batch, wanted)
        return shown

    def load(self, number: int) -> Batch:
        self.loaded.append((_here(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return load(number)


def _here() -> bool:
    return threading.current_thread() is threading.main_thread()


MODES = {
    "fp32": CONFIG,
    "accumulated": replace(CONFIG, accumulate=2, ema=0.5),
    "gates on the device": replace(CONFIG, read_arm=False),
    "bf16": replace(CONFIG, precision="bf16"),
    "fp16": replace(CONFIG, precision="fp16"),
}


@pytest.mark.parametrize("config", MODES.values(), ids=MODES)
def test_no_bit_differs_from_one_after_the_other(config: DistillerConfig, seed: int) -> None:
    ahead = make_distiller(config, seed, dropout=0.2)
    found = [ahead.run_round() for _ in range(6)]
    assert len({record.modules for record in found}) == 3
    after = make_distiller(replace(config, teacher_ahead=False), seed, dropout=0.2)
    torch.set_num_threads(1)  # what the student has of two
    assert [after.run_round() for _ in range(6)] == found
    assert same(weights(ahead), weights(after))
    assert same(ahead.result.state_dict(), after.result.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one(precision: str, seed: int) -> None:
    config = replace(CONFIG, precision=precision)  # type: ignore[arg-type]
    whole = make_distiller(config, seed, dropout=0.2)
    expected = [whole.run_round() for _ in range(6)]
    first = make_distiller(config, seed, dropout=0.2)
    for _ in range(3):
        first.run_round()
    state = first.state_dict()
    resumed = make_distiller(config, seed, dropout=0.2)
    torch.manual_seed(seed + 1)
    resumed.load_state_dict(state)
    assert [resumed.run_round() for _ in range(3)] == expected[3:]
    assert same(weights(whole), weights(resumed))


def test_the_teacher_sees_the_next_batch_while_the_student_learns_one() -> None:
    """The student waits in its forward pass for what a sequential step would show the teacher only later."""
    torch.manual_seed(0)
    teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1)
    begun: list[threading.Event] = [threading.Event() for _ in range(3)]
    numbers = {float(load(i)[0].sum()): i for i in range(3)}
    waited: list[int] = []

    def teach(batch: Batch, wanted: WantedTaps) -> Forward:
        number = numbers.get(float(batch[0].sum()))
        if number is not None:
            begun[number].set()
        shown: Forward = teacher(batch, wanted)
        return shown

    def learn(batch: Batch, wanted: WantedTaps) -> Forward:
        number = numbers.get(float(batch[0].sum()))
        if number is not None and number < 2:
            assert begun[number + 1].wait(PATIENCE)
            waited.append(number)
        shown: Forward = student(batch, wanted)
        return shown

    Distiller(student, learn, teach, MODULES, load, load(10**6), CONFIG).run_round()
    assert waited == [0, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_thread_has_the_arithmetic_of_the_step_and_loads_without_it(precision: str) -> None:
    watched, half = Watched(), precision == "bf16"
    config = replace(CONFIG, precision=precision)  # type: ignore[arg-type]
    distiller = make_distiller(config, load=watched.load, teacher_forward=watched)
    watched.taught.clear()
    watched.loaded.clear()
    distiller.run_round()
    assert watched.taught == [(False, half, not half, False, 1)] * 3
    assert watched.loaded == [(True, False, True), *[(False, False, True)] * 2]  # the first one before the arm is read
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]


def test_between_rounds_nothing_runs_and_threads_are_as_before() -> None:
    before = threading.enumerate()
    distiller = make_distiller(CONFIG)
    for _ in range(2):
        distiller.run_round()
        assert threading.enumerate() == before
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("where", ["load", "teacher", "student"])
def test_an_error_reaches_the_caller_as_it_is_and_ends_the_thread(where: str) -> None:
    before, error = threading.enumerate(), KeyError(where)
    torch.manual_seed(0)
    teacher, student = TwoModules(16, 4, 2).eval(), TwoModules(8, 2, 1)
    calls = {"load": 0, "teacher": 0, "student": 0}

    def count(name: str, limit: int) -> None:
        calls[name] += 1
        if name == where and calls[name] == limit:
            raise error

    def load_or_fail(number: int) -> Batch:
        count("load", 2)
        return load(number)

    def teach(batch: Batch, wanted: WantedTaps) -> Forward:
        count("teacher", 3)  # the probe's comes first
        shown: Forward = teacher(batch, wanted)
        return shown

    def learn(batch: Batch, wanted: WantedTaps) -> Forward:
        count("student", 3)
        shown: Forward = student(batch, wanted)
        return shown

    distiller = Distiller(student, learn, teach, MODULES, load_or_fail, load(10**6), CONFIG)
    with pytest.raises(KeyError) as raised:
        distiller.run_round()
    assert raised.value is error
    assert distiller.step == 1  # the batch before has been learnt
    assert threading.enumerate() == before
    assert torch.get_num_threads() == 2


def test_casts_of_the_students_weights_outlive_the_teachers_autocast() -> None:
    """Cast anew for its second use, a weight would get two rounded gradients in place of one, by chance of time."""
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(2, 8)

    def teach(batch: Tensor, wanted: WantedTaps) -> Forward:
        return Forward(None, LogitPrediction(batch @ batch), {})

    ahead: TeacherAhead[Tensor] = TeacherAhead(teach, "bf16")
    casts = []
    with ahead.batches(iter(torch.randn(3, 4, 4)), {}) as batches, torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            prediction = ahead(batch, {}).prediction
            assert isinstance(prediction, LogitPrediction)
            assert prediction.logits.dtype == torch.bfloat16
            graph = F.linear(x, weight).grad_fn
            assert graph is not None
            transposed = next(node for node, _ in graph.next_functions if node is not None)
            casts.append(transposed.next_functions[0][0])
    assert casts[0] is casts[1] is casts[2]


@pytest.mark.parametrize("case", ["off", "one thread", "compile", "fsdp"])
def test_where_it_does_not_help_the_teacher_runs_in_the_callers_thread(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    config = replace(CONFIG, teacher_ahead=case != "off", compile=case == "compile")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    if case == "one thread":
        torch.set_num_threads(1)
    if case == "fsdp":
        monkeypatch.setattr(Ranks, "sharded", True)
        monkeypatch.setattr(Ranks, "exchange", lambda *_, **__: contextlib.nullcontext())
    distiller = make_distiller(config, load=watched.load, teacher_forward=watched)
    distiller.run_round()
    assert all(here for here, *_ in (*watched.taught, *watched.loaded))
    assert torch.get_num_threads() == (1 if case == "one thread" else 2)
