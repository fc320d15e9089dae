"""A student's weights from its teacher's: by truncation, or by projection onto the teacher's principal components.

Layers follow the layer map of distillation. Both copy what has equal shapes as it is, so that a student of the
teacher's widths starts with exactly the teacher's layers.

`truncate_teacher` takes the leading features, heads and hidden units of everything else.

`project_teacher` looks at what the teacher does with a batch, and learns nothing:

- The residual stream of width D_t is replaced by its D_s - 1 strongest directions (eigenvectors of its second moment).
  All readers of a stream are layer norms, which ignore the mean over features; so the directions are put into the
  mean-free part of the student's features, where a rotation commutes with a layer norm. Gains and offsets of norms move
  into the matrices behind them, scaled by what the stream has lost of its length. (The idea of rotating a stream under
  its norms is that of SliceGPT, Ashkboos et al., arXiv 2401.15024, for RMS norms and one rotation a layer.)
- The heads that contribute most stay. Where they are narrower, queries and keys are the best approximation of the
  teacher's scores of that rank, values and outputs of what the head writes, both over the batch's second moments.
- The hidden units of an MLP that contribute most stay; the mean of those that go moves into the bias.

With the teacher's own widths all of that is exact up to rounding, but for a norm of a normed state (the image tokens
under a pooler, the states under a task's head), where a gain between two norms has no exact counterpart.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optima.coca.heads import ClassificationHead
from optima.coca.layers import (
    AttentionalPooler,
    CrossAttention,
    CrossAttentionBlock,
    Mlp,
    SelfAttention,
    SelfAttentionBlock,
)
from optima.coca.model import CoCa
from optima.coca.multimodal_decoder import MultimodalLayer
from optima.coca.pairs import module_pairs

_LAYERS = {"image_encoder": "blocks", "text_decoder": "blocks", "multimodal_decoder": "layers"}


@torch.no_grad()
def truncate_teacher(student: CoCa, teacher: CoCa, layer_map: str | Mapping[str, Sequence[int]] = "uniform") -> None:
    """Overwrites the student's weights by the leading parts of its teacher's; what the teacher lacks stays as it is.

    Raises ValueError if a module of the student is deeper than the teacher's, or if pictures become other tokens.
    """
    _refuse_other_pictures(student, teacher)
    theirs = dict(teacher.named_parameters())
    counterpart = _counterparts(student, teacher, layer_map)
    for name, target in student.named_parameters():
        source = theirs.get(counterpart(name))
        if source is None:
            continue
        if name == "text_decoder.position":
            target[-1:, : source.shape[1]] = source[-1:, : target.shape[1]]
            _copy_leading(target[:-1], source[:-1])
        else:
            _copy_leading(_by_head(student, name, target), _by_head(teacher, counterpart(name), source))


def _counterparts(student: CoCa, teacher: CoCa, layer_map: str | Mapping[str, Sequence[int]]) -> "_Counterparts":
    return _Counterparts({pair.name: pair.teacher_layer_of() for pair in module_pairs(student, teacher, layer_map)})


class _Counterparts:
    """From the name of a part of the student to that of the teacher."""

    def __init__(self, layers: dict[str, tuple[int, ...]]) -> None:
        self.layers = layers

    def __call__(self, name: str) -> str:
        module, _, rest = name.partition(".")
        kind, _, rest = rest.partition(".")
        if _LAYERS.get(module) != kind:
            return name
        index, _, rest = rest.partition(".")
        return ".".join(filter(None, (module, kind, str(self.layers[module][int(index)]), rest)))


def _copy_leading(target: Tensor, source: Tensor) -> None:
    common = tuple(slice(min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
    target[common] = source[common]


def _by_head(model: CoCa, name: str, tensor: Tensor) -> Tensor:
    """A view of a projection that shows its parts (q, k, v), heads and pictures as dimensions; others as they are."""
    parent, _, kind = name.rpartition(".")
    grandparent, _, role = parent.rpartition(".")
    owner = model.get_submodule(grandparent)
    if isinstance(owner, SelfAttention | CrossAttention):
        if role == "out":
            return tensor.view(len(tensor), owner.heads, -1) if kind == "weight" else tensor
        return tensor.view(len(role), owner.heads, -1, *tensor.shape[1:])  # "qkv", "q" and "kv" name their parts
    head = model.get_submodule(grandparent.rpartition(".")[0]) if role == "0" else None
    if isinstance(head, ClassificationHead) and kind == "weight":
        return tensor.view(len(tensor), head.pictures, -1)
    return tensor


class _Space(NamedTuple):
    """How vectors t [D_t] of the teacher and s [D_s] of the student stand for each other: s = t forth, t = s back.

    same: they are equal, so that what reads and writes them can be copied.
    """

    forth: Tensor
    back: Tensor
    same: bool = False


def _identity(width: int, like: Tensor) -> _Space:
    eye = torch.eye(width, dtype=torch.float64, device=like.device)
    return _Space(eye, eye, same=True)


def _mean_free(width: int) -> Tensor:
    """Orthonormal [width - 1, width]: the cosine basis without its constant; each row is spread over all features."""
    row, column = torch.arange(1, width, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return math.sqrt(2 / width) * torch.cos(math.pi * row * (column + 0.5) / width)


def principal_space(moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The strongest mean-free directions of vectors of this second moment [D, D], as features of a student.

    -> forth [D, width] and back [width, D], each other's transposes; vectors go through as their projections.
    """
    size = moment.shape[0]
    centre = torch.eye(size, dtype=moment.dtype, device=moment.device) - 1 / size
    # The mean gets an eigenvalue below all others, so that it is told from directions without any strength.
    directions = torch.linalg.eigh(centre @ moment @ centre - 1 / size).eigenvectors.flip(1)[:, : width - 1]
    forth = directions @ _mean_free(width).to(moment.device)
    return forth, forth.T


class _Statistics:
    """What the teacher does with a batch.

    norms: name of a layer norm -> second moment [D + 1, D + 1] of its inputs, normalised, with a 1 behind.
    units: name of an MLP -> mean and mean square [hidden] of its activations.
    """

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}
        self.units: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watching(self, model: CoCa, valid: Tensor) -> Iterator[None]:
        """Counts while the block runs; rows of text as long as `valid` [rows, L] (CLS aside) count where it is True."""

        def rows(x: Tensor) -> Tensor:
            for counted in (valid, nn.functional.pad(valid, (0, 1), value=True)):
                if x.shape[:-1] == counted.shape:
                    return x[counted].double()
            return x.flatten(0, -2).double()

        def watch_norm(name: str, norm: nn.LayerNorm) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = nn.functional.layer_norm(rows(inputs[0]), norm.normalized_shape, eps=norm.eps)
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
                self.norms[name] = x.T @ x / len(x)

            handles.append(norm.register_forward_pre_hook(hook))

        def watch_units(name: str, mlp: Mlp) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = rows(inputs[0])
                self.units[name] = (x.mean(dim=0), x.square().mean(dim=0))

            handles.append(mlp[2].register_forward_pre_hook(hook))

        handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                watch_norm(name, module)
            elif isinstance(module, Mlp):
                watch_units(name, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def project_teacher(
    student: CoCa,
    teacher: CoCa,
    images: Tensor,
    tokens: Tensor,
    layer_map: str | Mapping[str, Sequence[int]] = "uniform",
    *,
    rotate: bool = False,
) -> None:
    """Overwrites the student's weights by a projection of its teacher's, see above.

    images: [B, pictures, 3, S, S] and tokens: int64 [B, L], a batch as the teacher takes it; some thousand tokens
    describe a stream well. A head that the teacher lacks stays as it is; one for other numbers of pictures is cut.
    rotate: project streams of equal widths, too: other weights for the same function.
    Raises ValueError if the student is wider or deeper anywhere, or if pictures become other tokens.
    """
    _refuse_wider(student, teacher)
    truncate_teacher(student, teacher, layer_map)
    statistics = _Statistics()
    pictures = images.shape[1]
    valid = tokens.repeat_interleave(pictures, dim=0) != teacher.config.text_decoder.pad_id
    with statistics.watching(teacher, valid):
        output = teacher(images, tokens, with_class=True)
        for task, spec in teacher.head_specs.items():
            if task in student.head_specs and spec.pictures == pictures:
                teacher.class_logits(task, output)
    _Projection(student, teacher, _counterparts(student, teacher, layer_map), statistics, rotate).run(
        output.image_feature.double(), output.text_feature.double()
    )


def _refuse_other_pictures(student: CoCa, teacher: CoCa) -> None:
    ours, theirs = student.config.image_encoder, teacher.config.image_encoder
    for name in ("mean", "std", "norm_input", "norm_tokens"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"image_encoder.{name}: the student's {getattr(ours, name)} differs from the teacher's "
                f"{getattr(theirs, name)}; its weights would see other pictures"
            )


def _refuse_wider(student: CoCa, teacher: CoCa) -> None:
    for name in _LAYERS:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        for what, mine, its in (
            ("width", ours.width, theirs.width),
            ("width a head", ours.width // ours.heads, theirs.width // theirs.heads),
            ("width of an MLP", int(ours.width * ours.mlp_ratio), int(theirs.width * theirs.mlp_ratio)),
            ("number of heads", ours.heads, theirs.heads),
        ):
            if mine > its:
                raise ValueError(
                    f"{name}: the student's {what} {mine} is above the teacher's {its}; a projection can only narrow"
                )
    if student.config.embed_dim > teacher.config.embed_dim:
        raise ValueError(
            f"embed_dim: the student's {student.config.embed_dim} is above the teacher's {teacher.config.embed_dim}; "
            "a projection can only narrow"
        )


class _Projection:
    """Writes the student's modules one after the other, from the pictures to the heads."""

    def __init__(
        self,
        student: CoCa,
        teacher: CoCa,
        counterpart: _Counterparts,
        statistics: _Statistics,
        rotate: bool,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.counterpart = counterpart
        self.statistics = statistics
        self.rotate = rotate
        self.norm_names = {norm: name for name, norm in teacher.named_modules() if isinstance(norm, nn.LayerNorm)}
        self.mlp_names = {mlp: name for name, mlp in teacher.named_modules() if isinstance(mlp, Mlp)}

    def run(self, image_feature: Tensor, text_feature: Tensor) -> None:
        shared = self._features(image_feature, text_feature)
        tokens = self._image_encoder(shared)
        states = self._text_side(shared, tokens)
        for task in self.student.head_specs:
            if task in self.teacher.head_specs:
                self._head(task, states)

    def _features(self, image: Tensor, text: Tensor) -> _Space:
        """The contrastive space: cosines are to survive, and no norm follows."""
        width, its = self.student.config.embed_dim, self.teacher.config.embed_dim
        if width == its:
            return _identity(width, image)
        both = torch.cat([nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)])
        directions = torch.linalg.eigh(both.T @ both).eigenvectors.flip(1)[:, :width]
        return _Space(directions, directions.T)

    def _space(self, norms: Sequence[nn.LayerNorm], width: int) -> _Space:
        """A stream that these norms of the teacher read, and no other."""
        moment = torch.stack([self._moment(norm)[:-1, :-1] for norm in norms]).mean(dim=0)
        if len(moment) == width and not self.rotate:
            return _identity(width, moment)
        return _Space(*principal_space(moment, width))

    def _moment(self, norm: nn.LayerNorm) -> Tensor:
        return self.statistics.norms[self.norm_names[norm]]

    def _stream(self, layers: nn.Module, width: int) -> _Space:
        """The residual stream of these layers."""
        blocks = [found for found in layers.modules() if isinstance(found, SelfAttentionBlock | CrossAttentionBlock)]
        return self._space([norm for block in blocks for norm in (block.norm_attention, block.norm_mlp)], width)

    def _image_encoder(self, shared: _Space) -> _Space:
        """-> the space of the image tokens."""
        ours, theirs = self.student.image_encoder, self.teacher.image_encoder
        stream = self._stream(theirs.blocks, ours.config.width)
        if not stream.same:
            gain = torch.ones(theirs.config.width, dtype=torch.float64, device=stream.forth.device)
            if isinstance(ours.norm_input, nn.LayerNorm) and isinstance(theirs.norm_input, nn.LayerNorm):
                # The gain moves in front of the norm, which then sees other lengths: right on average.
                gain = theirs.norm_input.weight.double()
                into = _centred(torch.diag(gain)).T @ stream.forth
                ours.norm_input.weight.fill_(float(self._left(theirs.norm_input, into)))
                ours.norm_input.bias.copy_(theirs.norm_input.bias.double() @ stream.forth)
            else:
                into = stream.forth
            ours.patch.weight.copy_(torch.einsum("tcij,ts->scij", theirs.patch.weight.double(), into))
            ours.class_token.copy_(theirs.class_token.double() @ into)
            ours.position.copy_(theirs.position.double() @ into)
        for i, block in enumerate(ours.blocks):
            self._self_block(block, self.counterpart(f"image_encoder.blocks.{i}"), stream)
        if ours.pooler is not None and theirs.pooler is not None:
            pooled = self._pooler(ours.pooler, theirs.pooler, stream, theirs.norm_output, ours.norm_output)
            self._project_feature(ours.projection, theirs.projection, pooled, shared)
            return pooled
        normed = self._final_norm(ours.norm_output, theirs.norm_output, stream)
        self._project_feature(ours.projection, theirs.projection, normed, shared)
        return normed if theirs.config.norm_tokens else stream

    def _text_side(self, shared: _Space, tokens: _Space) -> _Space:
        """-> the space of the normalised states. Both decoders share a stream: one starts from the other's states."""
        ours, theirs = self.student, self.teacher
        both = nn.ModuleList([theirs.text_decoder.blocks, theirs.multimodal_decoder.layers])
        stream = self._stream(both, ours.config.text_decoder.width)
        if not stream.same:
            text, its = ours.text_decoder, theirs.text_decoder
            rows = min(len(text.token_embedding.weight), len(its.token_embedding.weight))
            text.token_embedding.weight[:rows] = (its.token_embedding.weight.double() @ stream.forth)[:rows]
            text.class_token.copy_(its.class_token.double() @ stream.forth)
            position = its.position.double() @ stream.forth
            length = min(len(position), len(text.position)) - 1
            text.position[:length] = position[:length]
            text.position[-1] = position[-1]
        for i, block in enumerate(ours.text_decoder.blocks):
            self._self_block(block, self.counterpart(f"text_decoder.blocks.{i}"), stream)
        summary = self._final_norm(ours.text_decoder.norm_output, theirs.text_decoder.norm_output, stream)
        self._project_feature(ours.text_decoder.projection, theirs.text_decoder.projection, summary, shared)
        for i, layer in enumerate(ours.multimodal_decoder.layers):
            name = self.counterpart(f"multimodal_decoder.layers.{i}")
            assert isinstance(layer, MultimodalLayer)
            self._self_block(layer.self_block, f"{name}.self_block", stream)
            self._cross_block(layer.cross_block, f"{name}.cross_block", stream, tokens)
        states = self._final_norm(ours.multimodal_decoder.norm_output, theirs.multimodal_decoder.norm_output, stream)
        if not states.same:
            head = theirs.multimodal_decoder.head.weight.double() @ states.back.T
            rows = min(len(head), len(ours.multimodal_decoder.head.weight))
            ours.multimodal_decoder.head.weight[:rows] = head[:rows]
        return states

    def _project_feature(self, ours: nn.Parameter, theirs: nn.Parameter, space: _Space, shared: _Space) -> None:
        if not (space.same and shared.same):
            ours.copy_(space.back @ theirs.double() @ shared.forth)

    def _final_norm(self, ours: nn.LayerNorm, theirs: nn.LayerNorm, stream: _Space) -> _Space:
        """Writes a norm whose output is read by more than one matrix -> the space of its output."""
        if stream.same:
            return stream
        gain = theirs.weight.double()
        gain = torch.where(gain.abs() < 1e-4, torch.full_like(gain, 1e-4), gain)
        back = self._normed(theirs, stream)
        width, its = back.shape
        # The output of a norm has no mean, but its offset may: one more direction for that.
        back = back + back.norm() / math.sqrt(width) / math.sqrt(width * its)
        forth = torch.linalg.pinv(back)
        ours.weight.fill_(1.0)
        ours.bias.copy_((theirs.bias.double() / gain) @ forth)
        return _Space(forth / gain[:, None], back * gain)

    def _normed(self, norm: nn.LayerNorm, space: _Space) -> Tensor:
        """[D_s, D_t]: from what the student's norm makes of s to what the teacher's makes of t, gains aside.

        Both norms give vectors of the same mean square; where s lacks a part of t, what is left is so much shorter.
        """
        return self._left(norm, _centred(space.forth)) * _centred(space.back)

    def _left(self, norm: nn.LayerNorm, forth: Tensor) -> Tensor:
        """Root mean square of what this matrix [D_t, D_s] makes of a norm's normalised inputs, over theirs."""
        moment = self._moment(norm)[:-1, :-1]
        width, narrow = forth.shape
        return (torch.trace(forth.T @ moment @ forth) / narrow / (torch.trace(moment) / width)).sqrt()

    def _reader(self, linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """A norm's gain and offset and the matrix behind it as one: weight [out, D_t] and bias [out]."""
        weight = linear.weight.double()
        return weight * norm.weight.double(), linear.bias.double() + weight @ norm.bias.double()

    def _self_block(self, ours: nn.Module, name: str, stream: _Space) -> None:
        theirs = self.teacher.get_submodule(name)
        assert isinstance(ours, SelfAttentionBlock)
        assert isinstance(theirs, SelfAttentionBlock)
        if not stream.same or ours.attention.heads != theirs.attention.heads:
            weight, bias = self._reader(theirs.attention.qkv, theirs.norm_attention)
            moment = self._moment(theirs.norm_attention)
            q, k, v = zip(weight.chunk(3), bias.chunk(3), strict=True)
            back = self._normed(theirs.norm_attention, stream)
            q, k, v, out = _narrow_heads(
                (q, k, v),
                theirs.attention.out,
                (moment, moment),
                ours.attention.heads,
                theirs.attention.heads,
                ours.attention.qkv.in_features,
            )
            ours.attention.qkv.weight.copy_(torch.cat([part[0] @ back.T for part in (q, k, v)]))
            ours.attention.qkv.bias.copy_(torch.cat([part[1] for part in (q, k, v)]))
            self._write(ours.attention.out, out, theirs.attention.out.bias, stream)
            _plain(ours.norm_attention)
        self._mlp(ours.mlp, theirs.mlp, ours.norm_mlp, theirs.norm_mlp, stream)

    def _cross_block(self, ours: nn.Module, name: str, stream: _Space, tokens: _Space) -> None:
        theirs = self.teacher.get_submodule(name)
        assert isinstance(ours, CrossAttentionBlock)
        assert isinstance(theirs, CrossAttentionBlock)
        self._cross_attention(
            ours.attention,
            theirs.attention,
            (ours.norm_attention, theirs.norm_attention, stream),
            (ours.norm_context, theirs.norm_context, tokens),
            stream,
        )
        self._mlp(ours.mlp, theirs.mlp, ours.norm_mlp, theirs.norm_mlp, stream)

    def _cross_attention(
        self,
        ours: CrossAttention,
        theirs: CrossAttention,
        asking: tuple[nn.LayerNorm, nn.LayerNorm, _Space],
        asked: tuple[nn.LayerNorm, nn.LayerNorm, _Space],
        into: _Space,
    ) -> None:
        """asking, asked: the norms before queries, and before keys and values, ours and theirs, and their spaces."""
        if asking[2].same and asked[2].same and into.same and ours.heads == theirs.heads:
            return
        query = self._reader(theirs.q, asking[1])
        weight, bias = self._reader(theirs.kv, asked[1])
        key, value = zip(weight.chunk(2), bias.chunk(2), strict=True)
        moments = (self._moment(asking[1]), self._moment(asked[1]))
        q, k, v, out = _narrow_heads(
            (query, key, value), theirs.out, moments, ours.heads, theirs.heads, ours.q.out_features
        )
        ours.q.weight.copy_(q[0] @ self._normed(asking[1], asking[2]).T)
        ours.q.bias.copy_(q[1])
        back = self._normed(asked[1], asked[2])
        ours.kv.weight.copy_(torch.cat([k[0] @ back.T, v[0] @ back.T]))
        ours.kv.bias.copy_(torch.cat([k[1], v[1]]))
        self._write(ours.out, out, theirs.out.bias, into)
        _plain(asking[0])
        _plain(asked[0])

    def _pooler(
        self,
        ours: AttentionalPooler,
        theirs: AttentionalPooler,
        context: _Space,
        its_norm: nn.LayerNorm,
        our_norm: nn.LayerNorm,
    ) -> _Space:
        """Writes a pooler and the norm behind it -> the space of that norm's output."""
        pooled, queries = (self._space([norm], ours.query.shape[1]) for norm in (its_norm, theirs.norm_query))
        ours.query.copy_(theirs.query.double() @ queries.forth)
        self._cross_attention(
            ours.attention,
            theirs.attention,
            (ours.norm_query, theirs.norm_query, queries),
            (ours.norm_context, theirs.norm_context, context),
            pooled,
        )
        return self._final_norm(our_norm, its_norm, pooled)

    def _mlp(self, ours: Mlp, theirs: Mlp, our_norm: nn.LayerNorm, its_norm: nn.LayerNorm, stream: _Space) -> None:
        (first, last), (its_first, its_last) = _linears(ours), _linears(theirs)
        if stream.same and first.out_features == its_first.out_features:
            return
        weight, bias = self._reader(its_first, its_norm)
        mean, square = self.statistics.units[self.mlp_names[theirs]]
        out = its_last.weight.double()
        kept = _strongest(square.sqrt() * out.norm(dim=0), first.out_features)
        gone = torch.ones_like(mean).index_fill(0, kept, 0.0)
        first.weight.copy_((weight @ self._normed(its_norm, stream).T)[kept])
        first.bias.copy_(bias[kept])
        self._write(last, out[:, kept], its_last.bias.double() + out @ (mean * gone), stream)
        _plain(our_norm)

    def _write(self, ours: nn.Linear, weight: Tensor, bias: Tensor, stream: _Space) -> None:
        ours.weight.copy_(stream.forth.T @ weight)
        ours.bias.copy_(bias.double() @ stream.forth)

    def _head(self, task: str, states: _Space) -> None:
        ours, theirs = self.student.heads[task], self.teacher.heads[task]
        assert isinstance(ours, ClassificationHead)
        assert isinstance(theirs, ClassificationHead)
        if f"heads.{task}.norm" not in self.statistics.norms or states.same:
            return
        pooled = self._pooler(ours.pooler, theirs.pooler, states, theirs.norm, ours.norm)
        layers, its_layers = _linears(ours.classifier), _linears(theirs.classifier)
        bias = its_layers[0].bias.double()
        weight = its_layers[0].weight.double().view(len(bias), theirs.pictures, -1) @ pooled.back.T
        if len(layers) == 2:
            strength = its_layers[0].weight.norm(dim=1) * its_layers[1].weight.norm(dim=0)
            kept = _strongest(strength, layers[0].out_features)
            weight, bias = weight[kept], bias[kept]
            layers[1].weight.copy_(its_layers[1].weight[:, kept])
        layers[0].weight.copy_(weight.flatten(1))
        layers[0].bias.copy_(bias)


def _centred(rows: Tensor) -> Tensor:
    """Each row less its mean."""
    return rows - rows.mean(dim=1, keepdim=True)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [found for found in module.modules() if isinstance(found, nn.Linear)]


def _plain(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1.0)
    norm.bias.zero_()


def _strongest(strength: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest, in their order."""
    return strength.topk(count).indices.sort().values


_Affine = tuple[Tensor, Tensor]


def _narrow_heads(
    parts: tuple[_Affine, _Affine, _Affine],
    out: nn.Linear,
    moments: tuple[Tensor, Tensor],
    heads: int,
    its_heads: int,
    width: int,
) -> tuple[_Affine, _Affine, _Affine, Tensor]:
    """Queries, keys, values (weight [D_t, in], bias [D_t]) and outputs [D, D_t] -> the same of `heads` heads.

    moments: second moments [in + 1, in + 1] of what queries, and keys and values, are made of, with a 1 behind.
    width: of all heads together, the student's.
    """
    each, narrow = out.in_features // its_heads, width // heads
    # [heads, d, in + 1]: the bias is the weight of the 1.
    q, k, v = (torch.cat([weight, bias[:, None]], dim=1).view(its_heads, each, -1) for weight, bias in parts)
    o = out.weight.double().T.reshape(its_heads, each, -1)  # [heads, d, D]
    gram_q, gram_k, gram_v = (x @ moment @ x.mT for x, moment in ((q, moments[0]), (k, moments[1]), (v, moments[1])))
    gram_o = o @ o.mT
    kept = _strongest((gram_v * gram_o.mT).sum(dim=(1, 2)), heads)
    if narrow < each:
        # Scores are divided by the root of a head's width.
        for_q, for_k = _best_rank(gram_q, gram_k, narrow)
        for_v, for_o = _best_rank(gram_v, gram_o, narrow)
        q, k = for_q.mT @ q * math.sqrt(narrow / each), for_k.mT @ k
        v, o = for_v.mT @ v, for_o.mT @ o
    q, k, v = (x[kept].flatten(0, 1) for x in (q, k, v))
    return (q[:, :-1], q[:, -1]), (k[:, :-1], k[:, -1]), (v[:, :-1], v[:, -1]), o[kept].flatten(0, 1).T


def _best_rank(gram_a: Tensor, gram_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of two factors A, B by their Gram matrices [..., d, d]: mixtures [..., d, rank] of the columns of each.

    The product of the mixed factors is the best approximation of A B^T of that rank.
    """
    roots, inverses = zip(*(_root(gram) for gram in (gram_a, gram_b)), strict=True)
    u, s, vh = torch.linalg.svd(roots[0] @ roots[1])
    root = s[..., None, :rank].sqrt()
    return inverses[0] @ u[..., :rank] * root, inverses[1] @ vh.mT[..., :rank] * root


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite matrix, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    root = values.sqrt()
    inverse = torch.where(values > 1e-12 * values[..., -1:], 1 / root, torch.zeros_like(root))
    return vectors * root[..., None, :] @ vectors.mT, vectors * inverse[..., None, :] @ vectors.mT
