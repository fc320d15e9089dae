"""What the losses should take on an H100, estimated from what is launched there, beside the same estimate for others.

The project's own launch code runs under a driver that is not there (`optima_kernels.inspect.fake_driver`): it tells
every kernel's grid, how many of its blocks an SM holds, the vendor's products by size, and how many operators of torch
run. A launch takes as long as the slowest of three resources needs, times what its last, partly filled wave costs:

- tensor cores, at the rate that the vendor's own products of such sizes reach (measured, or a data sheet's share);
- schedulers, four an SM: a clock for each instruction of the loop of the compiled SASS that a tile within the map
  executes (what a branch leaps over there is for edges), and eight for each exponential of a warp, in all tiles that
  programs visit. That they add up, and do not overlap, is what an H100 said of maps of 4096 tokens, by the kernels of
  commit b63acce: `lse_kernel` took 0.93 of it, `query_kernel` 1.00 and `key_kernel` 1.14. Those had four and more
  blocks an SM; of `online_kernel`, which has three, or two with heads of 128, no GPU has said how well they hide one
  another's waits. Not counted is its look at the scores of the first tile of keys;
- memory, at the measured bandwidth: every tensor once, and once more where a GEMM reads it again per tile of the other
  factor and it exceeds the L2 cache.

A launch costs two microseconds on the GPU, and, with what autograd and torch do around it, 35 on the host, which was
fitted to one run on an H100 (bench/GPU.md, commit b63acce). torch's own operators are passes over memory.
Others are estimated by their passes over maps and logits. Beside each estimate stands what GPUs said, by the files
bench/results/gpu-*.jsonl: a replay of a CUDA graph or else the wall's clock; "host" is what the calling thread takes.
Share: the products that the definition asks for, over the estimated time, of the rate that torch's product of 8192^3
reached. Sizes: attention 16 x 12 heads of 577 tokens, width 64, if not said otherwise; hidden 16 x 577 tokens, 768 to
1024; linear tokens x vocabulary, widths 768 and 1024, 1024 and 1024, 2048 and 4096 (a wide student 4096 and 2048), 2048
and 3584.

The ceiling of attention is what its exponentials alone would take at 16 a clock and SM: two maps in each of two walks,
and one more of each where no log-sum-exps are given. `online_kernel` makes two of those three walks in one, with two
thirds of the exponentials in all, and is held to the same ceiling. What bounds a kernel is that every exponential comes
with the instructions of its element. The least that it can do with, an exponential, itself among them:

- `lse_kernel` 3: scale and reference in a multiply-add, the exponential, the sum;
- `online_kernel` 5: that for each of two maps; for both together a multiply-add for their difference, half a conversion
  of a pair to 16 bits for it and for the teacher's, and a subtraction and a multiply-add for the loss;
- `query_kernel` 3.75: a multiply-add and an exponential for each of two maps; for both together their difference, half
  a conversion of a pair to 16 bits, and a subtraction and a multiply-add for the loss;
- `key_kernel` 2.75: the same without the loss.

Loads, addresses, products and the loop itself would come for nothing. A sum of a row by the tensor cores would round
its terms to 16 bits, and a score scaled before its product would be rounded as the states are.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu.shapes import eager_linear_kl
from bench.harness.measure import RESULTS
from bench.harness.study import Table
from optima_kernels.attention.tiles import Tiling, padded, tiles_of
from optima_kernels.inspect.chips import CHIPS
from optima_kernels.inspect.fake_driver import Launch, VendorProduct, launches_on
from optima_kernels.inspect.memory import peak_bytes
from optima_kernels.inspect.problems import Attention, Hidden, Vocabulary
from optima_kernels.inspect.sass import (
    CLOCKS_OF_AN_EXPONENTIAL,
    clocks_of_an_exponential,
    exponentials,
    loop_of_exponentials,
)
from optima_kernels.shared.scaling import BLOCK

PAGE = "PREDICTED.md"
TITLE = "Estimates, and what a GPU said"
TARGET = "sm_90"


@dataclass(frozen=True)
class Machine:
    """An H100 SXM as measured: products of 8192^3 and copies of 2 GiB by torch, and its clock."""

    flops: float = 731e12
    bytes: float = 2.9e12
    l2_bytes: float = 50e6
    clock: float = 1.98e9
    launch_seconds: float = 2e-6
    host_seconds: float = 35e-6

    @property
    def multiprocessors(self) -> int:
        return CHIPS[TARGET].multiprocessors

    @property
    def exps(self) -> float:
        return 16 * self.multiprocessors * self.clock

    @property
    def slots(self) -> float:
        """Clocks of all schedulers in a second."""
        return 4 * self.multiprocessors * self.clock


MACHINE = Machine()
LEAST = {"lse_kernel": 3.0, "online_kernel": 5.0, "query_kernel": 3.75, "key_kernel": 2.75}
"""Instructions of an exponential that the KL of maps cannot do without, by the kernel that makes it."""
CLASSES = {
    "exponential": ("MUFU.EX2",),
    "arithmetic": ("FFMA", "FADD", "FMUL"),
    "maxima": ("FMNMX", "FSEL", "FSETP"),
    "conversions": ("F2F",),
    "products": ("HGMMA", "WARPGROUP", "R2UR"),
    "loads and stores": ("LD", "ST", "DEPBAR"),
}


@dataclass(frozen=True)
class Work:
    """What one launch has to do."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Seconds on the GPU by what bounds them, seconds on the host, and kernels that the model knows nothing of."""

    bounds: Counter[str]
    host: float
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(self.bounds.values())

    @property
    def bound(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])


WorkOf = Callable[[Launch], Work | None]


@dataclass(frozen=True)
class Case:
    """A call; `work` of its launches, the passes of others: (name, bytes, flops, launches), and of attention the
    exponentials of a walk for log-sum-exps that are not given and one for each gradient."""

    name: str
    call: Callable[[], None]
    work: WorkOf
    flops: float
    others: tuple[tuple[str, float, float, int], ...] = field(default=())
    exps: float = 0.0


def estimated(case: Case, machine: Machine = MACHINE) -> Estimate:
    """Ours."""
    with launches_on(TARGET) as log:
        case.call()
    bounds: Counter[str] = Counter()
    unknown = []
    for launch in log.launches:
        work = scaling(launch) or case.work(launch)
        if work is None:
            unknown.append(launch.compiled.kernel)
            continue
        name, seconds = of_launch(launch, work, machine)
        bounds[name] += seconds
    for product in log.products:
        bounds["vendor products"] += of_product(product, machine)
    small = log.operators - len(log.products)
    bounds["torch's operators"] += log.operator_bytes / machine.bytes
    bounds["launches"] += machine.launch_seconds * (len(log.launches) + log.operators)
    host = machine.host_seconds * (len(log.launches) + len(log.products) + small)
    return Estimate(bounds, host, tuple(dict.fromkeys(unknown)))


def scaling(launch: Launch) -> Work | None:
    """Of the kernel that multiplies saved gradients by what autograd hands back: 16 bits read, and written; nothing
    where they stay in place, since what it hands back is 1."""
    if launch.compiled.kernel != "scale_kernel":
        return None
    (in_place,) = launch.flags
    return Work(bytes=0.0 if in_place else 4.0 * BLOCK * launch.programs)


def of_launch(launch: Launch, work: Work, machine: Machine) -> tuple[str, float]:
    """What bounds it, and seconds."""
    needs = {
        "tensor cores": work.flops / machine.flops,
        "schedulers": work.exps * clocks_of_an_exponential(launch.cubin) / machine.slots,
        "memory": work.bytes / machine.bytes,
    }
    name = max(needs, key=lambda need: needs[need])
    return name, needs[name] * last_wave(launch, machine)


def last_wave(launch: Launch, machine: Machine) -> float:
    """How much longer a launch takes because its last wave does not fill the chip; blocks share an SM evenly."""
    at_once = launch.compiled.resident * machine.multiprocessors
    full, rest = divmod(launch.programs, at_once)
    # A partly filled wave takes as long as its fullest SM: a block alone has the whole SM to itself.
    partly = math.ceil(rest / machine.multiprocessors) / launch.compiled.resident if rest else 0.0
    return (full + partly) * at_once / launch.programs


def of_product(product: VendorProduct, machine: Machine) -> float:
    """Tiles of 128 x 256, two an SM in flight at best; the larger factor is read again where L2 cannot hold it."""
    tiles = product.batch * math.ceil(product.m / 128) * math.ceil(product.n / 256)
    waves = math.ceil(tiles / machine.multiprocessors) * machine.multiprocessors / tiles
    split = min(1.0 if tiles >= machine.multiprocessors else tiles / machine.multiprocessors, 1.0)
    # Libraries split the sum where tiles are few, at some cost.
    tensor = product.flops / machine.flops * (1.15 if split < 1 else min(waves, 1.5))
    size = product.dtype.itemsize
    left, right = (product.batch * size * rows * product.k for rows in (product.m, product.n))
    again = 1.0 if min(left, right) < machine.l2_bytes / 2 else math.ceil(min(product.m, product.n) / 1024)
    moved = left + right + max(left, right) * (again - 1) + product.batch * product.m * product.n * size
    return max(tensor, moved / machine.bytes)


def attention(name: str, call: Attention) -> Case:
    """Products and exponentials of each walk over the maps."""
    share = 0.5 if call.causal else 1.0
    (heads_s, heads_t), (d_s, d_t) = call.heads, call.widths
    of_head = call.layers * call.batch * call.queries * call.keys * share
    maps_s, maps_t = of_head * heads_s, of_head * heads_t
    states = 2.0 * call.layers * call.batch * (call.queries + call.keys)
    means = call.matching == "mean"
    tiles = tiles_of(TARGET, padded(max(call.widths)), torch.bfloat16, call.queries, reads_maps=means, grouped=False)
    assert tiles is not None

    def in_tiles(tiling: Tiling | None, owner: str) -> float:
        """Elements of a head's maps in the tiles that its programs visit."""
        assert tiling is not None
        return float(call.layers * call.batch * visited(call.queries, call.keys, tiling, owner, call.causal))

    def work(launch: Launch) -> Work | None:
        kernel, heads = launch.compiled.kernel, heads_s + heads_t
        both = 2 * (maps_s * d_s + maps_t * d_t)
        moved = states * (heads_s * d_s + heads_t * d_t)
        if kernel == "lse_kernel":
            return Work(both / 2, in_tiles(tiles.lse, "queries") * heads / 2, moved / 2)
        if kernel == "online_kernel":
            return Work(both + 4 * maps_s * d_s, in_tiles(tiles.online, "queries") * heads, 1.5 * moved)
        if kernel == "query_kernel":
            return Work(both + 2 * maps_s * d_s, in_tiles(tiles.query, "queries") * heads, 1.5 * moved)
        if kernel == "key_kernel":
            return Work(both + 2 * maps_s * d_s, in_tiles(tiles.key, "keys") * heads, 1.5 * moved)
        if kernel == "mean_kernel":
            return Work(both, in_tiles(tiles.mean, "queries") * heads, moved + 2 * of_head * 2)
        if kernel == "mean_query_kernel":
            return Work(6 * maps_s * d_s, in_tiles(tiles.query, "queries") * heads_s, moved + 2 * of_head)
        if kernel == "mean_key_kernel":
            return Work(4 * maps_s * d_s, in_tiles(tiles.key, "keys") * heads_s, moved + 2 * of_head)
        return None

    maps = (maps_s + maps_t) / 2
    products = 2 * (3 * maps_s * d_s + maps_t * d_t)
    others = (("eager", 160.0 * maps, products, 24), ("compiled eager", 40.0 * maps, products, 9))
    exps = (maps_s + maps_t) * (2 if call.lse else 3) if call.matching == "match" and call.kind == "kl" else 0.0
    return Case(f"attention {name}", call, work, products, others, exps)


def visited(queries: int, keys: int, tiling: Tiling, owner: str, causal: bool) -> int:
    """Elements of the tiles of a map that programs which own "queries" or "keys" walk over."""
    if owner == "queries":
        ends = (min(keys, i + tiling.queries) if causal else keys for i in range(0, queries, tiling.queries))
        return sum(math.ceil(end / tiling.keys) for end in ends) * tiling.queries * tiling.keys
    starts = (j // tiling.queries * tiling.queries if causal else 0 for j in range(0, keys, tiling.keys))
    return sum(math.ceil(max(queries - start, 0) / tiling.queries) for start in starts) * tiling.queries * tiling.keys


def hidden(name: str, call: Hidden) -> Case:
    tokens, (narrow, wide) = call.tokens[0] * call.tokens[1], call.widths
    elements = float(call.layers * tokens * wide)
    product = 2.0 * call.layers * tokens * narrow * wide

    def work(launch: Launch) -> Work | None:
        kernel = launch.compiled.kernel
        if kernel == "row_kernel":  # the projection, the teacher, the difference
            return Work(bytes=6 * elements)
        if kernel in ("project_kernel", "state_kernel", "weight_kernel", "product_kernel", "difference_kernel"):
            return Work(product, 0.0, 2 * elements)
        if kernel in ("join_kernel", "join_rows_kernel"):
            return Work(bytes=4.0 * call.layers * tokens * narrow if launch.programs > 1000 else 1e6)
        return None

    passes = 30.0 if call.normalize else 20.0
    others = (
        ("eager", 2 * passes * elements, 3 * product, 14 * call.layers),
        ("compiled eager", passes * elements, 3 * product, 7 * call.layers),
    )
    return Case(f"hidden {name}", call, work, 3 * product, others)


def vocabulary(name: str, call: Vocabulary) -> Case:
    logits = float(call.tokens * call.words)
    narrow, wide = call.widths
    flops = 2 * logits * (3 * narrow + wide)
    heads = 2.0 * call.words * (2 * narrow + wide)

    def work(launch: Launch) -> Work | None:
        if launch.compiled.kernel != "row_kernel":
            return None
        rows = launch.programs
        visits = 1.0 if call.divergence == "forward" else 1.5
        return Work(exps=2.0 * rows * call.words, bytes=6.0 * visits * rows * call.words)

    others = (
        ("eager", 145.0 * logits + heads, flops, 20),
        ("compiled eager", 22.0 * logits + heads, flops, 9),
        ("Liger, compiled chunks", 22.0 * logits + heads * call.tokens / 1024, flops, 12 * call.tokens // 1024),
        ("vendor chunks of 2048", 14.0 * logits + 1.5 * heads * call.tokens / 2048, flops, 12 * call.tokens // 2048),
    )
    return Case(f"linear {name}", call, work, flops, others)


def cases() -> Iterator[Case]:
    """Named as the items of the GPU command, so that measurements are found."""
    image = {"batch": 16, "gated": False}
    yield attention("kl", Attention(**image))
    yield attention("kl lse", Attention(**image, lse=True))
    yield attention("kl causal", Attention(**image, causal=True))
    yield attention("kl d128", Attention(16, (16, 16), widths=(128, 128), gated=False))
    yield attention("kl 12 layers", Attention(**image, layers=12))
    yield attention("mse", Attention(**image, kind="mse"))
    yield attention("kl mean 12 to 16", Attention(**image, heads=(12, 16), matching="mean"))
    yield attention("kl 4096 tokens", Attention(2, (16, 16), None, 4096, 4096, gated=False))
    yield attention("kl causal 4096 tokens", Attention(2, (16, 16), None, 4096, 4096, gated=False, causal=True))
    for normalize, layers in (("layernorm", 6), (None, 6), ("layernorm", 1)):
        words = f"{normalize or 'plain'}, {layers} layer{'s' if layers > 1 else ''}"
        yield hidden(words, Hidden(normalize=normalize, layers=layers, gated=False))
    yield hidden("layernorm, 6 layers, gated", Hidden(normalize="layernorm", layers=6))
    for name, size in VOCABULARIES.items():
        yield vocabulary(name, size)


VOCABULARIES = {
    "2048 x 49408": Vocabulary(),
    "2048 x 49408 jsd": Vocabulary(divergence="jsd"),
    "4096 x 50257": Vocabulary(4096, 50257, (1024, 1024)),
    "8192 x 128256": Vocabulary(8192, 128256, (2048, 4096)),
    "8192 x 128256, wide student": Vocabulary(8192, 128256, (4096, 2048)),
    "2048 x 256000": Vocabulary(2048, 256000, (2048, 3584)),
}
NAMES = {"eager": "eager", "compiled eager": "compiled", "Liger, compiled chunks": "Liger compiled"}
NAMES["vendor chunks of 2048"] = "vendor chunks"
LOOPS = ("attention kl", "attention kl lse", "attention kl causal", "attention kl d128")


def of_passes(moved: float, flops: float, launches: int, machine: Machine = MACHINE) -> float:
    """Seconds of passes over memory and of products, one after the other, as torch runs them."""
    return moved / machine.bytes + flops / (0.85 * machine.flops) + launches * machine.launch_seconds


def measurements(path: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by item: of a replay ("graph") or else of the wall, and of the host; and MiB beside the inputs."""
    found: dict[str, dict[str, float]] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line.get("part") == "kernels" and "wall" in line:
            found[line["item"]] = {"gpu": line.get("graph") or line["wall"], "host": line.get("host", math.nan)}
            if "extra_mib" in line:
                found[line["item"]]["mib"] = line["extra_mib"]
    return found


Measured = dict[str, dict[str, float]]
Ours = Sequence[tuple[Case, Estimate]]


def estimates(estimated_cases: Ours, measured: Sequence[Measured]) -> Iterator[list[str]]:
    """A case's rows: ours, then others; `measured` on each card."""
    for case, ours in estimated_cases:
        share = case.flops / ours.seconds / MACHINE.flops
        note = f"not in the model: {', '.join(ours.unknown)}" if ours.unknown else ours.bound
        said = [card.get(f"{case.name} | optima", {}) for card in measured]
        yield _row(case.name, "optima", ours.seconds, said, 1e3 * ours.host, f"{share:.0%}", note)
        for name, moved, flops, launches in case.others:
            said = [card.get(f"{case.name} | {NAMES[name]}", {}) for card in measured]
            seconds = of_passes(moved, flops, launches)
            host = 1e3 * MACHINE.host_seconds * launches
            yield _row("", name, seconds, said, host, f"{case.flops / seconds / MACHINE.flops:.0%}", "passes")


def _row(
    case: str, who: str, seconds: float, said: Sequence[dict[str, float]], host: float, share: str, note: str
) -> list[str]:
    gpus = [f"{card['gpu']:.3f}" if "gpu" in card else "not measured" for card in said]
    hosts = [f"{card['host']:.2f}" if not math.isnan(card.get("host", math.nan)) else "not measured" for card in said]
    return [case, who, f"{1e3 * seconds:.3f}", *gpus, f"{host:.2f}", *hosts, share, note]


def instruction_counts(chosen: Sequence[Case]) -> Iterator[list[str]]:
    """What attention's loops execute for an exponential, by class, beside the least."""
    for case in chosen:
        with launches_on(TARGET) as log:
            case.call()
        for launch in {x.compiled.kernel: x for x in log.launches if x.compiled.kernel in LEAST}.values():
            kernel, body = launch.compiled.kernel, loop_of_exponentials(launch.cubin)
            exps = exponentials(body)
            counted = {name: sum(x.name.startswith(begins) for x in body) for name, begins in CLASSES.items()}
            counted["addresses, loop and the rest"] = len(body) - sum(counted.values())
            least = LEAST[kernel]
            row = [case.name, kernel, *(f"{count / exps:.2f}" for count in counted.values())]
            yield [*row, f"{len(body) / exps:.2f}", f"{least:.2f}", f"{_at_most(least):.0%}"]


def _at_most(instructions: float) -> float:
    """How much of a kernel's time its own exponentials would be."""
    return CLOCKS_OF_AN_EXPONENTIAL / (CLOCKS_OF_AN_EXPONENTIAL + instructions)


def ceilings(estimated_cases: Ours, measured: Sequence[Measured]) -> Iterator[list[str]]:
    """Attention's estimates, and what was `measured` on each card, as shares of what their exponentials would take."""
    for case, ours in estimated_cases:
        if case.exps:
            ceiling = case.exps / MACHINE.exps
            alone = ours.bounds["schedulers"] + ours.bounds["tensor cores"]
            row = [case.name, f"{case.exps / 1e6:.0f}", f"{1e3 * ceiling:.3f}", f"{1e3 * alone:.3f}"]
            row += [f"{ceiling / alone:.0%}", f"{ceiling / ours.seconds:.0%}"]
            for card in measured:
                said = card.get(f"{case.name} | optima", {}).get("gpu")
                row.append(f"{1e3 * ceiling / said:.0%}" if said else "not measured")
            yield row


def memories(measured: Sequence[Measured]) -> Iterator[list[str]]:
    """MiB of a vocabulary's divergence and its gradients beside the inputs, ours and eager's, and `measured` ones."""
    for name, size in VOCABULARIES.items():
        heads = size.heads()
        with launches_on(TARGET):
            ours = peak_bytes(lambda size=size, heads=heads: size.solve(*heads))
        eager = peak_bytes(lambda heads=heads: torch.autograd.grad(eager_linear_kl(*heads), heads[:2]))
        of_head = size.words * size.widths[0] * 2
        row = [f"linear {name}", *(f"{x / 2**20:.0f}" for x in (ours, of_head, eager)), f"{ours / eager:.3f}"]
        for card in measured:
            mine, theirs = (card.get(f"linear {name} | {who}", {}).get("mib") for who in ("optima", "eager"))
            row.append(f"{mine:.0f} of {theirs:.0f}" if mine and theirs else "not measured")
        yield row


def card_of(path: Path) -> str:
    """The device that a file's lines are of, and the commit."""
    told = [json.loads(text) for text in path.read_text().splitlines()]
    about = next((line["about"] for line in reversed(told) if "about" in line), {"device": path.stem})
    return f"{about['device']} ({about.get('commit', 'unknown')})"


def tables(rounds: int | None) -> Iterator[Table]:
    """The estimates beside what every card said that there is a file of."""
    files = sorted(RESULTS.glob("gpu-*.jsonl"))
    said = [f"measured, {card_of(path)}" for path in files]
    header = ("loss", "who", "GPU, ms, estimate", *said, "host, ms, estimate", *said, "share", "bound by")
    cards = [measurements(path) for path in files]
    ours = [(case, estimated(case)) for case in cases()]
    yield Table("bf16, forward pass and gradients", header, list(estimates(ours, cards)))
    header = ("loss", "million exponentials", "ceiling, ms", "kernels that make them, ms", "share", "of all", *said)
    yield Table("Attention beside what its exponentials would take", header, list(ceilings(ours, cards)))
    header = (
        "loss",
        "kernel",
        *CLASSES,
        "addresses, loop and the rest",
        "all",
        "least",
        "of its exponentials' time at most",
    )
    loops = [case for case in cases() if case.name in LOOPS]
    yield Table("Instructions of attention's loops for an exponential", header, list(instruction_counts(loops)))
    header = ("loss", "ours, MiB", "of which the head's gradient", "eager, MiB", "share", *said)
    yield Table("Memory beside the inputs, bf16, counted", header, list(memories(cards)))
