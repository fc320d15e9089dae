"""Many devices: the processes that torchrun started, one a device, act as one.

Data is sharded: a step's batch is the same items however many ranks there are, and each rank takes a slice of it.
Every loss is a mean over what counts (tokens, rows of a map), and slices hold unequal numbers of that. So a rank
multiplies its means by the share of the count that it holds, times the number of ranks; what DDP and FSDP make of the
gradients, and `Ranks.mean` of the losses, is then the mean over the whole batch. All ranks see the same losses to the
last bit, so they compute the same reward and choose the same arm without being told.

Everything goes through torch.distributed: gloo between CPUs, NCCL between GPUs.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from optima_core.compilation import layers_of
from optima_core.errors import OptimaError
from optima_core.meeting import meet
from optima_core.processes import Strategy, count_neighbours, count_processes, starts_anew

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. The default is one process on its own, for which nothing here does anything.

    Attributes:
        rank: This process, from 0.
        count: How many there are.
        strategy: "ddp" keeps the whole student on every rank; "fsdp" (FSDP2) shards parameters, gradients and optimiser
            state over all ranks; "hsdp" over groups of `shard_over` ranks, each of which keeps the whole.
        device: Of this process.
        shard_over: Ranks of a group with "hsdp", which follow each other; a divisor of `count`. 0 for all.

    Raises ValueError if the groups do not make up the ranks.
    """

    rank: int = 0
    count: int = 1
    strategy: Strategy = "ddp"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shard_over: int = 0

    def __post_init__(self) -> None:
        if self.shard_over < 0 or (self.shard_over and self.count % self.shard_over):
            raise ValueError(f"shard_over must be a divisor of the {self.count} ranks, got {self.shard_over}")

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the ranks."""
        return self.count > 1 and self.strategy != "ddp"

    @cached_property
    def mesh(self) -> "DeviceMesh":
        """How sharded ranks lie: in a row, or with "hsdp" in a row a group."""
        from torch.distributed.device_mesh import init_device_mesh

        if self.strategy == "fsdp":
            return init_device_mesh(self.device.type, (self.count,))
        size = self.shard_over or self.count
        return init_device_mesh(self.device.type, (self.count // size, size), mesh_dim_names=("replicate", "shard"))

    def share(self, start: int, size: int) -> tuple[int, int]:
        """This rank's slice, (start, size), of the items start, ..., start + size - 1.

        Raises ValueError if there are fewer items than ranks.
        """
        if size < self.count:
            raise ValueError(f"a batch must have an item for each of the {self.count} ranks, got {size}")
        first, end = size * self.rank // self.count, size * (self.rank + 1) // self.count
        return start + first, end - first

    def weigh(self, counts: Tensor) -> Tensor:
        """What to multiply means over `counts` [means] elements by, so that the ranks' mean is that over all of them.

        float32 [means]; all 0 for a mean of nothing on any rank.
        """
        total = counts.double().clone()
        dist.all_reduce(total)
        return (counts * self.count / torch.where(total > 0, total, 1)).float()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of each value; the same bits on every rank."""
        if self.count == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the shards of what is sharded; as they are where every rank holds all."""
        if self.count == 1 or not self.sharded:
            return sums
        total = sums.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; waits for all of them."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order; for small things."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first rank's value; for small things."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def align(self, module: nn.Module) -> None:
        """Gives every rank the first one's weights and buffers of an unsharded module."""
        if self.count > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose forward is to be called in training so that gradients are means over the ranks.

        With FSDP it is the same module, whose parameters have become DTensors.
        """
        if self.count == 1:
            return module
        if self.sharded:
            self.shard(module)
            return module
        # What an arm leaves out has no gradient in its rounds and must not be waited for; it keeps None, as alone.
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)

    @contextlib.contextmanager
    def exchange(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a wrapped module on one of a step's batches.

        Gradients are added up where they are, and become means over the ranks in the last backward pass. With FSDP
        those that wait are of whole parameters.
        """
        if self.sharded:
            module.set_requires_gradient_sync(last)  # type: ignore[operator]  # an FSDPModule
        waits = isinstance(module, nn.parallel.DistributedDataParallel) and not last
        with module.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            yield
        if self.sharded and last:
            self._average_scalars(module)

    def shard(self, module: nn.Module) -> None:
        """With FSDP, spreads the module's parameters over the ranks, each layer of an nn.ModuleList a unit of its own.

        Layers must be used by calling them. Scalars cannot be sharded: every rank keeps them, and `exchange` averages
        their gradients.
        """
        if not self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        # As DDP does: the ranks start from the first one's weights.
        self.align(module)
        scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        for unit in (*reversed(layers_of(module)), module):
            fully_shard(unit, mesh=self.mesh, ignored_params=scalars)

    def _average_scalars(self, module: nn.Module) -> None:
        found = [p.grad for p in module.parameters() if p.ndim == 0 and p.grad is not None]
        if found:
            for gradient, mean in zip(found, self.mean(torch.stack(found)), strict=True):
                gradient.copy_(mean)


@contextlib.contextmanager
def join_ranks(strategy: Strategy = "ddp", shard_over: int = 0, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """While entered, this process is one of those that torchrun started; without torchrun, it is alone.

    Args:
        strategy: See `Ranks`.
        shard_over: See `Ranks`; with "hsdp" 0 takes the ranks of one machine, between which it is quick.
        timeout: Seconds that a rank waits for the others.

    Raises OptimaError if there are more processes than GPUs, if the groups of "hsdp" do not make up the ranks, or if a
    rank is lost on the way.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = count_processes()
    if count == 1:
        yield Ranks(device=device)
        return
    if strategy == "hsdp":
        shard_over = shard_over or count_neighbours()
        if count % shard_over:
            raise OptimaError(f"shard_over must be a divisor of the {count} ranks, got {shard_over}")
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise OptimaError(f"rank {local} has no GPU: there are {gpus} here; give torchrun --nproc-per-node {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        store, rank, _ = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        place = meet(store, rank, count, timeout)
        dist.init_process_group(backend, store=place, rank=rank, world_size=count, timeout=limit)
        # Taps are views of what a layer computed, and nothing here changes one in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        yield Ranks(dist.get_rank(), count, strategy, device, shard_over if strategy == "hsdp" else 0)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            then = (
                "torchrun starts the others anew, from the last checkpoint"
                if starts_anew()
                else "the last checkpoint is kept, continue with the same command and --resume"
            )
            raise OptimaError(f"a process of the run was lost, or waited for in vain; {then}") from error
        raise
    dist.destroy_process_group()
