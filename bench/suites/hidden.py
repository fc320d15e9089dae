"""`hidden_mses` beside `F.mse_loss(F.linear(...))`, that compiled, TextBrewer and torchdistill: forward and backward.

TextBrewer and torchdistill project with a module of their own and hand the result to a mean squared error.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.contest import Contest, Sweep, Work
from bench.harness.losses import Loss, LossContest, by_layer, draws, dtype_of
from bench.harness.peers import compiled, textbrewer, torchdistill
from optima_kernels import hidden_mses


def contests(device: torch.device) -> list[Contest]:
    if device.type == "cpu":
        return [
            contest(device, None, 1, 64 * 257, 768, 1024, {"time": 1.0, "extra": 0.6}),
            contest(device, "layernorm", 1, 4 * 577, 768, 1024),
            contest(device, None, 1, 64 * 257, 768, 1024, autocast=True),
            contest(device, "layernorm", 1, 4 * 577, 768, 1024, autocast=True),
        ]
    return [
        contest(device, normalize, 6, 16 * 577, 768, 1024, autocast=autocast)
        for autocast in (False, True)
        for normalize in ("layernorm", None)
    ]


def sweeps(device: torch.device) -> list[Sweep]:
    tokens = (1024, 2048, 4096, 8192)
    return [
        Sweep("hidden", "768 -> 1024", "N", tokens, lambda n: contest(device, None, 1, n, 768, 1024, peers=False)),
        Sweep(
            "hidden",
            "1154 tokens, 768 -> 1024",
            "layers",
            (1, 2, 4, 8),
            lambda n: contest(device, None, n, 1154, 768, 1024, peers=False),
        ),
    ]


def contest(
    device: torch.device,
    normalize: str | None,
    layers: int,
    tokens: int,
    d_s: int,
    d_t: int,
    bars: dict[str, float] | None = None,
    peers: bool = True,
    autocast: bool = False,
) -> Contest:
    """`autocast`: float32 tensors under autocast to bfloat16, as the engine has them; else on a GPU bfloat16 ones."""
    dtype = torch.float32 if autocast else dtype_of(device)
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)

    @cache
    def tensors() -> list[list[Tensor]]:
        """Student states, weights, biases, and teacher states, each with an entry a layer."""
        normal = draws(device, dtype)
        shapes = ((tokens, d_s), (d_t, d_s), (d_t,), (tokens, d_t))
        made = [[normal(*shape) for _ in range(layers)] for shape in shapes]
        return [[x.requires_grad_(i < 3) for x in side] for i, side in enumerate(made)]

    def projected(compare: Loss) -> Loss:
        def loss(h_s: Tensor, weight: Tensor, bias: Tensor, h_t: Tensor) -> Tensor:
            states = F.linear(h_s, weight, bias)
            if normalize == "layernorm":
                states, h_t = F.layer_norm(states, (d_t,)), F.layer_norm(h_t, (d_t,))
            return compare(states, h_t)

        return loss

    def in_precision(loss: Loss) -> Loss:
        def whole(*sides: Sequence[Tensor]) -> Tensor:
            with precision():
                return loss(*sides)

        return whole

    def of_states(make: Callable[[], Loss]) -> Callable[[], Loss]:
        return lambda: in_precision(by_layer(projected(make())))

    def ours(backend: str | None = None, gate: float | None = None) -> Loss:
        gates = None if gate is None else torch.full((layers,), gate, device=device)

        def loss(*sides: Sequence[Tensor]) -> Tensor:
            h_s, weight, bias, h_t = sides
            return hidden_mses(h_s, h_t, weight, bias, normalize=normalize, backend=backend, gate=gates).sum()

        return in_precision(loss)

    others: dict[str, Callable[[], Loss]] = {}
    if peers:
        others["torch.compile(eager)"] = lambda: in_precision(by_layer(compiled(projected(F.mse_loss))))
        others["TextBrewer"] = of_states(lambda: textbrewer().hid_mse_loss)
        others["torchdistill"] = of_states(torchdistill_mse)
    moved = layers * dtype.itemsize * (2 * tokens * d_s + tokens * d_t + 2 * d_t * d_s)
    measured = LossContest(device, tensors, lambda sides: [x for side in sides[:3] for x in side], True, bars or {})
    return measured.contest(
        "hidden",
        f"{normalize or 'plain'}{', autocast' if autocast else ''}, L {layers}, {tokens} tokens, {d_s} -> {d_t}",
        of_states(lambda: F.mse_loss),
        ours,
        others,
        rounded=autocast,
        work=Work(6.0 * layers * tokens * d_s * d_t, 0.0, moved),
    )


def torchdistill_mse() -> Loss:
    """Its way to any criterion of torch: values looked up by module path in both models' outputs."""
    place = {"module_path": "layer", "io": "output"}
    wrapped = torchdistill().SimpleLossWrapper(
        torch.nn.MSELoss(), input=place | {"is_from_teacher": False}, target=place | {"is_from_teacher": True}
    )

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        return wrapped({"layer": {"output": student}}, {"layer": {"output": teacher}}, None)

    return compare
