"""The state of what is trained, each rank's share of it, under names that are the same however it is spread.

torch.distributed.checkpoint's state-dict functions name optimiser state by parameter rather than by number, and leave
sharded parameters the DTensors that they are: so what `CheckpointStore` writes of it serves one process, DDP and FSDP
on any number of ranks. They are imported where they are used, since that takes half a second, which a command that
trains nothing should not wait for.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from optima_core.learner import Learner
from optima_core.parallel import Ranks
from optima_core.shards import reshard, whole


def trained_state(learner: Learner, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights of the student and the projections, and the optimiser's state: the live tensors of this rank."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    reshard(learner)
    weights = get_model_state_dict(learner)
    state: dict[str, Any] = {
        part: {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        for part in ("student", "objective")
    }
    return state | {"optimiser": optimiser_state(learner, optimiser)}


def load_trained(learner: Learner, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `trained_state`."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    reshard(learner)
    parts = ("student", "objective")
    set_model_state_dict(learner, {f"{part}.{name}": value for part in parts for name, value in state[part].items()})
    load_optimiser(learner, optimiser, state["optimiser"])


def trained_state_to_fill(learner: Learner, optimiser: torch.optim.Optimizer, moved: Collection[str]) -> dict[str, Any]:
    """`trained_state` for other values to be read into. Of the optimiser, what was is forgotten.

    moved: the parameters that the optimiser is to have state of.
    """
    reshard(learner)
    optimiser.state.clear()
    if moved:
        optimiser_state(learner, optimiser, of_all=True)
        _forget(learner, optimiser, moved)
    return trained_state(learner, optimiser)


def optimiser_state(module: nn.Module, optimiser: torch.optim.Optimizer, *, of_all: bool = False) -> dict[str, Any]:
    """The optimiser's state by the names of the module's parameters.

    of_all: makes state of parameters that no step has moved yet, if none has moved any.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    # Before the first step there is no state, and asking for it would make some.
    return dict(get_optimizer_state_dict(module, optimiser)) if optimiser.state or of_all else {}


def load_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `optimiser_state`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    moved = state.get("state", {})
    if not moved:
        return
    # Not strict, for what no arm has trained yet has no state. The function makes some for it, which has to go again:
    # a bias correction would start a step late.
    set_optimizer_state_dict(module, optimiser, state, options=StateDictOptions(strict=False))
    _forget(module, optimiser, moved)


def _forget(module: nn.Module, optimiser: torch.optim.Optimizer, moved: Collection[str]) -> None:
    """Drops the optimiser's state of all parameters but these."""
    for name, parameter in module.named_parameters():
        if name not in moved:
            optimiser.state.pop(parameter, None)


def copy_whole(learner: Learner, module: nn.Module, copy: nn.Module) -> None:
    """Writes the weights of a sharded module, the learner's student or one sharded in the same way, into a whole copy.

    All ranks must call this; each one's copy is filled, a tensor at a time.
    """
    reshard(learner)
    weights = module.state_dict()
    for name, ours in copy.state_dict().items():
        ours.copy_(whole(weights[name]))


def random_state(ranks: Ranks) -> list[dict[str, Tensor]]:
    """The state of torch's random numbers on every rank."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return ranks.gather(state)


def load_random(states: list[dict[str, Tensor]], ranks: Ranks) -> None:
    """The inverse of `random_state`; ranks that were not there before start numbers of their own."""
    state = states[min(ranks.rank, len(states) - 1)]
    torch.set_rng_state(state["cpu"])
    if ranks.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], ranks.device)
    if ranks.rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
