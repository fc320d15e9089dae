"""A student on the principal components of its teacher; `optima.coca.start` says how.

All of it is computed on the teacher's device, in float64; only what is finished goes to the student.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optima.coca.heads import ClassificationHead
from optima.coca.layers import (
    AttentionalPooler,
    CrossAttention,
    CrossAttentionBlock,
    Mlp,
    SelfAttentionBlock,
)
from optima.coca.model import CoCa
from optima.coca.multimodal_decoder import MultimodalLayer
from optima.coca.start.heads import narrow_heads, strongest
from optima.coca.start.spaces import Space, identity, principal_space
from optima.coca.start.statistics import Statistics
from optima.coca.start.truncate import LAYERS, Counterparts, counterparts, truncate_teacher

PIECE_BYTES = 2**28
"""Most that the activations of an MLP, in float64, may take while the teacher is watched: a batch comes in pieces."""


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
    """Overwrites the student's weights by a projection of its teacher's, see `optima.coca.start`.

    images: [B, images, 3, S, S] and tokens: int64 [B, L], a batch as the teacher takes it, on any device; some
    thousand tokens describe a stream well. A head that the teacher lacks stays as it is; one for other numbers of
    images is cut.
    rotate: project streams of equal widths, too: other weights for the same function.
    Raises ValueError if the student is wider or deeper anywhere, or if images become other tokens.
    """
    _refuse_wider(student, teacher)
    truncate_teacher(student, teacher, layer_map)
    statistics = Statistics()
    image_feature, text_feature = _watch(teacher, student, images, tokens, statistics)
    _Projection(student, teacher, counterparts(student, teacher, layer_map), statistics, rotate).run(
        image_feature.double(), text_feature.double()
    )


def _watch(
    teacher: CoCa, student: CoCa, images: Tensor, tokens: Tensor, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Runs the teacher on the batch, piece by piece, and counts; -> its contrastive features of images and texts."""
    device = teacher.logit_scale.device
    features: list[tuple[Tensor, Tensor]] = []
    size = _items_a_piece(teacher, images.shape[1], tokens.shape[1])
    for first in range(0, len(images), size):
        some_images, some_tokens = (part[first : first + size].to(device) for part in (images, tokens))
        image_count = some_images.shape[1]
        valid = some_tokens.repeat_interleave(image_count, dim=0) != teacher.config.text_decoder.pad_id
        with statistics.watching(teacher, valid):
            output = teacher(some_images, some_tokens, with_class=True)
            for task, spec in teacher.head_specs.items():
                if task in student.head_specs and spec.images == image_count:
                    teacher.class_logits(task, output)
        features.append((output.image_feature, output.text_feature))
    images_of, texts_of = zip(*features, strict=True)
    return torch.cat(images_of), torch.cat(texts_of)


def _items_a_piece(teacher: CoCa, images: int, text_length: int) -> int:
    """Items whose widest activations, in float64, fit PIECE_BYTES."""
    image, text, both = teacher.config.image_encoder, teacher.config.text_decoder, teacher.config.multimodal_decoder
    patches = (image.image_size // image.patch_size) ** 2 + 1
    widest = max(
        patches * image.width * image.mlp_ratio,
        (text_length + 1) * max(text.width * text.mlp_ratio, both.width * both.mlp_ratio),
    )
    return max(1, int(PIECE_BYTES / (8 * images * widest)))


def _refuse_wider(student: CoCa, teacher: CoCa) -> None:
    for name in LAYERS:
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
    """Writes the student's modules one after the other, from the images to the heads."""

    def __init__(
        self,
        student: CoCa,
        teacher: CoCa,
        counterpart: Counterparts,
        statistics: Statistics,
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

    def _features(self, image: Tensor, text: Tensor) -> Space:
        """The contrastive space: cosines are to survive, and no norm follows."""
        width, its = self.student.config.embed_dim, self.teacher.config.embed_dim
        if width == its:
            return identity(width, image)
        both = torch.cat([nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)])
        directions = torch.linalg.eigh(both.T @ both).eigenvectors.flip(1)[:, :width]
        return Space(directions, directions.T)

    def _space(self, norms: Sequence[nn.LayerNorm], width: int) -> Space:
        """A stream that these norms of the teacher read, and no other."""
        moment = torch.stack([self._moment(norm)[:-1, :-1] for norm in norms]).mean(dim=0)
        if len(moment) == width and not self.rotate:
            return identity(width, moment)
        return principal_space(moment, width)

    def _moment(self, norm: nn.LayerNorm) -> Tensor:
        return self.statistics.norms[self.norm_names[norm]]

    def _stream(self, layers: nn.Module, width: int) -> Space:
        """The residual stream of these layers."""
        blocks = [found for found in layers.modules() if isinstance(found, SelfAttentionBlock | CrossAttentionBlock)]
        return self._space([norm for block in blocks for norm in (block.norm_attention, block.norm_mlp)], width)

    def _image_encoder(self, shared: Space) -> Space:
        """-> the space of the image tokens."""
        ours, theirs = self.student.image_encoder, self.teacher.image_encoder
        stream = self._stream(theirs.blocks, ours.config.width)
        if not stream.same:
            gain = torch.ones(theirs.config.width, dtype=torch.float64, device=stream.forth.device)
            if isinstance(ours.norm_input, nn.LayerNorm) and isinstance(theirs.norm_input, nn.LayerNorm):
                # The gain moves in front of the norm, which then sees other lengths: right on average.
                gain = theirs.norm_input.weight.double()
                into = _centred(torch.diag(gain)).T @ stream.forth
                ours.norm_input.weight.copy_(self._left(theirs.norm_input, into).expand_as(ours.norm_input.weight))
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

    def _text_side(self, shared: Space, tokens: Space) -> Space:
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

    def _project_feature(self, ours: nn.Parameter, theirs: nn.Parameter, space: Space, shared: Space) -> None:
        if not (space.same and shared.same):
            ours.copy_(space.back @ theirs.double() @ shared.forth)

    def _final_norm(self, ours: nn.LayerNorm, theirs: nn.LayerNorm, stream: Space) -> Space:
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
        return Space(forth / gain[:, None], back * gain)

    def _normed(self, norm: nn.LayerNorm, space: Space) -> Tensor:
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

    def _self_block(self, ours: nn.Module, name: str, stream: Space) -> None:
        theirs = self.teacher.get_submodule(name)
        assert isinstance(ours, SelfAttentionBlock)
        assert isinstance(theirs, SelfAttentionBlock)
        if not stream.same or ours.attention.heads != theirs.attention.heads:
            weight, bias = self._reader(theirs.attention.qkv, theirs.norm_attention)
            moment = self._moment(theirs.norm_attention)
            q, k, v = zip(weight.chunk(3), bias.chunk(3), strict=True)
            back = self._normed(theirs.norm_attention, stream)
            q, k, v, out = narrow_heads(
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

    def _cross_block(self, ours: nn.Module, name: str, stream: Space, tokens: Space) -> None:
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
        asking: tuple[nn.LayerNorm, nn.LayerNorm, Space],
        asked: tuple[nn.LayerNorm, nn.LayerNorm, Space],
        into: Space,
    ) -> None:
        """asking, asked: the norms before queries, and before keys and values, ours and theirs, and their spaces."""
        if asking[2].same and asked[2].same and into.same and ours.heads == theirs.heads:
            return
        query = self._reader(theirs.q, asking[1])
        weight, bias = self._reader(theirs.kv, asked[1])
        key, value = zip(weight.chunk(2), bias.chunk(2), strict=True)
        moments = (self._moment(asking[1]), self._moment(asked[1]))
        q, k, v, out = narrow_heads(
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
        context: Space,
        its_norm: nn.LayerNorm,
        our_norm: nn.LayerNorm,
    ) -> Space:
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

    def _mlp(self, ours: Mlp, theirs: Mlp, our_norm: nn.LayerNorm, its_norm: nn.LayerNorm, stream: Space) -> None:
        (first, last), (its_first, its_last) = _linears(ours), _linears(theirs)
        if stream.same and first.out_features == its_first.out_features:
            return
        weight, bias = self._reader(its_first, its_norm)
        mean, square = self.statistics.units[self.mlp_names[theirs]]
        out = its_last.weight.double()
        kept = strongest(square.sqrt() * out.norm(dim=0), first.out_features)
        gone = torch.ones_like(mean).index_fill(0, kept, 0.0)
        first.weight.copy_((weight @ self._normed(its_norm, stream).T)[kept])
        first.bias.copy_(bias[kept])
        self._write(last, out[:, kept], its_last.bias.double() + out @ (mean * gone), stream)
        _plain(our_norm)

    def _write(self, ours: nn.Linear, weight: Tensor, bias: Tensor, stream: Space) -> None:
        ours.weight.copy_(stream.forth.T @ weight)
        ours.bias.copy_(bias.double() @ stream.forth)

    def _head(self, task: str, states: Space) -> None:
        ours, theirs = self.student.heads[task], self.teacher.heads[task]
        assert isinstance(ours, ClassificationHead)
        assert isinstance(theirs, ClassificationHead)
        if f"heads.{task}.norm" not in self.statistics.norms or states.same:
            return
        pooled = self._pooler(ours.pooler, theirs.pooler, states, theirs.norm, ours.norm)
        layers, its_layers = _linears(ours.classifier), _linears(theirs.classifier)
        bias = its_layers[0].bias.double()
        weight = its_layers[0].weight.double().view(len(bias), theirs.images, -1) @ pooled.back.T
        if len(layers) == 2:
            strength = its_layers[0].weight.norm(dim=1) * its_layers[1].weight.norm(dim=0)
            kept = strongest(strength, layers[0].out_features)
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
