"""Taps of a model of transformers: hidden states of its layers, and q and k as its attention gets them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima_core.errors import OptimaError
from optima_core.integrations.huggingface.attention import (
    AttentionCall,
    Calls,
    forbidden,
    lend_attention,
    lending,
    only_forbids,
)
from optima_core.integrations.huggingface.modules import FoundModule, find_modules
from optima_core.paths import expand_layers
from optima_core.taps import AttentionTap, LayerTap, Taps, WantedTaps


class TransformersAdaptor:
    """A model of transformers whose layers are tapped.

    Its attentions lend q and k through transformers' attention interface, after rotary positions and norms, by key head
    where those are grouped, with the mask that the model made. Hidden states are what the layers return; hooks are on
    for the wanted layers of one pass alone. Works in eval and train, under autocast, with gradient checkpointing
    (use_reentrant=False), PEFT, DDP and FSDP2; not under torch.compile.

    Args:
        model: A model of transformers, or what holds one. Its attention implementation becomes a lending one, which
            calls its own and changes nothing in what it computes.
        modules: Module name -> layers, as `optima_core.LayerPaths` has them ("model.layers.*", or a list of paths), for
            the modules of those names only; None takes all that `find_modules` finds.

    Raises OptimaError if there is no such path, or the attention cannot be read.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, str | Sequence[str]] | None = None) -> None:
        self.model = model
        self._parts = dict(model.named_modules())
        _refuse_compiled(self._parts)
        self._recomputing = [part for part in self._parts.values() if hasattr(part, "gradient_checkpointing")]
        lend_attention(model)
        if modules is None:
            self.modules = find_modules(model)
        else:
            self.modules = {name: _named_by_hand(model, name, layers) for name, layers in modules.items()}
        self._masks_read: set[nn.Module] = set()
        self._inside: dict[nn.Module, frozenset[nn.Module]] = {}

    def __str__(self) -> str:
        return "\n".join(str(module) for module in self.modules.values())

    def depth(self, module: str) -> int:
        """Number of layers of a module, for `optima_core.ModulePair`."""
        return len(self.modules[module].layers)

    def run(self, wanted: WantedTaps, *, valid: Mapping[str, Tensor] | None = None, **inputs: Any) -> tuple[Any, Taps]:
        """The model's output for these inputs, and the wanted taps.

        valid: bool [B, N] by module name, True where a token counts; of a module that is not named, the mask of its
            self-attention tells which tokens are padding.

        Raises OptimaError if a wanted layer does not run, or what it gives cannot be read, or the model is compiled.
        """
        _refuse_compiled(self._parts)
        if torch.compiler.is_compiling():
            raise OptimaError("hooks cannot be compiled: a model behind an adaptor is distilled with compile: false")
        unknown = set(wanted) - set(self.modules)
        if unknown:
            raise OptimaError(f"there is no module {min(unknown)!r}; the model has {', '.join(self.modules)}")
        paths = {self.modules[name].layers[i] for name, numbers in wanted.items() for i in numbers}
        layers = {path: self.model.get_submodule(path) for path in paths}
        states: dict[str, Any] = {}
        parts = frozenset[nn.Module]().union(*(self._parts_of(*named) for named in layers.items()))
        with _outputs_kept(layers, states), lending(parts) as calls:
            output = self.model(**inputs)
        self._refuse_severed(calls)
        taps: Taps = {}
        for name, numbers in wanted.items():
            found = (self.modules[name].layers[i] for i in numbers)
            known = None if valid is None else valid.get(name)
            taps[name] = tuple(self._tap(path, layers[path], states, calls, known) for path in found)
        return output, taps

    def _parts_of(self, path: str, layer: nn.Module) -> frozenset[nn.Module]:
        """What a layer is made of; walked through once, for models have thousands of parts and steps are short."""
        if layer not in self._inside:
            found = dict(layer.named_modules(prefix=path))
            _refuse_compiled(found)
            self._inside[layer] = frozenset(found.values())
        return self._inside[layer]

    def _tap(
        self, path: str, layer: nn.Module, states: Mapping[str, Any], calls: Calls, valid: Tensor | None
    ) -> LayerTap:
        hidden = _state(path, states)
        parts = self._parts_of(path, layer)
        made = [self._attention(part, found) for part, found in calls.items() if part in parts]
        if valid is None and made:
            valid = _attended_tokens(made[0].mask, hidden.shape[:2])
        taps = [_rows_that_count(tap, valid) for tap in made]
        return LayerTap(hidden, tuple(taps), valid)

    def _attention(self, module: nn.Module, calls: list[AttentionCall]) -> AttentionTap:
        if len(calls) > 1:
            return _side_by_side(calls)
        call = calls[0]
        mask, unlike = call.mask, call.unlike
        if mask is not None and mask.is_floating_point():
            if module not in self._masks_read:
                if not only_forbids(mask):
                    unlike = unlike or "a mask of other values than 0 and -inf is added to its scores"
                else:
                    self._masks_read.add(module)
            mask = ~forbidden(mask)
        return AttentionTap(call.q, call.k, call.causal, mask, scale=call.scale, unlike=unlike)

    def _refuse_severed(self, calls: Calls) -> None:
        """Reentrant checkpointing runs layers without a graph first: what they lend then has no gradient."""
        if not torch.is_grad_enabled() or not any(part.gradient_checkpointing for part in self._recomputing):
            return
        for module, found in calls.items():
            learns = module.training and any(parameter.requires_grad for parameter in module.parameters())
            if learns and any(not call.q.requires_grad and not call.k.requires_grad for call in found):
                raise OptimaError(
                    "gradient checkpointing with use_reentrant=True cuts taps off from their gradients; turn it on "
                    'with {"use_reentrant": False}'
                )


def _refuse_compiled(parts: Mapping[str, nn.Module]) -> None:
    for name, module in parts.items():
        # Of torch.compile(module), and of module.compile().
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise OptimaError(
                f"{name or 'the model'} is compiled, and compiled code runs past the hooks that catch hidden states; "
                "give the model as it was before torch.compile"
            )


def _named_by_hand(model: nn.Module, name: str, layers: str | Sequence[str]) -> FoundModule:
    paths = expand_layers(model, layers)
    return FoundModule(name, tuple(paths), type(model.get_submodule(paths[0])).__name__)


@contextlib.contextmanager
def _outputs_kept(layers: Mapping[str, nn.Module], states: dict[str, Any]) -> Iterator[None]:
    def keeper(path: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            if path in states:
                raise OptimaError(f"{path} ran twice in one forward pass; a layer that is used again cannot be tapped")
            states[path] = output

        return keep

    handles = [layer.register_forward_hook(keeper(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(path: str, states: Mapping[str, Any]) -> Tensor:
    """[B, N, D]; packed tokens [N, D] are one sample."""
    if path not in states:
        raise OptimaError(f"{path} was not called in the forward pass, so it cannot be tapped; leave its module out")
    output = states[path]
    state = output[0] if isinstance(output, tuple | list) and output else output
    state = getattr(state, "pooler_output", state)
    if not isinstance(state, Tensor) or state.dim() not in (2, 3):
        given = f"a tensor of shape {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise OptimaError(f"{path} gave {given}; a tensor [B, N, D] or [N, D] is needed, leave its module out")
    return state if state.dim() == 3 else state[None]


def _side_by_side(calls: list[AttentionCall]) -> AttentionTap:
    """Images that were packed and attended to one by one, as the samples of one map, the shorter ones padded."""
    longest_q, longest_k = (max(x.shape[2] for x in side) for side in zip(*(call[:2] for call in calls), strict=True))
    lengths = torch.tensor([[call.q.shape[2], call.k.shape[2]] for call in calls for _ in range(len(call.q))])
    q = torch.cat([F.pad(call.q, (0, 0, 0, longest_q - call.q.shape[2])) for call in calls])
    k = torch.cat([F.pad(call.k, (0, 0, 0, longest_k - call.k.shape[2])) for call in calls])
    mask = None
    if bool((lengths != torch.tensor([longest_q, longest_k])).any()):
        rows, columns = (
            torch.arange(longest)[None] < lengths[:, i, None] for i, longest in enumerate((longest_q, longest_k))
        )
        mask = (rows[:, None, :, None] & columns[:, None, None, :]).to(q.device)
    unlike = [call.unlike for call in calls if call.unlike]
    if any(call.mask is not None for call in calls):
        unlike.append("packed images have masks of their own")
    return AttentionTap(q, k, calls[0].causal, mask, scale=calls[0].scale, unlike=next(iter(unlike), ""))


def _attended_tokens(mask: Tensor | None, tokens: torch.Size) -> Tensor | None:
    """bool [B, N]: the tokens that any token attends to, of a self-attention."""
    if mask is None or mask.dim() != 4 or mask.shape[3] != tokens[1] or mask.shape[2] not in (1, tokens[1]):
        return None
    return mask.any(dim=1).any(dim=1).expand(tokens)


def _rows_that_count(tap: AttentionTap, valid: Tensor | None) -> AttentionTap:
    """The tap without the rows of padded tokens."""
    if valid is None or valid.shape != (tap.q.shape[0], tap.q.shape[2]):
        return tap
    rows = valid[:, None, :, None]
    return tap._replace(mask=rows if tap.mask is None else tap.mask & rows)
