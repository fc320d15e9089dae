"""`hidden_mse`: every backend against the float64 reference, and how it behaves as a torch loss."""

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import Fenced, assert_agree, assert_close
from torch import Tensor

from optima_kernels import hidden_mse, hidden_mses, reference
from optima_kernels.hidden import operator
from optima_kernels.hidden.problem import Layer

pytest.importorskip("triton")
from optima_kernels.hidden.triton_products import splits_of

BACKENDS = ["blocked", "triton"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


class Problem:
    """Random arguments of one `hidden_mse` call."""

    def __init__(
        self,
        leading: tuple[int, ...] = (2, 5),
        d_s: int = 7,
        d_t: int = 11,
        *,
        projected: bool = True,
        biased: bool = True,
        normalize: str | None = None,
        masked: bool = False,
        weighted: bool = False,
        gated: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        d_t = d_t if projected else d_s
        self.h_s = torch.randn(*leading, d_s, device=device).to(dtype)
        self.h_t = torch.randn(*leading, d_t, device=device).to(dtype)
        self.weight = torch.randn(d_t, d_s, device=device).to(dtype) if projected else None
        self.bias = torch.randn(d_t, device=device).to(dtype) if projected and biased else None
        self.options: dict[str, Any] = {"normalize": normalize}
        if masked:
            self.options["mask"] = torch.rand(leading, device=device) < 0.6
        if weighted:
            self.options["sample_weight"] = torch.rand(leading[0], device=device)
        if gated:
            self.options["gate"] = torch.rand((), device=device) + 0.5

    def solve(self, backend: str) -> dict[str, Tensor]:
        """The loss and its gradients; "oracle" is the reference in float64."""
        function = reference.hidden_mse if backend == "oracle" else hidden_mse
        options = self.options if backend == "oracle" else {**self.options, "backend": backend}
        wide = backend == "oracle"
        leaves = {
            name: (x.double() if wide else x).detach().clone().requires_grad_()
            for name in ("h_s", "weight", "bias")
            if (x := getattr(self, name)) is not None
        }
        loss = function(
            leaves["h_s"],
            self.h_t.double() if wide else self.h_t,
            leaves.get("weight"),
            leaves.get("bias"),
            **options,
        )
        (loss * 3.0).backward()
        return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


class Layers:
    """Random arguments of one `hidden_mses` call of layers that look alike."""

    def __init__(self, gates: Sequence[float] | None, tokens: int, d_s: int, d_t: int, **options: Any) -> None:
        self.layers = 3 if gates is None else len(gates)
        self.student = {
            "h_s": [torch.randn(tokens, d_s) for _ in range(self.layers)],
            "weight": [torch.randn(d_t, d_s) for _ in range(self.layers)],
            "bias": [torch.randn(d_t) for _ in range(self.layers)],
        }
        self.h_t = [torch.randn(tokens, d_t) for _ in range(self.layers)]
        self.options = {"gate": None if gates is None else torch.tensor(gates), **options}

    def solve(self, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The losses, and the gradients of a sum in which each has another factor; "oracle" is the reference."""
        if backend == "oracle":
            function, dtype, options = reference.hidden_mses, torch.float64, self.options
        else:
            function, options = hidden_mses, self.options | {"backend": backend}
        leaves = {name: [x.to(dtype, copy=True).requires_grad_() for x in xs] for name, xs in self.student.items()}
        losses = function(**leaves, h_t=[x.to(dtype) for x in self.h_t], **options)
        (losses * torch.arange(1, self.layers + 1)).sum().backward()
        gradients = {f"{name} {i}": x.grad for name, xs in leaves.items() for i, x in enumerate(xs)}
        return {"losses": losses.detach(), **{name: x for name, x in gradients.items() if x is not None}}

    def assert_right(self, backend: str, what: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        actual, exact = self.solve(backend, dtype), self.solve("oracle")
        assert_agree(actual, exact, TOLERANCE[dtype], lambda: self.solve("oracle"), dtype, f"{backend} {what}")
        return actual


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written yet holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


problems = st.fixed_dictionaries(
    {
        "leading": st.one_of(
            st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 4), st.integers(1, 37)), st.just((2, 3, 5))
        ),
        "d_s": st.integers(1, 70),
        "d_t": st.integers(1, 70),
        "projected": st.booleans(),
        "biased": st.booleans(),
        "normalize": st.sampled_from([None, "layernorm", "l2"]),
        "masked": st.booleans(),
        "weighted": st.booleans(),
        "gated": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    }
)


def assert_right(backend: str, problem: Problem, what: str = "") -> None:
    dtype, actual, exact = problem.h_s.dtype, problem.solve(backend), problem.solve("oracle")
    assert_agree(actual, exact, TOLERANCE[dtype], lambda: problem.solve("oracle"), dtype, f"{backend} {what}")


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=problems, draw=st.integers(0, 2**31))
def test_loss_and_gradients_match_the_float64_reference(backend: str, arguments: dict[str, Any], draw: int) -> None:
    torch.manual_seed(draw)
    assert_right(backend, Problem(**arguments), f"{arguments}, torch seed {draw}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_beyond_one_tile(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima_kernels.hidden.blocked.TILE_ELEMENTS", 256)
    for normalize in (None, "layernorm", "l2"):
        assert_right(backend, Problem((3, 67), 33, 45, normalize=normalize, masked=True, weighted=True), f"seed {seed}")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_tokens_may_hold_nan_and_get_no_gradient(backend: str, seed: int) -> None:
    problem = Problem((3, 9), masked=True)
    expected = problem.solve("oracle")
    for h in (problem.h_s, problem.h_t):
        h[~problem.options["mask"]] = float("nan")
    actual = problem.solve(backend)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-5, f"{name}, seed {seed}")
    assert not actual["h_s"][~problem.options["mask"]].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("normalize", [None, "layernorm", "l2"])
def test_all_tokens_masked_gives_zero(backend: str, normalize: str | None, seed: int) -> None:
    problem = Problem(normalize=normalize)
    problem.options["mask"] = torch.zeros(2, 5, dtype=torch.bool)
    for name, value in problem.solve(backend).items():
        assert not value.any(), f"{name}, seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_their_guard_bands_stay_unread_and_unwritten(backend: str, seed: int) -> None:
    for normalize, projected in ((None, True), ("layernorm", True), (None, False), ("l2", False)):
        problem = Problem((2, 37), 45, 67, normalize=normalize, projected=projected)
        tensors = {"h_s": problem.h_s, "h_t": problem.h_t, "weight": problem.weight, "bias": problem.bias}
        fences = {name: Fenced(x) for name, x in tensors.items() if x is not None}
        leaves = {name: fence.tensor.requires_grad_(name != "h_t") for name, fence in fences.items()}
        loss = hidden_mse(**leaves, normalize=normalize, backend=backend)  # type: ignore[arg-type]
        loss.backward()
        expected = problem.solve("oracle")
        assert_close(loss.detach(), expected["loss"], 1e-5, f"loss, seed {seed}")
        for name, fence in fences.items():
            fence.assert_untouched(name)
            if name != "h_t":
                gradient = leaves[name].grad
                assert gradient is not None
                assert_close(gradient, expected[name] / 3.0, 1e-5, f"{name}, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_gives_the_same_bits(backend: str, seed: int) -> None:
    problem = Problem((4, 33), 40, 50, masked=True)
    first, second = problem.solve(backend), problem.solve(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend: str, seed: int) -> None:
    h_s = torch.randn(7, 6, 2).permute(2, 1, 0).requires_grad_()
    h_t = torch.randn(1, 6, 9).expand(2, 6, 9)
    weight = torch.randn(7, 9).t().requires_grad_()
    mask = torch.rand(6) < 0.7
    actual = hidden_mse(h_s, h_t, weight, mask=mask, backend=backend)
    expected = reference.hidden_mse(h_s, h_t, weight, mask=mask)
    for a, e in zip(
        torch.autograd.grad(actual, (h_s, weight)), torch.autograd.grad(expected, (h_s, weight)), strict=True
    ):
        assert_close(a, e, 1e-5, f"gradient, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_different_shapes_and_a_gate_each(backend: str, seed: int) -> None:
    shapes = [((2, 5), 7, 11), ((2, 5), 7, 11), ((3, 4), 9, 6), ((2, 5), 7, 11)]
    layers = [Problem(*shape) for shape in shapes]
    gate = torch.tensor([1.0, 0.0, 0.5, 2.0])
    names = ("h_s", "h_t", "weight", "bias")
    arguments = [[getattr(layer, name).detach().clone() for layer in layers] for name in names]
    for i in (0, 2, 3):
        for x in arguments[i]:
            x.requires_grad_()
    leaves = [x for i in (0, 2, 3) for x in arguments[i]]
    coefficient = torch.rand(len(layers))
    actual = hidden_mses(*arguments, gate=gate, backend=backend)
    expected = reference.hidden_mses(*arguments, gate=gate)
    assert_close(actual.detach(), expected.detach(), 1e-5, f"losses, seed {seed}")
    gradients = torch.autograd.grad((actual * coefficient).sum(), leaves)
    for a, e in zip(gradients, torch.autograd.grad((expected * coefficient).sum(), leaves), strict=True):
        assert_close(a, e, 1e-5, f"gradient, seed {seed}", floor=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_gives_zero_loss_and_gradients(backend: str, seed: int) -> None:
    problem = Problem()
    problem.options["gate"] = torch.zeros(())
    assert all(not value.any() for value in problem.solve(backend).values()), f"seed {seed}"


def test_a_closed_gate_costs_nothing_on_a_cpu(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima_kernels.hidden.blocked._difference", lambda *_: pytest.fail("worked"))
    problem = Problem()
    problem.options["gate"] = torch.zeros(())
    assert all(not value.any() for value in problem.solve("blocked").values()), f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_survive_a_small_loss_with_a_loss_scale(backend: str, seed: int) -> None:
    problem = Problem((8, 64), 16, 64, dtype=torch.float16)
    wide = Problem((8, 64), 16, 64)
    for name in ("h_s", "h_t", "weight", "bias"):
        setattr(wide, name, getattr(problem, name).float())
    scale = 2.0**14
    leaf = problem.h_s.clone().requires_grad_()
    loss = hidden_mse(leaf, problem.h_t, problem.weight, problem.bias, backend=backend) * scale
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert_close(gradient / scale, wide.solve("oracle")["h_s"] / 3.0, 2e-3, f"gradient of h_s, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_through_a_retained_graph(backend: str, seed: int) -> None:
    problem = Problem()
    leaf = problem.h_s.clone().requires_grad_()
    loss = hidden_mse(leaf, problem.h_t, problem.weight, backend=backend)
    (first,) = torch.autograd.grad(loss * 2.0, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2.0, leaf)
    assert torch.equal(first, second), f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_means_no_graph(backend: str, seed: int) -> None:
    problem = Problem()
    leaf = problem.h_s.clone().requires_grad_()
    with torch.no_grad():
        assert not hidden_mse(leaf, problem.h_t, problem.weight, backend=backend).requires_grad
    teacher = problem.h_t.clone().requires_grad_()
    hidden_mse(leaf, teacher, problem.weight, backend=backend).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("normalize", [None, "layernorm", "l2"])
def test_gradcheck_in_float64(normalize: str | None, seed: int) -> None:
    h_s, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    h_t, mask = torch.randn(4, 5, dtype=torch.float64), torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda *x: hidden_mse(x[0], h_t, *x[1:], normalize=normalize, mask=mask, backend="blocked"), (h_s, weight, bias)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", ["compile", "functorch"])
def test_gradients_under(transform: str, backend: str, seed: int) -> None:
    problem = Problem(masked=True)
    expected = problem.solve("oracle")["h_s"] / 3.0

    def loss(h_s: Tensor) -> Tensor:
        return hidden_mse(h_s, problem.h_t, problem.weight, problem.bias, **problem.options, backend=backend)

    if transform == "compile":
        leaf = problem.h_s.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    else:
        gradient = torch.func.grad(loss)(problem.h_s)
    assert_close(gradient, expected, 1e-5, f"{transform}, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_autocast_rounds_the_operands_of_products_and_nothing_else(
    gated: bool, backend: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would for `F.mse_loss(F.linear(h_s, weight, bias), h_t)`, but summed in float32."""
    problem = Problem((3, 11), 9, 13, masked=True, gated=gated)
    module = import_module(f"optima_kernels.hidden.{backend}")
    reached: list[Layer] = []

    def spy(layers: Sequence[Layer], *arguments: Any) -> Any:
        reached.extend(layers)
        return solve(layers, *arguments)

    solve = module.solve
    monkeypatch.setattr(module, "solve", spy)
    operator._solver.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        actual = problem.solve(backend)
    operator._solver.cache_clear()
    assert [None if x is None else x.dtype for x in reached[0][:4]] == [torch.bfloat16, torch.float32] * 2
    assert all(x.dtype == torch.float32 for x in actual.values())

    for name in ("h_s", "weight"):
        setattr(problem, name, getattr(problem, name).bfloat16().float())
    expected = problem.solve("oracle")
    assert_agree(actual, expected, 2e-2, lambda: problem.solve("oracle"), torch.bfloat16, f"seed {seed}")
    if backend == "blocked":  # which does not round the projected state either
        assert_close(actual["loss"], expected["loss"], 1e-6, f"loss, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [None, "layernorm"])
def test_operator_passes_opcheck(normalize: str | None, backend: str, seed: int) -> None:
    problem = Problem((6,), normalize=normalize)
    h_s, weight, bias = (x.requires_grad_() for x in (problem.h_s, problem.weight, problem.bias) if x is not None)
    alone = torch.randn(6, 11, requires_grad=True)
    none = torch.empty(0)
    lists = [[h_s, alone], [problem.h_t, torch.randn(6, 11)], [weight, none], [bias, none], [None, None]]
    arguments = (*lists, [True, True, True, True, False, False], None, normalize, backend, torch.ones(2))
    torch.library.opcheck(torch.ops.optima_kernels.hidden_mses.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h_t": torch.zeros(2, 4, 11)}, "h_t must have shape (2, 5, 11)"),
        ({"weight": torch.zeros(7, 11)}, "weight must have shape (11, 7)"),
        ({"weight": None, "bias": None}, "weight must be given, of shape (11, 7)"),
        ({"weight": None, "h_t": torch.zeros(2, 5, 7)}, "bias must be None"),
        ({"bias": torch.zeros(7)}, "bias must have shape (11,)"),
        ({"normalize": "batch"}, "normalize must be one of"),
        ({"mask": torch.ones(2, 5)}, "mask must be a bool tensor"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must broadcast to"),
        ({"sample_weight": torch.ones(3)}, "sample_weight must have shape (2,)"),
        ({"gate": torch.ones(2)}, "gate must have shape ()"),
        ({"h_s": torch.zeros(2, 5, 7, dtype=torch.int64)}, "h_s must be floating point"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    problem = Problem()
    arguments = {"h_s": problem.h_s, "h_t": problem.h_t, "weight": problem.weight, "bias": problem.bias, **change}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        hidden_mse(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_with_and_without_a_projection(compiled: bool, backend: str, seed: int) -> None:
    h_s = [torch.randn(5, 7, requires_grad=True) for _ in range(3)]
    h_t = [torch.randn(5, 7) for _ in range(3)]
    weight = [torch.randn(7, 7, requires_grad=True), None, torch.randn(7, 7, requires_grad=True)]
    bias = [torch.randn(7, requires_grad=True), None, torch.randn(7, requires_grad=True)]
    leaves = [*h_s, *(x for x in (*weight, *bias) if x is not None)]

    def total() -> Tensor:
        return hidden_mses(h_s, h_t, weight, bias, backend=backend).square().sum()

    function = torch.compile(total, fullgraph=True, backend="aot_eager") if compiled else total
    gradients = torch.autograd.grad(function(), leaves)
    expected = torch.autograd.grad(reference.hidden_mses(h_s, h_t, weight, bias).square().sum(), leaves)
    for a, e in zip(gradients, expected, strict=True):
        assert_close(a, e, 1e-5, f"seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", [None, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (2.0, 0.0, 0.5)])
@pytest.mark.parametrize("normalize", [None, "layernorm"])
def test_gates_open_closed_and_mixed(
    normalize: str | None, gates: Sequence[float] | None, backend: str, poisoned: None, seed: int
) -> None:
    mask = torch.rand(75) < 0.7
    layers = Layers(gates, 75, 20, 45, normalize=normalize, mask=mask)
    actual = layers.assert_right(backend, f"seed {seed}")
    for i, gate in enumerate(gates or ()):
        if gate == 0.0:
            assert not any(actual[f"{name} {i}"].any() for name in ("h_s", "weight", "bias"))
            assert actual["losses"][i] == 0.0


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_sums_are_right_and_the_same_every_time(
    dtype: torch.dtype, splits: int, poisoned: None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima_kernels.hidden.triton_products.splits_of", lambda tiles, steps: splits)
    layers = Layers((1.0, 0.0, 0.5), 170, 20, 45)
    first = layers.assert_right("triton", f"{splits} splits, seed {seed}", dtype)
    again = layers.solve("triton", dtype)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_sums_are_split_where_tiles_are_few() -> None:
    assert splits_of(tiles=2, steps=300) > splits_of(tiles=48, steps=300) > splits_of(tiles=528, steps=300) == 1
    assert splits_of(tiles=1, steps=2) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradients_of_more_rows_than_a_program_takes(backend: str, poisoned: None, seed: int) -> None:
    for gates in (None, (1.0, 2.0)):
        Layers(gates, 200, 5, 300, sample_weight=torch.rand(200)).assert_right(backend, f"seed {seed}")


@pytest.mark.parametrize("gates", [None, (1.0, 0.0, 0.5)])
@pytest.mark.parametrize("normalize", [None, "layernorm", "l2"])
def test_rows_too_wide_for_registers(
    normalize: str | None, gates: Sequence[float] | None, poisoned: None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima_kernels.hidden.triton.WIDEST_ROW", 16)
    monkeypatch.setattr("optima_kernels.hidden.triton.WIDE_COLUMNS", 16)
    mask = torch.rand(20) < 0.7
    Layers(gates, 20, 7, 45, normalize=normalize, mask=mask).assert_right("triton", f"seed {seed}")
    Layers(gates, 20, 7, 45, normalize=normalize).assert_right("triton", f"seed {seed}")
    assert_right("triton", Problem((3, 9), 45, projected=False, normalize=normalize, masked=True), f"seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_that_start_anywhere_and_have_gaps(gated: bool, backend: str, seed: int) -> None:
    h_s, h_t = torch.randn(40, 61)[:, 3:40], torch.randn(41, 70)[1:, 1:46]
    weight, bias = torch.randn(37, 47).t()[1:46], torch.randn(91)[1::2]
    options: dict[str, Any] = {"gate": torch.tensor(0.5)} if gated else {}
    leaves = [x.requires_grad_() for x in (h_s, weight, bias)]
    actual = torch.autograd.grad(hidden_mse(h_s, h_t, weight, bias, backend=backend, **options), leaves)
    wide = [x.detach().double().requires_grad_() for x in (h_s, weight, bias)]
    expected = torch.autograd.grad(reference.hidden_mse(wide[0], h_t.double(), *wide[1:], **options), wide)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5, f"seed {seed}")


def test_float64_is_not_for_triton() -> None:
    arguments = [torch.zeros(2, 3, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(ValueError, match=r"not float64; use backend="):
        hidden_mse(*arguments, backend="triton")
