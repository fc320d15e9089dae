"""What many GPUs need of each other, of their disks and their CPUs: arithmetic on counted sizes, all of it estimates.

A step takes `accumulate` batches, each shared by N GPUs; R groups of S GPUs hold a whole model each (DDP: S = 1; FSDP:
S = N; HSDP: both above 1). P_s, P_t: parameters of the student, its projections among them, and of the teacher, 4 bytes
each; "layers" are FSDP's units, "root" is the rest of a model. Each GPU sends, and receives, in a step:

    DDP    all-reduce of the gradients, once a step           2 (N - 1) / N * 4 P_s
    FSDP   all-gather of layers, for each batch: teacher's    (S - 1) / S * 4 (P_t layers + 2 P_s layers + P_s root)
           forward, student's forward and backward; the student's root once; the teacher's root, which no backward pass
           frees, stays gathered
           reduce-scatter of the gradients, once a step       (S - 1) / S * 4 P_s
    HSDP   the same within a group, and an all-reduce of      2 (R - 1) / R * 4 P_s / S
           its shards between groups

A ring of m members, k of them in each machine, has each send (m - 1) / m of the bytes; where there are several
machines, k rings use a port of the network each, so 1 / k of that crosses the network and the rest NVLink. Latency is
not counted, though small batches feel it.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from optima.coca import CoCaConfig
from optima.coca.checkpoint import shapes
from optima.commands.options import PlanConfig
from optima.commands.plan.needs import Needs
from optima.commands.plan.predict import GPUS, rates_of
from optima.task import TASKS
from optima_core.errors import OptimaError

_LAYER = re.compile(r"(\w+\.(?:blocks|layers)\.\d+)\.")


@dataclass(frozen=True)
class Layout:
    """N = groups * shard GPUs: each of `groups` groups of `shard` GPUs holds a whole model; `node` GPUs a machine."""

    groups: int
    shard: int
    node: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.groups * self.shard

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.node)

    @property
    def in_a_group(self) -> tuple[int, int]:
        """Machines that a group spans, and its GPUs in each: ranks of a group follow each other."""
        each = min(self.shard, self.node)
        return -(-self.shard // each), each

    @property
    def between_groups(self) -> tuple[int, int]:
        """Machines that one GPU of every group spans, and how many of these stand in each."""
        each = min(self.groups, max(1, self.node // self.shard))
        return -(-self.groups // each), each


class Sizes(NamedTuple):
    """Parameters of a model: in FSDP's units, in the largest of them, and in the rest."""

    layers: int
    largest: int
    root: int


@dataclass(frozen=True)
class Sent:
    """Bytes that a GPU sends in a step: to those of its machine, and to those of others."""

    nvlink: float
    network: float

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.nvlink + other.nvlink, self.network + other.network)


@dataclass(frozen=True)
class ClusterNeeds:
    """Of one GPU and step, if not said otherwise; sizes in bytes, times in seconds.

    memory: at the peak. sent: to other GPUs. seconds: of "compute", "memory", "NVLink", "network" and "loader", each as
    if it were alone. images: that all GPUs take together. checkpoint: one's bytes; checkpoint_seconds: to write it.
    """

    layout: Layout
    memory: float
    sent: Sent
    seconds: dict[str, float]
    images: int
    checkpoint: int
    checkpoint_seconds: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def fastest(self) -> float:
        """A step in which everything else hides behind what takes longest."""
        return max(self.seconds.values())

    @property
    def slowest(self) -> float:
        """A step in which nothing hides, but for the loader, which works ahead."""
        return max(self.seconds["loader"], sum(time for name, time in self.seconds.items() if name != "loader"))

    @property
    def images_a_second(self) -> float:
        """That the loaders of all GPUs must keep up with."""
        return self.images / self.fastest


def layout_of(config: PlanConfig) -> Layout:
    """How the GPUs share the work. Raises OptimaError if they do not divide the batch, or groups do not divide them."""
    gpus = config.gpus
    if config.batch_size % gpus:
        raise OptimaError(f"batch_size must be a multiple of the {gpus} ranks, got {config.batch_size}")
    group = config.shard_over or min(gpus, config.cluster.node)
    shard = {"ddp": 1, "fsdp": gpus, "hsdp": group}[config.parallel]
    if gpus % shard:
        raise OptimaError(f"shard_over must be a divisor of the {gpus} ranks, got {shard}")
    return Layout(gpus // shard, shard, config.cluster.node)


def sizes_of(model: CoCaConfig) -> Sizes:
    """Counts the weights of FSDP's units and of the rest."""
    layers: dict[str, int] = {}
    root = 0
    for name, shape in shapes(model).items():
        found = _LAYER.match(name)
        if found:
            layers[found[1]] = layers.get(found[1], 0) + prod(shape)
        else:
            root += prod(shape)
    return Sizes(sum(layers.values()), max(layers.values()), root)


def collective(size: float, machines: int, each: int) -> Sent:
    """What a GPU sends in an all-gather or a reduce-scatter of `size` bytes; an all-reduce sends twice as much."""
    members = machines * each
    share = (members - 1) / members * size
    outside = share / each if machines > 1 else 0.0
    return Sent(share - outside, outside)


def communication(layout: Layout, student: Sizes, teacher: Sizes, trained: int, batches: int) -> Sent:
    """What a GPU sends in a step; trained: parameters of the student and its projections, which the root holds."""
    found = Sent(0.0, 0.0)
    if layout.shard > 1:
        root = trained - student.layers
        gathered = 4 * batches * (teacher.layers + 2 * student.layers + root)
        found += collective(gathered + 4 * trained, *layout.in_a_group)
    if layout.groups > 1:
        found += collective(2 * 4 * trained / layout.shard, *layout.between_groups)
    return found


def memory_of(layout: Layout, needs: Needs, student: Sizes, teacher: Sizes, accumulate: int) -> float:
    """At the peak of a GPU, of a step that takes `needs` where nothing is sharded.

    DDP keeps its buckets beside the gradients. Of what is sharded, a part is held, and whole: both roots, two layers
    (the next one is gathered meanwhile), and, where several batches make a step, the gradients that wait.
    """
    if layout.gpus == 1:
        return needs.peak
    if layout.shard == 1:
        return needs.peak + needs.gradients
    spread = needs.weights + needs.gradients + needs.optimiser + needs.average
    local = max(needs.peak - spread, needs.probe + needs.activations)
    roots = needs.projection_parameters + student.root + teacher.root
    whole = 4 * (roots + 2 * max(student.largest, teacher.largest))
    waiting = needs.gradients if accumulate > 1 else 0
    return local + spread / layout.shard + whole + waiting


def cluster_needs(config: PlanConfig, needs: Needs, student: CoCaConfig, teacher: CoCaConfig) -> ClusterNeeds:
    """The whole estimate; needs: of a GPU's share of the batch.

    Memory traffic counted: AdamW's 28 bytes a parameter of the shard; of each batch all weights read once in the
    teacher's and three times in the student's products, and activations written and read.
    """
    layout, cluster, batches = layout_of(config), config.cluster, config.engine.accumulate
    ours, theirs = sizes_of(student), sizes_of(teacher)
    trained = needs.student_parameters + needs.projection_parameters
    rates = rates_of(config)
    assert rates is not None  # of a GPU
    sent = communication(layout, ours, theirs, trained, batches)
    read = 4 * (needs.teacher_parameters + 3 * trained) + 2 * needs.activations
    images = config.batch_size * batches * TASKS[config.task].images
    seconds = {
        "compute": needs.operations / rates.arithmetic,
        "memory": (28 * trained / layout.shard + batches * read) / rates.traffic,
        "NVLink": sent.nvlink / ((cluster.nvlink or GPUS[config.chip].nvlink) * 1e9 * cluster.reached),
        "network": sent.network / (cluster.network * 1e9 * cluster.reached),
        "loader": images / layout.gpus / (cluster.cores * cluster.images_a_core),
    }
    checkpoint = 4 * trained + needs.optimiser + needs.average
    writers = layout.in_a_group[0]  # one group holds all of it
    return ClusterNeeds(
        layout=layout,
        memory=memory_of(layout, needs, ours, theirs, batches),
        sent=sent,
        seconds=seconds,
        images=images,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint / (cluster.storage * 1e9 * writers),
    )
