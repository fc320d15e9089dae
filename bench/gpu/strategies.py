"""The problems of tests/kernels, drawn by hypothesis from a seed and solved on the GPU: small, and rich in edges."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.context import Context, Item
from bench.gpu.lines import ROOT

EXAMPLES = {"attention": 40, "hidden": 100, "linear": 100}  # about as many as a minute allows


def examples(strategy: Any, seed: int, count: int) -> list[Any]:
    """The first `count` that hypothesis makes from the seed."""
    import hypothesis

    found: list[Any] = []
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def keep(example: Any) -> None:
        found.append(example)

    hypothesis.seed(seed)(settings(hypothesis.given(strategy)(keep)))()
    return found


def _tests() -> None:
    """Makes tests/kernels importable."""
    folder = str(ROOT / "tests" / "kernels")
    if folder not in sys.path:
        sys.path.insert(0, folder)


def attention(context: Context) -> Iterator[Item]:
    _tests()
    from attention_problems import cases
    from test_attention import FLOATS, check

    strategy = cases(FLOATS, widths=(16, 24, 40, 64), most_tokens=40)
    for i, case in enumerate(examples(strategy, context.seed, 2 if context.rehearse else EXAMPLES["attention"])):

        def run(case: Any = case) -> dict[str, Any]:
            check(case, "triton", context.device)
            return {"call": str(case)[:300]}

        yield Item(f"attention example {i}", run)


def hidden(context: Context) -> Iterator[Item]:
    _tests()
    import test_hidden

    yield from _of_module(test_hidden, context, "hidden")


def linear(context: Context) -> Iterator[Item]:
    _tests()
    import test_logits

    yield from _of_module(test_logits, context, "linear")


def _of_module(module: Any, context: Context, name: str) -> Iterator[Item]:
    for i, arguments in enumerate(examples(module.problems, context.seed, 2 if context.rehearse else EXAMPLES[name])):

        def run(arguments: Any = arguments, i: int = i) -> dict[str, Any]:
            torch.manual_seed(i)
            problem = module.Problem(**arguments)
            exact = problem.solve("oracle")
            actual = solved_on(context.device, problem)
            dtype = arguments["dtype"]
            from kernel_support import assert_agree

            assert_agree(actual, exact, module.TOLERANCE[dtype], lambda: problem.solve("oracle"), dtype, name)
            return {"call": str(arguments)[:300]}

        yield Item(f"{name} example {i}", run)


def solved_on(device: torch.device, problem: Any) -> dict[str, Tensor]:
    """What the problem's triton backend answers on a device, back on the CPU; the problem itself stays there."""
    before = dict(vars(problem))
    try:
        for name, value in before.items():
            setattr(problem, name, _moved(value, device))
        return {name: x.cpu() for name, x in problem.solve("triton").items()}
    finally:
        vars(problem).update(before)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(x, device) for name, x in value.items()}
    return value
