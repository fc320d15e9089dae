"""`linear_kl` and `prediction_kl`: against the float64 reference, at the edges of float, and as torch losses."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import Fenced, assert_agree, assert_close
from torch import Tensor

from optima_kernels import linear_kl, prediction_kl, reference
from optima_kernels.logits import blocked as blocked_logits
from optima_kernels.logits import triton as triton_logits

BACKENDS = ["blocked", "triton"]
DIVERGENCES = ["forward", "reverse", "jsd"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
LEAVES = ("h_s", "w_s", "bias_s")


class Problem:
    """Random arguments of one `linear_kl` call."""

    def __init__(
        self,
        tokens: int = 9,
        vocabulary: int = 37,
        d_s: int = 7,
        d_t: int = 11,
        *,
        biased: bool = False,
        labelled: bool = False,
        weighted: bool = False,
        masked: bool = False,
        gated: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        shapes = {"h_s": (tokens, d_s), "w_s": (vocabulary, d_s), "h_t": (tokens, d_t), "w_t": (vocabulary, d_t)}
        if biased:
            shapes |= {"bias_s": (vocabulary,), "bias_t": (vocabulary,)}
        self.tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        self.dtype, self.options = dtype, options
        if labelled:
            labels = torch.randint(0, vocabulary, (tokens,))
            self.options["labels"] = torch.where(torch.rand(tokens) < 0.7, labels, -100)
            if weighted:
                self.options["label_weight"] = float(torch.rand(()) * 2.0)
        if masked:
            self.options["mask"] = torch.rand(tokens) < 0.6
        if gated:
            self.options["gate"] = torch.rand(()) + 0.5

    def solve(self, backend: str, scale: float = 1.0) -> dict[str, Tensor]:
        """Losses, and the gradients of a weighted sum of them; "oracle" is the reference in float64."""
        wide = backend == "oracle"
        tensors = {name: (x.double() if wide else x).detach().clone() for name, x in self.tensors.items()}
        leaves = {name: tensors[name].requires_grad_() for name in LEAVES if name in tensors}
        function = reference.linear_kl if wide else linear_kl
        options = {
            name: x for name, x in self.options.items() if not (wide and name in ("budget_bytes", "label_weight"))
        }
        losses = function(**tensors, **options, **({} if wide else {"backend": backend}))
        divergence, cross_entropy = losses if isinstance(losses, tuple) else (losses, None)
        weights = (3.0, 3.0 * self.options["label_weight"]) if "label_weight" in self.options else (3.0, 2.0)
        if wide or "label_weight" not in self.options:
            total = divergence * weights[0] + (0.0 if cross_entropy is None else cross_entropy * weights[1])
        else:
            assert cross_entropy is not None
            assert not cross_entropy.requires_grad
            total = divergence * 3.0
            divergence = divergence - self.options["label_weight"] * cross_entropy
        gradients = torch.autograd.grad(total * scale, leaves.values())
        solution = {"divergence": divergence.detach(), **dict(zip(leaves, gradients, strict=True))}
        return solution if cross_entropy is None else {**solution, "cross_entropy": cross_entropy.detach()}


problems = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "vocabulary": st.integers(1, 300),
        "d_s": st.integers(1, 40),
        "d_t": st.integers(1, 40),
        "biased": st.booleans(),
        "labelled": st.booleans(),
        "masked": st.booleans(),
        "gated": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        "weighted": st.booleans(),
        "divergence": st.sampled_from(DIVERGENCES),
        "temperature": st.floats(0.5, 20.0),
        "beta": st.floats(0.05, 0.95),
    }
)


def assert_right(backend: str, problem: Problem, what: str = "") -> None:
    dtype, actual, exact = problem.dtype, problem.solve(backend), problem.solve("oracle")
    assert_agree(actual, exact, TOLERANCE[dtype], lambda: problem.solve("oracle"), dtype, f"{backend} {what}")


@pytest.mark.parametrize("backend", BACKENDS)
@given(arguments=problems, draw=st.integers(0, 2**31))
def test_losses_and_gradients_match_the_float64_reference(backend: str, arguments: dict[str, Any], draw: int) -> None:
    torch.manual_seed(draw)
    assert_right(backend, Problem(**arguments), f"{arguments}, torch seed {draw}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gated", [False, True])
def test_tokens_beyond_one_block(
    gated: bool, divergence: str, backend: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima_kernels.logits.blocked.CACHED_ELEMENTS", 3 * 203)
    monkeypatch.setattr("optima_kernels.logits.triton.PART_TOKENS", 3)
    monkeypatch.setattr("optima_kernels.logits.triton.LEAST_PART_BYTES", 0)
    for labelled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        problem = Problem(
            41, 203, divergence=divergence, biased=True, masked=True, labelled=labelled, gated=gated, dtype=dtype
        )
        problem.options["budget_bytes"] = 16 * 256 * 2 * dtype.itemsize
        assert_right(backend, problem, f"labelled {labelled}, {dtype}, seed {seed}")


@pytest.mark.parametrize("budget", [1, 10**4, 10**5, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_a_chunk_stay_within_the_budget(
    dtype: torch.dtype, budget: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[int, int] = {}
    scratch = triton_logits._scratch

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        made = scratch(*arguments)
        taken.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in made})
        assert len(made[0]) in (1, 50) or sum(taken.values()) > 0.5 * budget
        return made

    monkeypatch.setattr(triton_logits, "_scratch", counted)
    assert_right("triton", Problem(50, 203, dtype=dtype, budget_bytes=budget), f"seed {seed}")
    assert sum(taken.values()) <= max(budget, 256 * 10)  # of one token, however small the budget


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 63, 65, 1003])
def test_what_the_padding_of_logits_holds_does_not_matter(
    vocabulary: int, gated: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = triton_logits._scratch

    def poisoned(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        z_s, z_t, gradient = scratch(*arguments)
        return z_s.fill_(math.nan), z_t.fill_(math.nan), gradient.fill_(math.nan)

    monkeypatch.setattr(triton_logits, "_scratch", poisoned)
    for dtype, divergence in zip((torch.float32, torch.bfloat16, torch.float16), DIVERGENCES, strict=True):
        problem = Problem(
            21, vocabulary, divergence=divergence, biased=True, masked=True, labelled=True, gated=gated, dtype=dtype
        )
        assert_right("triton", problem, f"{dtype}, seed {seed}")


@pytest.mark.parametrize("gated", [False, True])
def test_no_launch_has_more_programs_than_a_grid_may(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 tokens of a vocabulary of bytes; a grid's second and third axis end at 65535."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **_: grids.append(grid)

    kernels = [("triton", "row"), *(("triton_products", name) for name in ("product", "join", "column"))]
    for place, kernel in kernels:
        monkeypatch.setattr(f"optima_kernels.logits.{place}.{kernel}_kernel", Recorder())
    problem = Problem(65536, 256, 4, 4, biased=True, gated=gated)
    problem.solve("triton")
    assert grids
    assert all(size <= 65535 for grid in grids for size in grid[1:])
    assert all(grid[0] < 2**31 for grid in grids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float16_student_near_its_teacher_keeps_its_gradient(backend: str, seed: int) -> None:
    """The gradient in the logits is a difference of two probabilities of 1e-5, alike to a hundredth: 1e-7, which is the
    smallest number in float16."""
    vocabulary, d = 128256, 16
    problem = Problem(4, vocabulary, d, d, dtype=torch.float16, temperature=2.0)
    head = torch.randn(vocabulary, d) * d**-0.5
    problem.tensors["w_t"] = head.half()
    problem.tensors["w_s"] = (head + 0.01 * d**-0.5 * torch.randn(vocabulary, d)).half()
    problem.tensors["h_s"] = problem.tensors["h_t"] * 1.0
    for scale in (1.0, 4.0):
        problem.tensors["h_s"] *= scale
        problem.tensors["h_t"] *= scale
        # The gradient that is handed out is in float16 itself, and so needs a loss scale.
        actual, exact = problem.solve(backend, scale=1024.0), problem.solve("oracle", scale=1024.0)
        assert_close(actual["h_s"], exact["h_s"], 1e-2, f"state, logits of {scale}, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabulary", [2, 700])
def test_a_divergence_of_second_order_keeps_its_digits(
    vocabulary: int, divergence: str, backend: str, seed: int
) -> None:
    """At T = 20 the maps are nearly flat: probabilities that differ by r leave a divergence of r^2 / 2."""
    problem = Problem(1, vocabulary, 8, 8, divergence=divergence, temperature=20.0)
    value, exact = problem.solve(backend)["divergence"], problem.solve("oracle")["divergence"]
    assert_close(value, exact, 1e-5, f"seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_logits_of_ten_thousand(temperature: float, divergence: str, backend: str, seed: int) -> None:
    problem = Problem(8, 101, 4, 4, divergence=divergence, temperature=temperature, labelled=True)
    for name, x in problem.tensors.items():
        # Small integers times a power of two: logits are exact, so only the loss itself is tested.
        problem.tensors[name] = x.mul(2).round().clamp(-5, 5) * (16.0 if name.startswith("h") else 32.0)
    assert (problem.tensors["h_s"] @ problem.tensors["w_s"].t()).abs().max() > 5e3
    assert_right(backend, problem, f"seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_hot_teacher_and_student(divergence: str, backend: str, seed: int) -> None:
    problem = Problem(6, 37, 37, 37, divergence=divergence)
    hot = F.one_hot(torch.randint(0, 37, (6,)), 37).float() * 1e4
    problem.tensors.update(h_t=hot, w_t=torch.eye(37), w_s=torch.eye(37))
    assert_right(backend, problem, f"teacher, seed {seed}")
    problem.tensors["h_s"] = hot.roll(1, dims=1)
    assert_right(backend, problem, f"both, at different answers, seed {seed}")
    problem.tensors["h_s"] = hot.clone()
    assert all(not value.any() for value in problem.solve(backend).values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one_word(divergence: str, backend: str, seed: int) -> None:
    solution = Problem(5, 1, divergence=divergence, labelled=True, biased=True).solve(backend)
    assert all(not value.any() for value in solution.values()), f"seed {seed}"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_counted_gives_zero(backend: str, seed: int) -> None:
    masked = Problem(labelled=True, mask=torch.zeros(9, dtype=torch.bool))
    assert all(not value.any() for value in masked.solve(backend).values()), f"seed {seed}"
    ignored = Problem(labels=torch.full((9,), -100))
    solution, without = ignored.solve(backend), ignored.solve("oracle")
    assert not solution["cross_entropy"].any()
    assert_close(solution["h_s"], without["h_s"], 1e-5, f"h_s, seed {seed}")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("labelled", [False, True])
def test_masked_tokens_may_hold_nan_and_get_no_gradient(labelled: bool, backend: str, seed: int) -> None:
    problem = Problem(labelled=labelled, mask=torch.arange(9) % 3 > 0)
    expected = problem.solve("oracle")
    for name in ("h_s", "h_t"):
        problem.tensors[name][::3] = float("nan")
    actual = problem.solve(backend)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-5, f"{name}, seed {seed}")
    assert not actual["h_s"][::3].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inputs_and_their_guard_bands_stay_unread_and_unwritten(divergence: str, backend: str, seed: int) -> None:
    for labelled in (False, True):
        problem = Problem(19, 75, 13, 9, biased=True, labelled=labelled, divergence=divergence)
        expected = problem.solve("oracle")
        fences = {name: Fenced(x) for name, x in problem.tensors.items()}
        problem.tensors = {name: fence.tensor for name, fence in fences.items()}
        leaves = [problem.tensors[name].requires_grad_() for name in LEAVES]
        losses = linear_kl(**problem.tensors, **problem.options, backend=backend)
        total = losses[0] * 3.0 + losses[1] * 2.0 if isinstance(losses, tuple) else losses * 3.0
        for name, gradient in zip(LEAVES, torch.autograd.grad(total, leaves), strict=True):
            assert_close(gradient, expected[name], 1e-5, f"{name}, seed {seed}")
        for name, fence in fences.items():
            fence.assert_untouched(name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_gives_the_same_bits(backend: str, seed: int) -> None:
    problem = Problem(33, 130, masked=True, labelled=True)
    first, second = problem.solve(backend), problem.solve(backend)
    assert all(torch.equal(first[name], second[name]) for name in first), f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_strided_and_expanded_inputs(backend: str, seed: int) -> None:
    h_s = torch.randn(7, 6, 2).permute(2, 1, 0).requires_grad_()
    h_t = torch.randn(1, 6, 5).expand(2, 6, 5)
    w_s = torch.randn(7, 19).t().requires_grad_()
    w_t = torch.randn(38, 5)[::2]
    labels, mask = torch.randint(0, 19, (2, 6)), torch.rand(6) < 0.7
    for options in ({"mask": mask}, {"mask": mask, "labels": labels}):
        actual = linear_kl(h_s, w_s, h_t, w_t, **options, backend=backend)  # type: ignore[arg-type]
        expected = reference.linear_kl(h_s, w_s, h_t, w_t, **options)  # type: ignore[arg-type]
        gradients = (
            torch.autograd.grad(sum(loss) if isinstance(loss, tuple) else loss, (h_s, w_s))
            for loss in (actual, expected)
        )
        for a, e in zip(*gradients, strict=True):
            assert_close(a, e, 1e-5, f"gradient, seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_closed_gate_gives_zero_losses_and_gradients(labelled: bool, backend: str, seed: int) -> None:
    solution = Problem(labelled=labelled, gate=torch.zeros(())).solve(backend)
    assert all(not value.any() for value in solution.values()), f"seed {seed}"


@pytest.mark.parametrize("labelled", [False, True])
def test_a_closed_gate_costs_nothing_on_a_cpu(labelled: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima_kernels.logits.blocked._solve", lambda *_: pytest.fail("worked"))
    solution = Problem(labelled=labelled, gate=torch.zeros(())).solve("blocked")
    assert all(not value.any() for value in solution.values()), f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labelled", [False, True])
def test_backward_twice_through_a_retained_graph(labelled: bool, backend: str, seed: int) -> None:
    problem = Problem(labelled=labelled)
    leaf = problem.tensors["h_s"].requires_grad_()
    losses = linear_kl(**problem.tensors, **problem.options, backend=backend)
    total = sum(losses) if isinstance(losses, tuple) else losses
    (first,) = torch.autograd.grad(total * 2.0, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total * 2.0, leaf)
    assert torch.equal(first, second), f"seed {seed}"


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_in_float64(divergence: str, labelled: bool, seed: int) -> None:
    problem = Problem(4, 6, 3, 2, biased=True, labelled=labelled, divergence=divergence, temperature=1.7, beta=0.3)
    tensors = {name: x.double() for name, x in problem.tensors.items()}
    problem.options["mask"] = torch.tensor([True, False, True, True])

    def losses(*leaves: Tensor) -> Any:
        return linear_kl(**{**tensors, **dict(zip(LEAVES, leaves, strict=True))}, **problem.options, backend="blocked")

    assert torch.autograd.gradcheck(losses, [tensors[name].requires_grad_() for name in LEAVES]), f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("transform", ["compile", "functorch"])
def test_gradients_under(transform: str, labelled: bool, backend: str, seed: int) -> None:
    problem = Problem(labelled=labelled, masked=True, biased=True)
    others = {name: x for name, x in problem.tensors.items() if name != "h_s"}

    def loss(h_s: Tensor) -> Tensor:
        losses = linear_kl(h_s=h_s, **others, **problem.options, backend=backend)
        return losses[0] * 3.0 + losses[1] * 2.0 if isinstance(losses, tuple) else losses * 3.0

    leaf = problem.tensors["h_s"].clone().requires_grad_()
    if transform == "compile":
        (gradient,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    else:
        gradient = torch.func.grad(loss)(leaf.detach())
    assert_close(gradient, problem.solve("oracle")["h_s"], 1e-5, f"{transform}, seed {seed}")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("labelled", "weighted"), [(False, False), (True, False), (True, True)])
def test_autocast_rounds_states_and_heads_and_nothing_else(
    labelled: bool, weighted: bool, dtype: torch.dtype, backend: str, seed: int
) -> None:
    problem = Problem(masked=True, biased=True, labelled=labelled, weighted=weighted)
    with torch.autocast("cpu", dtype):
        actual = problem.solve(backend)
    assert all(actual[name].dtype == torch.float32 for name in LEAVES)
    for name in ("h_s", "w_s", "h_t", "w_t"):
        problem.tensors[name] = problem.tensors[name].to(dtype).float()
    exact = problem.solve("oracle")
    tolerance = TOLERANCE[dtype if backend == "triton" else torch.float32]
    # Eager's gradients of what it rounded are rounded, too.
    rounded = backend == "reference"
    for name in exact:
        assert_close(actual[name], exact[name], TOLERANCE[dtype] if rounded else tolerance, f"{name}, seed {seed}")


def test_a_head_is_taken_in_the_dtype_of_its_state(seed: int) -> None:
    problem = Problem(dtype=torch.bfloat16, biased=True)
    for name in ("w_s", "bias_s", "w_t"):
        problem.tensors[name] = problem.tensors[name].float()
    actual, exact = problem.solve("triton"), problem.solve("oracle")
    assert actual["w_s"].dtype == torch.float32
    assert_agree(actual, exact, 2e-2, lambda: problem.solve("oracle"), torch.bfloat16, f"seed {seed}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_known_label_weight_makes_the_logits_once(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[object] = []
    module = {"blocked": "optima_kernels.logits.blocked", "triton": "optima_kernels.logits.triton"}[backend]
    inner = {"blocked": blocked_logits, "triton": triton_logits}[backend]._solve
    monkeypatch.setattr(f"{module}._solve", lambda *arguments: solved.append(arguments) or inner(*arguments))
    Problem(labelled=True).solve(backend)
    assert len(solved) == 2, f"seed {seed}"
    problem = Problem(labelled=True, label_weight=0.0)
    assert_right(backend, problem, f"weight 0, seed {seed}")
    assert len(solved) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend: str, seed: int) -> None:
    problem = Problem(5, 7, biased=True)
    tensors = [problem.tensors[name] for name in ("h_s", "w_s", "bias_s", "h_t", "w_t", "bias_t")]
    student = [x.requires_grad_() for x in tensors[:3]]
    labels = torch.randint(-1, 7, (5,))
    for tokens in ([torch.rand(5) < 0.5, labels, torch.rand(2)], [None, None, None]):
        options = ([True, True, True], None, 2.0, "jsd", 0.3, 0.5, None, backend)
        arguments = (student, tensors[3:], tokens, torch.ones(()), *options)
        torch.library.opcheck(torch.ops.optima_kernels.linear_kl.default, arguments)
        torch.library.opcheck(torch.ops.optima_kernels.linear_kl_losses_apart.default, arguments)


@pytest.mark.parametrize(("divergence", "beta"), [("forward", 1e-4), ("reverse", 1 - 1e-4)])
def test_generalised_jensen_shannon_divergence_tends_to_a_kullback_leibler(
    divergence: str, beta: float, seed: int
) -> None:
    z_s, z_t = torch.randn(2, 9, 37).double()
    limit = prediction_kl(z_s, z_t, divergence=divergence)
    near = prediction_kl(z_s, z_t, divergence="jsd", beta=beta) / min(beta, 1 - beta)
    assert_close(near, limit, 1e-2, f"{divergence}, seed {seed}")


def test_forward_divergence_is_that_of_torch(seed: int) -> None:
    h_s, w_s, h_t, w_t = (x.double() for x in Problem().tensors.values())
    z_s, z_t = h_s @ w_s.t() / 2.0, h_t @ w_t.t() / 2.0
    expected = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean") * 4.0
    assert torch.allclose(prediction_kl(2.0 * z_s, 2.0 * z_t, temperature=2.0), expected), f"seed {seed}"


@given(draw=st.integers(0, 2**31), divergence=st.sampled_from(DIVERGENCES), temperature=st.floats(0.5, 20.0))
def test_prediction_kl_is_linear_kl_of_identity_heads(draw: int, divergence: str, temperature: float) -> None:
    torch.manual_seed(draw)
    z_s, z_t = torch.randn(2, 6, 13).double() * 5.0
    expected = reference.linear_kl(
        z_s, torch.eye(13).double(), z_t, torch.eye(13).double(), temperature=temperature, divergence=divergence
    )
    assert isinstance(expected, Tensor)
    actual = prediction_kl(z_s, z_t, temperature=temperature, divergence=divergence)
    assert torch.allclose(actual, expected), f"torch seed {draw}"


def test_prediction_kl_weighs_samples_and_obeys_its_gate(seed: int) -> None:
    z_s, z_t = torch.randn(2, 4, 3, 13)
    weight = torch.tensor([0.0, 1.0, 0.0, 3.0])
    rows = torch.stack([prediction_kl(z_s[i], z_t[i]) for i in (1, 3)])
    expected = 0.5 * (rows[0] + 3.0 * rows[1]) / 4.0
    actual = prediction_kl(z_s, z_t, sample_weight=weight, gate=torch.tensor(0.5))
    assert math.isclose(actual, expected, rel_tol=1e-5), f"seed {seed}"
    assert prediction_kl(z_s, z_t, sample_weight=torch.zeros(4)) == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_prediction_kl_of_many_logits_matches_the_reference(
    weighted: bool, dtype: torch.dtype, divergence: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optima_kernels.logits.predictions.CACHED_ELEMENTS", 4 * 3129)
    z_s, z_t = (torch.randn(6, 3, 3129).mul(3.0).to(dtype) for _ in range(2))
    options: dict[str, Any] = {"temperature": 2.0, "divergence": divergence, "beta": 0.3, "gate": torch.tensor(0.5)}
    if weighted:
        options["sample_weight"] = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])
    leaf, exact_leaf = z_s.clone().requires_grad_(), z_s.double().requires_grad_()
    loss = prediction_kl(leaf, z_t, **options)
    exact = reference.prediction_kl(exact_leaf, z_t.double(), **options)
    assert_close(loss.detach(), exact.detach(), 1e-5, f"loss, seed {seed}")
    (gradient,) = torch.autograd.grad(3.0 * loss, leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(3.0 * exact, exact_leaf)
    assert gradient.dtype == dtype
    assert_close(gradient, expected, 1e-2 if dtype == torch.bfloat16 else 1e-5, f"gradient, seed {seed}")
    (again,) = torch.autograd.grad(3.0 * loss, leaf)
    assert torch.equal(gradient, again), f"seed {seed}"


@pytest.mark.parametrize("transform", ["compile", "functorch", "autocast"])
def test_gradients_of_prediction_kl_under(transform: str, seed: int) -> None:
    z_s, z_t = torch.randn(2, 12, 3129)
    leaf = z_s.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.prediction_kl(leaf, z_t), leaf)

    def loss(z: Tensor) -> Tensor:
        return prediction_kl(z, z_t)

    if transform == "compile":
        (gradient,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    elif transform == "functorch":
        gradient = torch.func.grad(loss)(z_s)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(gradient, expected, 1e-5, f"{transform}, seed {seed}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_t": torch.zeros(36, 11)}, "w_t must have as many rows as w_s, 37, not 36"),
        ({"w_s": torch.zeros(37, 8)}, "w_s must have shape (37, 7)"),
        ({"h_t": torch.zeros(8, 11)}, "h_t must have shape (9, 11)"),
        ({"bias_s": torch.zeros(36)}, "bias_s must have shape (37,)"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "jsd", "beta": 1.0}, "beta must lie strictly between 0 and 1, not be 1.0"),
        ({"labels": torch.zeros(9)}, "labels must be int64"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "labels must have shape (9,)"),
        ({"mask": torch.zeros(9)}, "mask must be a bool tensor"),
        ({"gate": torch.ones(9)}, "gate must have shape ()"),
        ({"label_weight": 0.5}, "label_weight=0.5 needs labels"),
        ({"label_weight": -1.0, "labels": torch.zeros(9, dtype=torch.int64)}, "label_weight must be finite"),
        ({"budget_bytes": 0}, "budget_bytes must be positive, not 0"),
        ({"h_t": torch.zeros(9, 11).double(), "backend": "triton"}, 'backend="triton" takes float32'),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        linear_kl(**{**Problem().tensors, **change})
    if change.keys() <= {"temperature", "divergence", "beta"}:
        with pytest.raises(ValueError, match=re.escape(message)):
            prediction_kl(torch.zeros(2, 3), torch.zeros(2, 3), **change)
