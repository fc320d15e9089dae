"""Taps of third-party models: which layers they have, and where q and k are, is told by dotted paths.

    bert = Adaptor(
        BertModel(...),
        {"encoder": LayerPaths("encoder.layer.*", (LinearQK("attention.self.query", "attention.self.key", heads=12),))},
    )
    output, taps = bert.run(wanted, input_ids=ids, attention_mask=valid, valid=valid.bool())

A model of one's own better returns its taps (`optima_core.taps`). Here hooks catch them: put on for one forward pass,
on the wanted layers alone, and taken off again, so that an untapped pass is the plain model. They keep references and
compute nothing; q and k are made of what they kept once the model is through.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima_core.errors import OptimaError
from optima_core.paths import expand_layers, find_submodule, join_path
from optima_core.recompute import recompute_activations
from optima_core.taps import AttentionTap, LayerTap, Taps, WantedTaps
from optima_core.witness import Witness, unlike_scores


@dataclass(frozen=True)
class LinearQK:
    """Attention whose q and k come out of two submodules, as [B, N, heads * d] each.

    The map must be softmax(q k^T / sqrt(d)) of these outputs. The first pass compares it with what the attention
    computes, and a model that does more to q and k (rotary positions, norms, biases) is refused.

    Attributes:
        q: Path of the query projection, from the layer.
        k: Path of the key projection, from the layer.
        heads: Number of query heads.
        key_heads: Number of key heads, each shared by consecutive query heads; null for as many as query heads.
        context: Module of the adaptor whose tokens are the keys, for cross-attention; null for self-attention.
    """

    q: str
    k: str
    heads: int
    key_heads: int | None = None
    context: str | None = None


@dataclass(frozen=True)
class LinearQKV:
    """Self-attention with one projection for q, k and v, one after the other: [B, N, 3 * heads * d].

    Refused like `LinearQK` where more than that is done to q and k.

    Attributes:
        qkv: Path of the projection, from the layer.
        heads: Number of heads.
        context: None; the keys are of its own tokens.
    """

    qkv: str
    heads: int
    context: None = None


@dataclass(frozen=True)
class TorchAttention:
    """An nn.MultiheadAttention. It does not show its q and k, so those of wanted layers are projected once more.

    Attributes:
        path: Its path, from the layer.
        context: Module of the adaptor whose tokens are the keys, for cross-attention; null for self-attention.
    """

    path: str
    context: str | None = None


QKSource = LinearQK | LinearQKV | TorchAttention


@dataclass(frozen=True)
class LayerPaths:
    """The layers of one module of a model, and what to tap of each.

    Attributes:
        layers: Dotted paths of the layers from the model, in order; or one path in which "*" stands for the numbers of
            an nn.ModuleList or nn.Sequential, as in "encoder.layers.*".
        attention: The attentions of a layer in order of computation.
        hidden: Path, from the layer, of the submodule whose output is the hidden state; "" takes the layer's own. Of
            an output that is a tuple the first element counts.
        causal: The self-attentions let token i see tokens 0..i only.
        batch_first: Hidden states are [B, N, D]; otherwise [N, B, D].
    """

    layers: str | Sequence[str]
    attention: tuple[QKSource, ...] = ()
    hidden: str = ""
    causal: bool = False
    batch_first: bool = True


class _Layer(NamedTuple):
    """A layer with what is hooked of it: modules by their full paths."""

    path: str
    hidden: str
    sources: tuple[tuple[str, ...], ...]


class Adaptor:
    """A model whose layers are tapped by dotted path.

    Args:
        model: Any torch model; it is not changed.
        modules: Module name (as in `ModulePair`) -> its layers.

    Raises OptimaError for a path that does not exist, naming the nearest, or a submodule that cannot be read.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, LayerPaths]) -> None:
        self.model = model
        self.modules = dict(modules)
        self._layers = {name: tuple(_find_layers(model, paths)) for name, paths in self.modules.items()}
        self._proven: set[tuple[str, ...]] = set()
        for name, paths in self.modules.items():
            unknown = {source.context for source in paths.attention} - {None, *self.modules}
            if unknown:
                raise OptimaError(
                    f"module {name}: context {min(map(str, unknown))!r} is none of the modules {list(self.modules)}"
                )

    def depth(self, module: str) -> int:
        """Number of layers of a module, for `ModulePair`."""
        return len(self._layers[module])

    def recompute_activations(self) -> None:
        """`optima_core.recompute.recompute_activations` of all layers of all modules."""
        found = [layer.path for layers in self._layers.values() for layer in layers]
        recompute_activations(self.model.get_submodule(path) for path in dict.fromkeys(found))

    def run(
        self,
        wanted: WantedTaps,
        *arguments: Any,
        valid: Tensor | Mapping[str, Tensor] | None = None,
        **named: Any,
    ) -> tuple[Any, Taps]:
        """The model's output for these arguments, and the wanted taps.

        valid: bool [B, N], True where a token counts; of all modules, or by module name. Padded tokens are not
            compared, neither as rows nor as columns of maps. None if all count.

        Raises OptimaError if a wanted layer does not run, or gives no tensor.
        """
        if torch.compiler.is_compiling():
            raise OptimaError("hooks cannot be compiled: a model behind an adaptor is distilled with compile: false")
        unknown = set(wanted) - set(self.modules)
        if unknown:
            raise OptimaError(f"there is no module {min(unknown)!r}; the adaptor has {list(self.modules)}")
        caught, witness = _Caught(), Witness()
        with contextlib.ExitStack() as stack:
            if any(wanted.values()):
                stack.enter_context(_without_fused_encoder())
            for name, numbers in wanted.items():
                for i in numbers:
                    stack.enter_context(self._hooked(self._layers[name][i], self.modules[name], caught))
                    stack.enter_context(self._watched(self._layers[name][i], self.modules[name], witness))
            if witness.awaited:
                stack.enter_context(witness)
            output = self.model(*arguments, **named)
        taps: Taps = {}
        for name, numbers in wanted.items():
            taps[name] = tuple(self._tap(name, self._layers[name][i], caught, valid) for i in numbers)
            for i, tap in zip(numbers, taps[name], strict=True):
                self._prove(self._layers[name][i], self.modules[name], tap, witness)
        return output, taps

    @contextlib.contextmanager
    def _watched(self, layer: _Layer, paths: LayerPaths, witness: Witness) -> Iterator[None]:
        """On the first pass, the witness is told which projections ran last."""
        handles = []
        for source, found in zip(paths.attention, layer.sources, strict=True):
            if not isinstance(source, TorchAttention) and found not in self._proven:
                handles += witness.expect_after([self.model.get_submodule(path) for path in found], found)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _prove(self, layer: _Layer, paths: LayerPaths, tap: LayerTap, witness: Witness) -> None:
        """Raises OptimaError if the attention computed other maps than those of the tap."""
        for source, found, one in zip(paths.attention, layer.sources, tap.attention, strict=True):
            if found in witness.scores:
                error = unlike_scores(
                    witness.scores[found], one.q, one.k, causal=one.causal or source.context is not None
                )
                if error:
                    raise OptimaError(
                        f"{', '.join(found)}: {error}; take optima_core.integrations.huggingface.TransformersAdaptor "
                        "for a model of transformers, else let the model return its own taps"
                    )
            self._proven.add(found)

    @contextlib.contextmanager
    def _hooked(self, layer: _Layer, paths: LayerPaths, caught: "_Caught") -> Iterator[None]:
        handles = [caught.outputs_of(self.model, layer.hidden)]
        for source, found in zip(paths.attention, layer.sources, strict=True):
            catch = caught.inputs_of if isinstance(source, TorchAttention) else caught.outputs_of
            handles += [catch(self.model, path) for path in found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap(
        self, name: str, layer: _Layer, caught: "_Caught", valid: Tensor | Mapping[str, Tensor] | None
    ) -> LayerTap:
        paths = self.modules[name]

        def valid_of(module: str) -> Tensor | None:
            return valid.get(module) if isinstance(valid, Mapping) else valid

        hidden = caught.output(layer.hidden)
        attention = []
        for source, found in zip(paths.attention, layer.sources, strict=True):
            q, k = _queries_and_keys(self.model, source, found, caught, paths.batch_first)
            mask = _pairs(valid_of(name), valid_of(source.context or name))
            attention.append(AttentionTap(q, k, paths.causal and source.context is None, mask))
        return LayerTap(hidden if paths.batch_first else hidden.transpose(0, 1), tuple(attention), valid=valid_of(name))


class _Caught:
    """What hooks saw in one forward pass, by the full path of the module."""

    def __init__(self) -> None:
        self._outputs: dict[str, Any] = {}
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}

    def outputs_of(self, model: nn.Module, path: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            _refuse_second(path, self._outputs)
            self._outputs[path] = output

        return model.get_submodule(path).register_forward_hook(keep)

    def inputs_of(self, model: nn.Module, path: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            _refuse_second(path, self._inputs)
            given = dict(zip(("query", "key"), arguments, strict=False)) | named
            self._inputs[path] = given["query"], given["key"]

        return model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)

    def output(self, path: str) -> Tensor:
        _refuse_missing(path, self._outputs)
        output = self._outputs[path]
        state = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(state, Tensor) or state.is_nested or state.dim() != 3:
            given = f"a tensor of shape {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise OptimaError(
                f"{path or 'the model'} gave {given}; a tensor [B, N, D] is needed, name another submodule"
            )
        return state

    def inputs(self, path: str) -> tuple[Tensor, Tensor]:
        _refuse_missing(path, self._inputs)
        return self._inputs[path]


def _refuse_second(path: str, seen: Mapping[str, object]) -> None:
    if path in seen:
        raise OptimaError(f"{path} ran twice in one forward pass; a layer that is used again cannot be tapped by path")


def _refuse_missing(path: str, seen: Mapping[str, object]) -> None:
    if path not in seen:
        raise OptimaError(f"{path} was not called in the forward pass, so it cannot be tapped; name what is called")


@contextlib.contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """In eval mode torch's transformer layers run as one fused call, or on nested tensors, and call no submodule."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _find_layers(model: nn.Module, paths: LayerPaths) -> Iterator[_Layer]:
    for path in expand_layers(model, paths.layers):
        sources = []
        for source in paths.attention:
            parts = _parts(source)
            found = tuple(join_path(path, part) for part in parts)
            for part, heads in zip(found, parts.values(), strict=True):
                _refuse_unreadable(source, part, find_submodule(model, part), heads)
            sources.append(found)
        hidden = join_path(path, paths.hidden)
        find_submodule(model, hidden)
        yield _Layer(path, hidden, tuple(sources))


def _parts(source: QKSource) -> dict[str, int]:
    """The submodules that are hooked, and by how many heads the features of each must be divisible."""
    match source:
        case LinearQK(q, k, heads, key_heads):
            return {q: heads, k: key_heads or heads}
        case LinearQKV(qkv, heads):
            return {qkv: 3 * heads}
        case TorchAttention(path):
            return {path: 1}


def _refuse_unreadable(source: QKSource, path: str, found: nn.Module, heads: int) -> None:
    kind = type(found).__name__
    if isinstance(source, TorchAttention):
        if not isinstance(found, nn.MultiheadAttention):
            raise OptimaError(
                f"{path} is a {kind}, no nn.MultiheadAttention; name its projections in a LinearQK or LinearQKV"
            )
        if found.bias_k is not None or found.add_zero_attn:
            raise OptimaError(f"{path} adds a key of its own (add_bias_kv or add_zero_attn); its maps cannot be read")
        return
    if isinstance(found, nn.MultiheadAttention):
        raise OptimaError(f"{path} is an nn.MultiheadAttention; name it in a TorchAttention")
    width = getattr(found, "out_features", None)
    if isinstance(width, int) and width % heads:
        of = " of q, k and v" if isinstance(source, LinearQKV) else ""
        raise OptimaError(f"{path} gives {width} features, which {heads} heads{of} do not divide")


def _queries_and_keys(
    model: nn.Module, source: QKSource, paths: Sequence[str], caught: _Caught, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """q [B, H, N, d] and k [B, H_k, M, d]."""
    if isinstance(source, TorchAttention):
        attention = model.get_submodule(paths[0])
        assert isinstance(attention, nn.MultiheadAttention)
        (q, k), batch_first = _project(attention, *caught.inputs(paths[0])), attention.batch_first
        heads, key_heads = attention.num_heads, attention.num_heads
    elif isinstance(source, LinearQKV):
        q, k, _ = torch.chunk(caught.output(paths[0]), 3, dim=-1)
        heads = key_heads = source.heads
    else:
        q, k = (caught.output(path) for path in paths)
        heads, key_heads = source.heads, source.key_heads or source.heads
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    q, k = (torch.unflatten(x, -1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, key_heads)))
    return q, k


def _project(attention: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    width = attention.embed_dim
    if attention.in_proj_weight is not None:
        w_q, w_k, _ = torch.split(attention.in_proj_weight, width)
    else:
        w_q, w_k = attention.q_proj_weight, attention.k_proj_weight
    b_q, b_k = (None, None) if attention.in_proj_bias is None else torch.split(attention.in_proj_bias, width)[:2]
    return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k)


def _pairs(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """bool, broadcasts to [B, H, N, M]: both tokens count."""
    masks = ([] if rows is None else [rows[:, None, :, None]]) + ([] if columns is None else [columns[:, None, None]])
    if not masks:
        return None
    return masks[0] & masks[1] if len(masks) == 2 else masks[0]
