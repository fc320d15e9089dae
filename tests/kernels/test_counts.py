"""What every kernel reads, writes and computes, counted in the interpreter and held to the floors of its loss."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optima_kernels import attention_map_loss, hidden_mse, linear_kl
from optima_kernels.shared.dispatch import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from optima_kernels.hidden import triton_rows as hidden_kernels  # noqa: E402
from optima_kernels.inspect.counts import OUTSIDE, Launch, counting, tilings_of  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in Triton's interpreter")

FLOAT = 4  # bytes
N, WIDTH = 64, 16  # queries and keys: whole tiles
TOKENS, D_S, D_T = 64, 32, 96
ROWS, VOCABULARY, D = 8, 1000, 8
PADDED = 1024  # words of a row of logits in scratch memory


def attention(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    tensors = [torch.randn(1, 2, N, WIDTH, dtype=dtype, requires_grad=i < 2) for i in range(4)]
    return attention_map_loss(*tensors, kind=kind, backend="triton", **options)


def hidden(normalize: str | None, *, projected: bool, **options: Any) -> Tensor:
    h_s, h_t = torch.randn(TOKENS, D_S if projected else D_T, requires_grad=True), torch.randn(TOKENS, D_T)
    weight = torch.randn(D_T, D_S, requires_grad=True) if projected else None
    return hidden_mse(h_s, h_t, weight, normalize=normalize, backend="triton", **options)


def vocabulary(divergence: str, *, labelled: bool = False, **options: Any) -> Tensor:
    h_s, h_t = torch.randn(ROWS, D, requires_grad=True), torch.randn(ROWS, D)
    heads = torch.randn(2, VOCABULARY, D)
    labels = torch.randint(0, VOCABULARY, (ROWS,)) if labelled else None
    loss = linear_kl(
        h_s, heads[0].requires_grad_(), h_t, heads[1], labels=labels, divergence=divergence, backend="triton", **options
    )
    return sum(loss) if isinstance(loss, tuple) else loss


FAMILIES: dict[str, Callable[..., Tensor]] = {
    "attention kl": lambda **options: attention("kl", **options),
    "attention mse": lambda **options: attention("mse", **options),
    "hidden": lambda **options: hidden(None, projected=True, **options),
    "hidden layernorm": lambda **options: hidden("layernorm", projected=True, **options),
    "rows": lambda **options: hidden(None, projected=False, **options),
    "rows l2": lambda **options: hidden("l2", projected=False, **options),
    "forward": lambda **options: vocabulary("forward", **options),
    "reverse": lambda **options: vocabulary("reverse", **options),
    "jsd": lambda **options: vocabulary("jsd", **options),
    "forward and cross entropy": lambda **options: vocabulary("forward", labelled=True, **options),
}
# Kernels without a product that see every number once, which nothing but memory should bind; by family.
STREAMS = {"row_kernel": ("rows", "hidden"), "scale_kernel": ("rows", "hidden")}


@pytest.fixture(scope="module")
def counted() -> dict[str, list[Launch]]:
    """The launches of each family, forward and backward."""
    result = {}
    for name, loss in FAMILIES.items():
        with counting() as launches:
            (2.0 * loss()).backward()  # a gradient of 1 would leave nothing to scale
        result[name] = launches
    return result


def of(launches: list[Launch], kernel: str) -> list[Launch]:
    return [launch for launch in launches if launch.kernel == kernel]


def test_every_kernel_is_counted(counted: dict[str, list[Launch]]) -> None:
    kernels = {launch.kernel for launches in counted.values() for launch in launches}
    attention = {"lse_kernel", "query_kernel", "online_kernel", "key_kernel"}
    hidden = {"row_kernel", "join_rows_kernel", "scale_kernel"}
    assert kernels == attention | hidden  # rows of logits have a kernel of the same name as rows of states


def test_no_access_is_outside_of_an_argument(counted: dict[str, list[Launch]]) -> None:
    for name, launches in counted.items():
        for launch in launches:
            assert OUTSIDE not in launch.loaded | launch.stored, f"{name}, {launch.kernel}"


def test_two_exps_per_map_element_and_walk(counted: dict[str, list[Launch]]) -> None:
    elements = 2 * N * N
    kl, mse = ([x for x in counted[f"attention {kind}"] if x.kernel != "scale_kernel"] for kind in ("kl", "mse"))
    assert [(launch.kernel, launch.exps) for launch in kl] == [
        ("online_kernel", 2 * elements),
        ("key_kernel", 2 * elements),
    ]
    assert [launch.exps for launch in of(mse, "query_kernel") + of(mse, "key_kernel")] == [2 * elements] * 3
    # One an element, and one a row and key tile.
    assert [launch.exps for launch in of(mse, "lse_kernel")] == [pytest.approx(elements, rel=0.05)] * 2


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_walk_begins_anew_only_where_scores_outgrow_those_of_its_first_tile(side: str) -> None:
    """By 60 powers of two, at one query of one head."""
    elements = 2 * N * N
    for growth, walked in ((50, elements), (70, elements + 32 * N)):
        tensors = [torch.zeros(1, 2, N, WIDTH) for _ in range(4)]
        q, k = tensors[:2] if side == "student" else tensors[2:]
        q[0, 1, 40, 3], k[0, 1, 50, 3] = 1.0, growth * math.log(2) * WIDTH**0.5
        with counting() as launches:
            attention_map_loss(*tensors, kind="kl", backend="triton")
        assert [(launch.kernel, launch.exps) for launch in launches] == [("online_kernel", 2 * walked)]


def test_known_log_sums_save_their_passes() -> None:
    lse = torch.zeros(1, 2, N)
    with counting() as launches:
        attention("kl", lse_s=lse, lse_t=lse)
    assert [launch.kernel for launch in launches] == ["query_kernel", "key_kernel"]


def test_attention_makes_two_products_of_scores_a_walk_and_one_of_gradients(
    counted: dict[str, list[Launch]],
) -> None:
    product = 2 * 2 * N * N * WIDTH
    mse = counted["attention mse"]
    assert [launch.flops / product for launch in of(mse, "query_kernel") + of(mse, "key_kernel")] == [2, 3, 3]
    (online,), (key,) = (of(counted["attention kl"], kernel) for kernel in ("online_kernel", "key_kernel"))
    # References are another look at the scores of the first of two tiles; the teacher's powers are multiplied, too.
    assert [online.flops / product, key.flops / product] == [4 + 2 / 2, 3]


def test_a_query_walk_reads_queries_once_and_keys_once_a_tile(counted: dict[str, list[Launch]]) -> None:
    size = 2 * N * WIDTH * FLOAT
    names = ("q_s", "q_t", "k_s", "k_t")
    walk, _ = of(counted["attention mse"], "query_kernel")
    assert [walk.loaded[name] for name in names] == [size, size, 2 * size, 2 * size]
    (walk,) = of(counted["attention kl"], "online_kernel")
    assert [walk.loaded[name] for name in names] == [size, size, 3 * size, 3 * size]  # the first of two tiles twice
    assert walk.read["k_s"] == walk.written["grad_q"] == walk.stored["grad_q"] == size


def test_projected_states_cost_three_products_and_one_stored_difference() -> None:
    with counting() as launches:
        hidden(None, projected=True, gate=torch.ones(())).backward()
    products = [launch for launch in launches if launch.flops]
    assert [launch.kernel for launch in products] == ["project_kernel", "state_kernel", "weight_kernel"]
    assert {launch.flops for launch in products} == {2 * TOKENS * D_S * D_T}
    assert products[0].stored["out"] == TOKENS * D_T * FLOAT
    for launch in launches:
        assert launch.stored == launch.written, launch.kernel


@pytest.mark.parametrize("family", ["rows", "rows l2", "hidden layernorm"])
def test_rows_are_read_and_their_gradient_written_once(family: str, counted: dict[str, list[Launch]]) -> None:
    (launch,) = of(counted[family], "row_kernel")
    assert 1.0 <= launch.moved / (3 * TOKENS * D_T * FLOAT) <= 1.15


@pytest.mark.parametrize(
    ("family", "visits", "gradients"),
    [("forward", 2, [1]), ("reverse", 2, [1]), ("jsd", 3, [1]), ("forward and cross entropy", 2, [0, 1])],
)
def test_a_row_of_logits_is_brought_once_and_its_gradient_written_once(
    family: str, visits: int, gradients: list[int], counted: dict[str, list[Launch]]
) -> None:
    """Later visits of a row find it in a cache: a row is one program's. Rows are padded to whole lines of memory."""
    launches = of(counted[family], "row_kernel")
    size = ROWS * PADDED * FLOAT
    assert len(launches) == len(gradients)
    for launch, gradient in zip(launches, gradients, strict=True):
        logits = [name for name in launch.read if name.startswith("z_")]
        assert [launch.read[name] for name in logits] == [size] * 2
        assert [launch.loaded[name] / size for name in logits] == [pytest.approx(visits, rel=0.01)] * 2
        assert launch.stored["z_s/gradient"] == launch.written["z_s/gradient"] == gradient * size


def test_memory_bound_kernels_move_what_they_must(counted: dict[str, list[Launch]]) -> None:
    for name, launches in counted.items():
        for launch in launches:
            if name.startswith(STREAMS.get(launch.kernel, ("no family",))):
                assert launch.moved / launch.floor <= 1.15, f"{name}, {launch.kernel}"


def test_gated_logits_are_made_once_and_written_once() -> None:
    with counting() as launches:
        vocabulary("forward", gate=torch.ones(())).backward()
    student, teacher, state, head = of(launches, "product_kernel")
    for launch in (student, teacher):
        assert launch.stored["out"] == launch.written["out"] == ROWS * PADDED * FLOAT
    assert state.stored["out"] == state.written["out"]
    assert head.stored["out"] == head.written["out"] == VOCABULARY * D * FLOAT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_reads_the_gate_alone(family: str) -> None:
    with counting() as launches:
        FAMILIES[family](gate=torch.zeros(())).backward()
    for launch in launches:
        # Gradients of a closed layer are scaled by a factor of 0.
        assert set(launch.loaded) == {"factors" if launch.kernel == "scale_kernel" else "gate"}, launch.kernel
        assert launch.flops == launch.exps == 0, launch.kernel


@triton.jit
def load_twice(base, o_row, o_column, stride, m_row, m_column, WIDEN: tl.constexpr):
    pointers = base + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
    b_x = tl.load(pointers, mask=m_row[:, None] & m_column[None, :], other=0.0)
    b_x = tl.load(pointers, mask=m_row[:, None] & m_column[None, :], other=0.0)
    return b_x.to(tl.float32)


def test_a_planted_extra_load_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_kernels, "load_tile", load_twice)
    with counting() as launches:
        FAMILIES["rows"]()
    assert launches[0].moved / launches[0].floor > 1.15
    assert launches[0].loaded["x"] == 2 * launches[0].read["x"]


@triton.jit
def doubled_exp(b_p_s, b_p_t, b_row_term, MSE: tl.constexpr, GAIN: tl.constexpr):
    return tl.exp2(b_p_s) - b_p_t


def test_a_planted_exponential_and_a_read_past_the_end_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from optima_kernels.attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "score_gradient", doubled_exp)
    with counting() as launches:
        attention("kl")
    assert of(launches, "key_kernel")[0].exps == 3 * 2 * N * N

    @triton.jit
    def shifted(x, out):
        tl.store(out, tl.load(x + 8))

    with counting() as launches:
        buffer = torch.zeros(9)
        shifted[(1,)](buffer[:8], buffer[:1])
    assert launches[0].loaded == {OUTSIDE: FLOAT}


def test_launches_are_cut_as_on_the_named_gpu() -> None:
    with tilings_of("sm_90"), counting() as launches:
        attention("kl", torch.bfloat16)
    assert [launch.programs for launch in launches] == [2 * N // 64] * 2
    assert of(launches, "online_kernel")[0].loaded["q_s"] == 2 * N * WIDTH * 2
