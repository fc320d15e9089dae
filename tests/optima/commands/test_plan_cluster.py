"""Plans of many GPUs: collectives beside rings that are walked, sizes by hand, what binds, what the command says."""

import json
from itertools import pairwise

import pytest
import torch

from optima.coca import CoCa
from optima.coca.presets import preset
from optima.commands.options import ClusterConfig, PlanConfig
from optima.commands.plan.cluster import (
    Layout,
    cluster_needs,
    collective,
    communication,
    layout_of,
    memory_of,
    sizes_of,
)
from optima.commands.plan.needs import Needs
from optima.run import main
from optima_core import DistillerConfig, OptimaError
from optima_core.processes import Strategy

TEACHER, STUDENT = preset("coca_ViT-L-14"), preset("tiny12-14")
TRAINED = 140_000_000


def walked(size: float, machines: int, each: int) -> tuple[float, float]:
    """Mean bytes that a member sends within its machine and to another one, in an all-gather by `each` rings."""
    members = machines * each
    inside = outside = 0.0
    for ring in range(each):
        order = [(m, (g + ring) % each) for m in range(machines) for g in range(each)]
        for (here, _), (there, _) in pairwise([*order, order[0]]):
            sent = (members - 1) * size / each / members  # a piece in each of as many turns
            inside += sent * (here == there)
            outside += sent * (here != there)
    return inside / members, outside / members


@pytest.mark.parametrize(("machines", "each"), [(1, 2), (1, 8), (2, 1), (2, 8), (5, 1), (8, 4)])
def test_a_collective_sends_what_a_walk_around_its_rings_does(machines: int, each: int) -> None:
    found = collective(1e9, machines, each)
    assert (found.nvlink, found.network) == pytest.approx(walked(1e9, machines, each))


@pytest.mark.parametrize(
    ("layout", "group", "between"),
    [
        (Layout(64, 1, 8), (1, 1), (8, 8)),
        (Layout(1, 64, 8), (8, 8), (1, 1)),
        (Layout(8, 8, 8), (1, 8), (8, 1)),
        (Layout(16, 4, 8), (1, 4), (8, 2)),
        (Layout(4, 16, 8), (2, 8), (4, 1)),
        (Layout(4, 1, 8), (1, 1), (1, 4)),
    ],
)
def test_groups_lie_on_machines_as_their_ranks_follow_each_other(
    layout: Layout, group: tuple[int, int], between: tuple[int, int]
) -> None:
    """Found again by asking every rank where the others of its group, and of its place in all groups, are."""
    assert (layout.in_a_group, layout.between_groups) == (group, between)
    for ranks, expected in (
        ([rank for rank in range(layout.gpus) if rank < layout.shard], group),
        ([rank for rank in range(layout.gpus) if rank % layout.shard == 0], between),
    ):
        machines = [rank // layout.node for rank in ranks]
        assert len(set(machines)) == expected[0]
        assert machines.count(machines[0]) == expected[1]


def test_sizes_are_those_of_the_units_that_are_sharded() -> None:
    with torch.device("meta"):
        model = CoCa(STUDENT)
    units = [
        sum(p.numel() for p in layer.parameters())
        for layers in (model.image_encoder.blocks, model.text_decoder.blocks, model.multimodal_decoder.layers)
        for layer in layers
    ]
    whole = sum(p.numel() for p in model.parameters())
    assert sizes_of(STUDENT) == (sum(units), max(units), whole - sum(units))


def test_what_is_sent_is_the_formula_of_each_strategy() -> None:
    ours, theirs, node = sizes_of(STUDENT), sizes_of(TEACHER), 8
    ddp = communication(Layout(64, 1, node), ours, theirs, TRAINED, 4)
    assert ddp.nvlink + ddp.network == pytest.approx(2 * 63 / 64 * 4 * TRAINED)
    gathered = 4 * 4 * (theirs.layers + 2 * ours.layers + TRAINED - ours.layers)
    fsdp = communication(Layout(1, 64, node), ours, theirs, TRAINED, 4)
    assert fsdp.nvlink + fsdp.network == pytest.approx(63 / 64 * (gathered + 4 * TRAINED))
    hsdp = communication(Layout(8, 8, node), ours, theirs, TRAINED, 4)
    assert hsdp.nvlink == pytest.approx(7 / 8 * (gathered + 4 * TRAINED))
    assert hsdp.network == pytest.approx(2 * 7 / 8 * 4 * TRAINED / 8)
    alone = communication(Layout(1, 1, node), ours, theirs, TRAINED, 4)
    assert (alone.nvlink, alone.network) == (0, 0)


def needs(**changes: float) -> Needs:
    student = 130_000_000
    values = {
        "teacher_parameters": 640_000_000, "student_parameters": student,
        "projection_parameters": TRAINED - student, "weights": 4 * (640_000_000 + TRAINED), "gradients": 4 * TRAINED,
        "optimiser": 8 * TRAINED, "average": 4 * student, "probe": 10**8, "activations": 10**9,
        "probe_peak": 10**9, "step_peak": 8 * 10**9, "teacher_operations": 1e12, "student_operations": 1e11,
        "loss_operations": 1e11, "backward_operations": 2e11,
    }  # fmt: skip
    return Needs(**(values | changes))  # type: ignore[arg-type]


def test_memory_falls_with_the_shards_to_what_is_gathered_and_local() -> None:
    ours, theirs = sizes_of(STUDENT), sizes_of(TEACHER)
    found = [memory_of(Layout(64 // s, s, 8), needs(), ours, theirs, 1) for s in (1, 2, 8, 64)]
    assert found == sorted(found, reverse=True)
    spread = 4 * (640_000_000 + TRAINED) + 12 * TRAINED + 4 * 130_000_000
    assert found[1] - found[2] == pytest.approx(spread * (1 / 2 - 1 / 8))
    assert memory_of(Layout(1, 1, 8), needs(), ours, theirs, 1) == needs().peak
    assert found[0] == needs().peak + 4 * TRAINED  # buckets
    waiting = memory_of(Layout(8, 8, 8), needs(), ours, theirs, 4)
    assert waiting - found[2] == 4 * TRAINED


@pytest.mark.parametrize(
    ("bound", "changes", "cluster", "parallel"),
    [
        ("compute", {"teacher_operations": 1e15}, {}, "ddp"),
        ("memory", {"activations": 10**12, "step_peak": 2 * 10**12}, {}, "ddp"),
        ("NVLink", {}, {"node": 64, "nvlink": 1.0}, "fsdp"),
        ("network", {}, {"network": 0.1}, "ddp"),
        ("loader", {}, {"images_a_core": 0.01}, "ddp"),
    ],
)
def test_what_binds_is_what_takes_longest(
    bound: str, changes: dict[str, float], cluster: dict[str, float], parallel: Strategy
) -> None:
    config = PlanConfig(
        batch_size=64,
        gpus=64,
        parallel=parallel,
        cluster=ClusterConfig(**cluster),  # type: ignore[arg-type]
        engine=DistillerConfig(precision="bf16"),
    )
    found = cluster_needs(config, needs(**changes), STUDENT, TEACHER)
    assert found.bound == bound
    assert found.fastest == found.seconds[bound] < found.slowest or bound == "loader"
    assert found.images_a_second == pytest.approx(64 / found.fastest)
    assert found.checkpoint == 12 * TRAINED + 4 * 130_000_000
    writers = 1 if parallel == "ddp" else 64 // config.cluster.node
    assert found.checkpoint_seconds == pytest.approx(found.checkpoint / 2e9 / writers)


@pytest.mark.parametrize(
    ("parallel", "shard_over", "expected"),
    [("ddp", 0, (16, 1)), ("fsdp", 0, (1, 16)), ("hsdp", 0, (2, 8)), ("hsdp", 4, (4, 4)), ("hsdp", 16, (1, 16))],
)
def test_groups_are_those_of_the_strategy(parallel: Strategy, shard_over: int, expected: tuple[int, int]) -> None:
    found = layout_of(PlanConfig(gpus=16, parallel=parallel, shard_over=shard_over))
    assert (found.groups, found.shard) == expected


def test_gpus_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(OptimaError, match="batch_size must be a multiple of the 6 ranks, got 32"):
        layout_of(PlanConfig(gpus=6))


def test_the_command_plans_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--batch_size", "16", "--probe_size", "32", "--gpus", "16", "--parallel", "hsdp"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["layout"] == {"groups": 2, "shard": 8, "node": 8}
    assert found["cluster"]["bound"] == max(found["cluster"]["seconds"], key=found["cluster"]["seconds"].get)
    assert main([*words, "--cluster.network", "0.001", "--memory", "0.001"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Estimates: 16 H100 on 2 machines, hsdp, 2 x 8 GPUs" in said
    assert "Bound by network" in said
    assert "Does not fit 0.001 GB" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpus", "7"], "batch_size must be a multiple of the 7 ranks"),
        (["--gpus", "8", "--chip", "cpu"], "gpus 8 share a distillation on GPUs, got chip cpu"),
        (
            ["--gpus", "8", "--parallel", "hsdp", "--shard_over", "3"],
            "shard_over must be a divisor of the 8 ranks",
        ),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--gpus", "8", "--cluster.network", "0"], "cluster.network must be a finite number above 0, got 0"),
        (["--gpus", "8", "--cluster.reached", "2"], "cluster.reached must be in (0, 1], got 2"),
    ],
)
def test_mistakes_end_in_a_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
