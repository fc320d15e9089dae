"""The state of what is trained, whole and on the CPU however it is spread over ranks, and back again.

torch.distributed.checkpoint's state-dict functions gather it, name optimiser state by parameter rather than by number,
and spread it anew: so one file, written by one rank, serves one process, DDP and FSDP on any number of ranks. They are
imported where they are used, since that takes half a second, which a command that trains nothing should not wait for.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optima_core.average import RunningAverage
from optima_core.learner import Learner
from optima_core.parallel import Ranks
from optima_core.shards import reshard, whole

TRAINED = ("student", "objective", "optimiser", "ema")
"""The entries of `trained_state` and `averaged_state`."""


def trained_state(learner: Learner, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights of the student and the projections, and the optimiser's state; empty on all ranks but the first."""
    from torch.distributed.checkpoint import state_dict as distributed

    reshard(learner)
    options = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = distributed.get_model_state_dict(learner, options=options)
    state: dict[str, Any] = {
        part: {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        for part in ("student", "objective")
    }
    # Before the first step there is no state, and asking for it would make some.
    state["optimiser"] = (
        distributed.get_optimizer_state_dict(learner, optimiser, options=options) if optimiser.state else {}
    )
    return state


def copy_whole(learner: Learner, module: nn.Module, copy: nn.Module) -> None:
    """Writes the weights of a sharded module, the learner's student or one sharded in the same way, into a whole copy.

    All ranks must call this; each one's copy is filled, a tensor at a time.
    """
    reshard(learner)
    weights = module.state_dict()
    for name, ours in copy.state_dict().items():
        ours.copy_(whole(weights[name]))


def averaged_state(average: RunningAverage | None) -> dict[str, Any]:
    """The running average's state, of whole tensors; all ranks must call this."""
    state = {} if average is None else average.state_dict()
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def load_averaged(average: RunningAverage, state: dict[str, Any], ranks: Ranks) -> None:
    """The inverse of `averaged_state`; the state of the first rank counts."""
    from torch.distributed.checkpoint import state_dict as distributed

    average.steps = ranks.broadcast(state.get("steps"))
    weights = {name.removeprefix("module."): value for name, value in state.items() if name != "steps"}
    options = distributed.StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.count > 1)
    distributed.set_model_state_dict(average.module, weights, options=options)


def load_trained(learner: Learner, optimiser: torch.optim.Optimizer, state: dict[str, Any], ranks: Ranks) -> None:
    """The inverse of `trained_state`, whatever the number of ranks was; that of the first rank counts."""
    from torch.distributed.checkpoint import state_dict as distributed

    reshard(learner)
    options = distributed.StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.count > 1)
    weights = {
        f"{part}.{name}": value for part in ("student", "objective") for name, value in state.get(part, {}).items()
    }
    distributed.set_model_state_dict(learner, weights, options=options)
    moments = state.get("optimiser", {})
    saved = ranks.broadcast(list(moments.get("state", {})))
    if not saved:
        return
    # Not strict, for what no arm has trained yet has no state. The function makes some for it, which has to go again:
    # a bias correction would start a step late.
    distributed.set_optimizer_state_dict(learner, optimiser, moments, options=replace(options, strict=False))
    for name, parameter in learner.named_parameters():
        if name not in saved:
            optimiser.state.pop(parameter, None)


def random_state(ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """The state of torch's random numbers on every rank."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return ranks.gather(state)


def load_random(states: list[dict[str, torch.Tensor]], ranks: Ranks) -> None:
    """The inverse of `random_state`; ranks that were not there before start numbers of their own."""
    state = states[min(ranks.rank, len(states) - 1)]
    torch.set_rng_state(state["cpu"])
    if ranks.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], ranks.device)
    if ranks.rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
