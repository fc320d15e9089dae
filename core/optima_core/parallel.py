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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optima_core.errors import OptimaError
from optima_core.processes import Strategy, count_processes, starts_anew

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others; the first one scores the student while they do."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. The default is one process on its own, for which nothing here does anything.

    Attributes:
        rank: This process, from 0.
        count: How many there are.
        strategy: "ddp" keeps the whole student on every rank; "fsdp" (FSDP2) shards parameters, gradients and optimiser
            state.
        device: Of this process.
    """

    rank: int = 0
    count: int = 1
    strategy: Strategy = "ddp"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the ranks."""
        return self.count > 1 and self.strategy == "fsdp"

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

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose forward is to be called in training so that gradients are means over the ranks.

        With FSDP it is the same module, whose parameters have become DTensors.
        """
        if self.count == 1:
            return module
        if self.strategy == "fsdp":
            self.shard(module)
            return module
        # What an arm leaves out has no gradient in its rounds and must not be waited for; it keeps None, as alone.
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)

    def gradients_kept(self, module: nn.Module, until_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward passes of a wrapped module: DDP adds up gradients and exchanges them later."""
        if until_last and isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    def shard(self, module: nn.Module) -> None:
        """With FSDP, spreads the module's parameters over the ranks, each layer of an nn.ModuleList a unit of its own.

        Layers must be used by calling them. Scalars cannot be sharded: every rank keeps them, their gradients are
        averaged.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # As DDP does: the ranks start from the first one's weights.
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(self.device.type, (self.count,))
        scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        for scalar in scalars:
            if scalar.requires_grad:
                scalar.register_post_accumulate_grad_hook(self._average_gradient)  # type: ignore[no-untyped-call]
        for layer in reversed([layer for found in module.modules() for layer in _layers(found)]):
            fully_shard(layer, mesh=mesh, ignored_params=scalars)
        fully_shard(module, mesh=mesh, ignored_params=scalars)

    def _average_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= self.count


def _layers(module: nn.Module) -> list[nn.Module]:
    """The members of an nn.ModuleList that run when called; a list of lists, or of bare projections, has none."""
    if not isinstance(module, nn.ModuleList):
        return []
    return [layer for layer in module if not isinstance(layer, nn.ModuleList | nn.ModuleDict | nn.Linear)]


@contextlib.contextmanager
def join_ranks(strategy: Strategy = "ddp", timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """While entered, this process is one of those that torchrun started; without torchrun, it is alone.

    Args:
        strategy: See `Ranks`.
        timeout: Seconds that a rank waits for the others.

    Raises OptimaError if there are more processes than GPUs, or a rank is lost on the way.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = count_processes()
    if count == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise OptimaError(f"rank {local} has no GPU: there are {gpus} here; give torchrun --nproc-per-node {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        # Taps are views of what a layer computed, and nothing here changes one in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        yield Ranks(dist.get_rank(), count, strategy, device)
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
