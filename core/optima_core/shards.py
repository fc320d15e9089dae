"""Parameters that FSDP has spread over ranks: a rank's share, the whole, and letting go of what came together."""

from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """This rank's shard; of a whole tensor, itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all ranks, which must all call this; of a whole tensor, itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reshard(module: nn.Module) -> None:
    """Lets go of what a forward pass has brought together: FSDP keeps its root's parameters until a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
