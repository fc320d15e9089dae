"""`hidden_mses` beside `F.mse_loss(F.linear(...))`, that compiled, TextBrewer and torchdistill: forward and backward.

TextBrewer and torchdistill project with a module of their own and hand the result to a mean squared error.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Bar, Contest, Run, Sweep, Work
from bench.peers import compiled, textbrewer, torchdistill
from optima_kernels import hidden_mses

Compare = Callable[[Tensor, Tensor], Tensor]


def contests(device: torch.device) -> list[Contest]:
    if device.type == "cpu":
        return [
            contest(device, None, 1, 64 * 257, 768, 1024, {"time": 1.0, "extra": 0.6}),
            contest(device, "layernorm", 1, 4 * 577, 768, 1024),
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
    dtype = torch.float32 if device.type == "cpu" or autocast else torch.bfloat16
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)

    @cache
    def tensors() -> list[list[Tensor]]:
        """Student states, weights, biases, and teacher states."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, trained: bool) -> list[Tensor]:
            drawn = (torch.randn(shape, generator=generator, device=device) for _ in range(layers))
            return [x.to(dtype).requires_grad_(trained) for x in drawn]

        shapes = ((tokens, d_s), (d_t, d_s), (d_t,))
        return [*(normal(*shape, trained=True) for shape in shapes), normal(tokens, d_t, trained=False)]

    def gradients(total: Tensor) -> Sequence[Tensor]:
        return total.detach(), *torch.autograd.grad(total, [x for side in tensors()[:3] for x in side])

    def of_states(make: Callable[[], Compare]) -> Callable[[], Run]:
        def prepare() -> Run:
            compare = make()

            def loss(h_s: Tensor, weight: Tensor, bias: Tensor, h_t: Tensor) -> Tensor:
                projected = F.linear(h_s, weight, bias)
                if normalize == "layernorm":
                    projected, h_t = F.layer_norm(projected, (d_t,)), F.layer_norm(h_t, (d_t,))
                return compare(projected, h_t)

            called = compiled(loss) if make is as_compiled else loss

            def run() -> Sequence[Tensor]:
                with precision():
                    total = torch.stack([called(*each) for each in zip(*tensors(), strict=True)]).sum()
                return gradients(total)

            return run

        return prepare

    def ours(backend: str | None = None, gate: float | None = None) -> Run:
        h_s, weight, bias, h_t = tensors()
        gates = None if gate is None else torch.full((layers,), gate, device=device)

        def run() -> Sequence[Tensor]:
            with precision():
                losses = hidden_mses(h_s, h_t, weight, bias, normalize=normalize, backend=backend, gate=gates)
            return gradients(losses.sum())

        return run

    contenders: dict[str, Callable[[], Run]] = {"eager": of_states(lambda: F.mse_loss), "optima": ours}
    if peers:
        contenders["torch.compile(eager)"] = of_states(as_compiled)
        contenders["TextBrewer"] = of_states(lambda: textbrewer().hid_mse_loss)
        contenders["torchdistill"] = of_states(torchdistill_mse)
    if device.type != "cpu":
        contenders["optima, blocked"] = lambda: ours("blocked")
        contenders["optima, gated"] = lambda: ours(gate=1.0)
        contenders["optima, gate closed"] = lambda: ours(gate=0.0)
    moved = layers * dtype.itemsize * (2 * tokens * d_s + tokens * d_t + 2 * d_t * d_s)
    return Contest(
        suite="hidden",
        name=f"{normalize or 'plain'}{', autocast' if autocast else ''}, L {layers}, {tokens} tokens, {d_s} -> {d_t}",
        contenders=contenders,
        unequal=("optima, gate closed",),
        tolerance=1e-4 if device.type == "cpu" else 5e-2,
        bars=tuple(Bar("optima", "eager", quantity, most) for quantity, most in (bars or {}).items()),
        work=Work(6.0 * layers * tokens * d_s * d_t, 0.0, moved),
    )


def as_compiled() -> Compare:
    """Eager's loss; the whole of it is compiled, projection included."""
    return F.mse_loss


def torchdistill_mse() -> Compare:
    """Its way to any criterion of torch: values looked up by module path in both models' outputs."""
    place = {"module_path": "layer", "io": "output"}
    wrapped = torchdistill().SimpleLossWrapper(
        torch.nn.MSELoss(), input=place | {"is_from_teacher": False}, target=place | {"is_from_teacher": True}
    )

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        return wrapped({"layer": {"output": student}}, {"layer": {"output": teacher}}, None)

    return compare
