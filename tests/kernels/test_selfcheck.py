"""The check before the first use on a GPU: it passes what is right, catches what is wrong, harms nobody, asks once."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import optima_kernels
from optima.commands import doctor
from optima_kernels.shared import selfcheck, selfcheck_process, variants
from optima_kernels.shared.dispatch import INTERPRETED, choose_backend
from optima_kernels.shared.selfcheck_process import Answer

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a kernel is broken by replacing it in the interpreter")
EVERYTHING = selfcheck.everything_usual()
LOSS, VARIANT = "hidden_mses", variants.usual("hidden_mses")[-1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is known yet, on disk or in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(selfcheck.VARIABLE, raising=False)
    selfcheck._is_trusted.cache_clear()
    yield tmp_path / "cache"
    selfcheck._is_trusted.cache_clear()
    end_processes()


def end_processes() -> None:
    for process in selfcheck_process._running:
        process.end()
    selfcheck_process._running.clear()


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[str]]:
    """Sets what the other process will answer; returns the variants that it is asked for."""

    def answer(given: Answer) -> list[str]:
        asked: list[str] = []

        def ask(loss: str, variant: str, device: torch.device) -> Answer:
            asked.append(variant)
            return given

        monkeypatch.setattr(selfcheck_process, "ask", ask)
        return asked

    return answer


def backend_of(variant: str = VARIANT, loss: str = LOSS) -> str:
    """What a loss runs on when the caller names no backend and its tensors lie on a GPU."""
    tensor: Any = SimpleNamespace(is_cuda=True, device=CPU)
    return choose_backend(None, tensor, loss, lambda: variant)


@pytest.mark.parametrize(("loss", "variant"), EVERYTHING if not INTERPRETED else EVERYTHING[1::4])
def test_kernels_as_they_are_pass(loss: str, variant: str, device: torch.device) -> None:
    outcome = selfcheck.check_here(loss, variant, device)
    assert outcome.verdict == "right", outcome
    assert outcome.error is not None
    assert 0 < outcome.error < 3e-2


@interpreted
@pytest.mark.parametrize("broken", ["a gradient", "a loss", "the next layer", "not finite", "unstable"])
def test_a_kernel_that_computes_something_else_is_wrong(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, calls = selfcheck_process._solve, [0]

    def spoilt(loss: str, problem: Any, backend: str, device: torch.device) -> dict[str, torch.Tensor]:
        found = solve(loss, problem, backend, device)
        calls[0] += 1
        gradient = next(name for name in found if name != "the loss")
        if backend == "triton" and broken == "a gradient":
            found[gradient] = found[gradient] * 1.1
        elif backend == "triton" and broken == "a loss":
            found["the loss"] = found["the loss"] * 1.1
        elif backend == "triton" and broken == "the next layer":
            found[gradient] = found[gradient].roll(found[gradient].numel() // 3)
        elif backend == "triton" and broken == "not finite":
            found[gradient][-1] = torch.nan
        elif backend == "triton" and broken == "unstable":
            found[gradient][0] += 1e-6 * calls[0]
        return found

    monkeypatch.setattr(selfcheck_process, "_solve", spoilt)
    outcome = selfcheck.check_here(LOSS, VARIANT, CPU)
    assert outcome.verdict == "wrong", outcome
    assert outcome.detail


@interpreted
def test_a_kernel_that_does_not_fit_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise triton.runtime.errors.OutOfResources(264192, 232448, "shared memory")

    monkeypatch.setattr(selfcheck_process, "_solve", fail)
    outcome = selfcheck.check_here(LOSS, VARIANT, CPU)
    assert (outcome.verdict, outcome.passed) == ("unusable", False)
    assert "shared memory" in outcome.detail


def test_a_full_memory_says_nothing_about_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(selfcheck_process, "_solve", fail)
    assert selfcheck.check_here(LOSS, VARIANT, CPU).verdict == "unknown"


@interpreted
def test_another_process_answers_and_is_asked_again(cache: Path) -> None:
    first = selfcheck.check_anew(LOSS, VARIANT, CPU)
    assert first.verdict == "right", first
    process = selfcheck_process._running[0].popen.pid
    assert selfcheck.check_anew(LOSS, VARIANT, CPU) == first
    assert selfcheck_process._running[0].popen.pid == process
    (file,) = cache.rglob("*.json")
    kept = json.loads(file.read_text())
    assert (kept["loss"], kept["variant"], kept["verdict"]) == (LOSS, VARIANT, "right")
    assert kept["ptxas"] == selfcheck_process.ptxas_version()


PROGRAMS = {
    "dies": ("import os; input(); os.abort()", "unusable", "ended with status -6"),
    "dies saying why": ("import sys; input(); sys.exit('illegal memory access')", "unusable", "illegal memory access"),
    "says something before": (
        """print(input()); print('answer: {"verdict": "right", "error": 0.5, "detail": ""}', flush=True); input()""",
        "right",
        "",
    ),
    "never answers": ("import time; time.sleep(60)", "unknown", "no answer came within 2 seconds"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_becomes_of_the_other_process_is_the_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, verdict, words = PROGRAMS[name]
    monkeypatch.setattr(selfcheck_process, "COMMAND", (sys.executable, "-c", textwrap.dedent(program)))
    monkeypatch.setattr(selfcheck_process, "ANSWER_SECONDS", 2.0 if name == "never answers" else 30.0)
    answer = selfcheck_process.ask(LOSS, VARIANT, CPU)
    assert answer.verdict == verdict
    assert words in answer.detail


def test_modules_of_the_current_folder_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('it ran')")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(Path(optima_kernels.__file__).parents[1])
    found = subprocess.run(
        selfcheck_process.COMMAND,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_a_process_that_cannot_be_started_finds_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck_process, "COMMAND", ("/no/such/program",))
    assert selfcheck_process.ask(LOSS, VARIANT, CPU).verdict == "unknown"


def test_a_process_that_ended_for_idleness_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """input(); print('answer: {"verdict": "right"}', flush=True)"""
    monkeypatch.setattr(selfcheck_process, "COMMAND", (sys.executable, "-c", program))
    for _ in range(3):
        assert selfcheck_process.ask(LOSS, VARIANT, CPU).verdict == "right"


@pytest.mark.parametrize("verdict", ["wrong", "unusable"])
def test_kernels_that_fail_are_not_used_and_that_is_said_once(
    verdict: Any, answered: Callable[[Answer], list[str]]
) -> None:
    asked = answered(Answer(verdict, 0.5, "the loss has a relative error of 5.0e-01"))
    with pytest.warns(RuntimeWarning) as caught:
        assert backend_of() == "blocked"
    (message,) = (str(warning.message) for warning in caught)
    for words in (LOSS, VARIANT, "falls back", verdict, "relative error of 5.0e-01"):
        assert words in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_of() == "blocked"
    assert asked == [VARIANT]


def test_what_could_not_be_found_out_leaves_kernels_in_use_and_is_said(
    answered: Callable[[Answer], list[str]],
) -> None:
    answered(Answer("unknown", detail="the memory is taken"))
    with pytest.warns(RuntimeWarning, match="used unchecked on .*: the memory is taken"):
        assert backend_of() == "triton"


@pytest.mark.parametrize(
    ("verdict", "is_kept"), [("right", True), ("wrong", True), ("unusable", False), ("unknown", False)]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_only_verdicts_about_numbers_outlive_the_process(
    verdict: Any, is_kept: bool, cache: Path, answered: Callable[[Answer], list[str]]
) -> None:
    asked = answered(Answer(verdict, 0.5, "" if verdict == "right" else "something"))
    backend_of()
    selfcheck._is_trusted.cache_clear()  # as a new process would start
    backend_of()
    assert len(asked) == (1 if is_kept else 2)
    assert len(list(cache.rglob("*.json"))) == is_kept


def test_every_variant_is_checked_for_itself(answered: Callable[[Answer], list[str]]) -> None:
    asked = answered(Answer("right", 1e-3))
    first, second = variants.usual("linear_kl")[:2]
    for variant in (first, second, first):
        assert backend_of(variant, "linear_kl") == "triton"
    assert asked == [first, second]


@pytest.mark.parametrize("changed", ["gpu", "torch", "triton", "ptxas", "code"])
def test_another_gpu_version_or_code_is_checked_anew(
    changed: str, monkeypatch: pytest.MonkeyPatch, answered: Callable[[Answer], list[str]]
) -> None:
    asked = answered(Answer("right", 1e-3))
    assert backend_of() == "triton"
    selfcheck._is_trusted.cache_clear()
    if changed in ("torch", "triton"):
        monkeypatch.setattr({"torch": torch, "triton": triton}[changed], "__version__", "99.0")
    else:
        name = {"gpu": "_name", "ptxas": "ptxas_version", "code": "_digest"}[changed]
        monkeypatch.setattr(selfcheck, name, lambda *_: "another")
    assert backend_of() == "triton"
    assert len(asked) == 2


def test_the_variable_skips_and_forces(
    monkeypatch: pytest.MonkeyPatch, answered: Callable[[Answer], list[str]]
) -> None:
    asked = answered(Answer("right", 1e-3))
    monkeypatch.setenv(selfcheck.VARIABLE, "skip")
    assert backend_of() == "triton"
    assert asked == []
    monkeypatch.setenv(selfcheck.VARIABLE, "auto")
    backend_of()
    monkeypatch.setenv(selfcheck.VARIABLE, "force")
    backend_of()
    backend_of()
    assert len(asked) == 2
    monkeypatch.setenv(selfcheck.VARIABLE, "never")
    with pytest.raises(ValueError, match="must be auto, skip or force, not 'never'"):
        backend_of()


def test_while_a_graph_is_captured_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, answered: Callable[[Answer], list[str]]
) -> None:
    asked = answered(Answer("wrong", 1.0, "wrong"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert selfcheck.is_trusted(LOSS, VARIANT, torch.device("cuda", 0))
    assert asked == []


def test_many_threads_ask_once(answered: Callable[[Answer], list[str]]) -> None:
    asked = answered(Answer("right", 1e-3))
    threads = [threading.Thread(target=backend_of) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_a_choice_inside_a_compiled_graph_is_checked(answered: Callable[[Answer], list[str]]) -> None:
    asked = answered(Answer("right", 1e-3))
    tensor: Any = SimpleNamespace(is_cuda=True, device=CPU)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if choose_backend(None, tensor, LOSS, lambda: VARIANT) == "triton" else x

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == 1
    assert asked == [VARIANT]


def test_a_directory_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: Callable[[Answer], list[str]]
) -> None:
    answered(Answer("right", 1e-3))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert backend_of() == "triton"


def test_doctor_prints_every_outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answered: Callable[[Answer], list[str]]
) -> None:
    monkeypatch.setattr(doctor, "INTERPRETED", True)
    asked = answered(Answer("wrong", 0.5, "off by a half"))
    monkeypatch.setenv("COLUMNS", "300")
    doctor.check_kernels()
    said = capsys.readouterr().out
    assert len(asked) == len(EVERYTHING)
    assert said.count("wrong: off by a half") == len(EVERYTHING)


def draws(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def asked_by(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The loss and the variant that a call on a GPU would ask for."""
    asked: list[tuple[str, str]] = []

    def choose(backend: str | None, tensor: torch.Tensor, loss: str, variant: Callable[[], str]) -> str:
        asked.append((loss, variant()))
        return "blocked"

    for module in (optima_kernels.attention, optima_kernels.hidden, optima_kernels.logits):
        monkeypatch.setattr(module, "choose_backend", choose)
    call()
    return asked[0]


@interpreted
def test_calls_ask_for_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every variant that a call asks for has a problem."""
    maps = draws(q_s=(2, 4, 5, 24), k_s=(2, 4, 5, 24), q_t=(2, 4, 5, 64), k_t=(2, 4, 5, 64))
    few = maps | {name: x[:, :2] for name, x in maps.items() if name[0] == "k"}
    states = draws(h_s=(3, 5, 8), h_t=(3, 5, 12), weight=(12, 8), bias=(12,))
    heads = draws(h_s=(5, 8), w_s=(19, 8), h_t=(5, 12), w_t=(19, 12))
    gate, keep = torch.ones(()), torch.ones(5, dtype=torch.bool)
    labels = torch.zeros(5, dtype=torch.int64)
    attention, hidden, linear = optima_kernels.attention_map_loss, optima_kernels.hidden_mse, optima_kernels.linear_kl
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: attention(**maps, gate=gate), "kind=kl mean=0 causal=0 mask=none gate=1 grouped=0 widths=32,64"),
        (lambda: attention(**maps, kind="mse", causal=True, mask=keep), "kind=mse causal=1 mask=bool gate=0"),
        (lambda: attention(**maps, heads="relation", relation_heads=2), "mean=0 widths=64,128"),
        (lambda: attention(**maps, heads="mean", mask=torch.zeros(5)), "mean=1 mask=additive"),
        (lambda: attention(**few, key_lengths=torch.tensor([3, 4])), "grouped=1 lengths=1 dtypes=bf16,bf16"),
        (lambda: attention(**maps, lse_t=torch.zeros(2, 4, 5)), "lse=01"),
        (lambda: hidden(**states, normalize="l2", mask=keep), "normalize=l2 weight=1 bias=1 counted=1 gate=0 row=0"),
        (lambda: hidden(states["h_t"], states["h_t"], gate=gate), "normalize=none weight=0 bias=0 gate=1 row=16"),
        (lambda: linear(**heads, divergence="reverse"), "divergence=reverse labels=none whole=0 dtypes=bf16,bf16"),
        (lambda: linear(**heads, labels=labels, label_weight=0.5), "labels=weighted"),
        (lambda: linear(**heads, labels=labels, gate=gate), "labels=apart gate=1"),
    ]
    for call, expected in calls:
        loss, variant = asked_by(call, monkeypatch)
        assert set(expected.split()) <= set(variant.split()), variant
        options = dict(pair.split("=") for pair in variant.split())
        assert options.keys() == variants.DEFAULTS[loss].keys()
        problem = variants.problem_of(loss, variant)
        again = partial(getattr(optima_kernels, loss), **problem.arguments)
        assert asked_by(again, monkeypatch) == (loss, variant)


@interpreted
@pytest.mark.parametrize(("loss", "variant"), EVERYTHING)
def test_a_variants_problem_takes_the_variant(loss: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = variants.problem_of(loss, variant)
    asked = asked_by(lambda: getattr(optima_kernels, loss)(**problem.arguments), monkeypatch)
    assert asked == (loss, variant)
