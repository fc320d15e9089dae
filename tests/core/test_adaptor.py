"""Models that know nothing of taps: what hooks recover is what the model did, by its own account."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima_core import (
    Adaptor,
    AttentionTap,
    BanditConfig,
    Distiller,
    DistillerConfig,
    Forward,
    LayerPaths,
    LinearQK,
    LinearQKV,
    LogitPrediction,
    ModulePair,
    OptimaError,
    OptimiserConfig,
    TorchAttention,
    WantedTaps,
)

B, N, WIDTH, HEADS = 3, 6, 16, 4


def map_of(tap: AttentionTap) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask), as the tap's definition says: [B, H, N, M]; 0 in rows that are not compared."""
    k = tap.k.repeat_interleave(tap.q.shape[1] // tap.k.shape[1], dim=1)
    scores = tap.q @ k.transpose(2, 3) * tap.q.shape[-1] ** -0.5
    allowed = torch.ones(scores.shape, dtype=torch.bool) if tap.mask is None else tap.mask.expand(scores.shape)
    if tap.causal:
        allowed = allowed.tril()
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


def padding(seed: int) -> Tensor:
    """bool [B, N], True where a token counts: the last sample is half padding."""
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[-1, N // 2 :] = False
    return valid


def make_encoder(width: int = WIDTH, depth: int = 3, batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.0, batch_first=batch_first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=batch_first and not norm_first)
    for parameter in encoder.parameters():  # the layers start as copies of one, with biases of 0
        nn.init.normal_(parameter, std=0.3)
    return encoder


TORCH_LAYERS = LayerPaths("layers.*", (TorchAttention("self_attn"),))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, False), (True, True), (False, False)])
def test_torchs_encoder(training: bool, batch_first: bool, norm_first: bool, seed: int) -> None:
    """In eval mode, too, where torch would run the layers as one fused call that no hook sees."""
    encoder = make_encoder(batch_first=batch_first, norm_first=norm_first).train(training)
    paths = LayerPaths("layers.*", (TorchAttention("self_attn"),), batch_first=batch_first)
    adaptor, valid = Adaptor(encoder, {"encoder": paths}), padding(seed)
    x = torch.randn(B, N, WIDTH)
    given = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        output, taps = adaptor.run({"encoder": (0, 1, 2)}, given, src_key_padding_mask=~valid, valid=valid)
        plain = encoder(given, src_key_padding_mask=~valid)
        if not batch_first:
            output, plain = output.transpose(0, 1), plain.transpose(0, 1)
        torch.testing.assert_close(output[valid], plain[valid])
        assert adaptor.depth("encoder") == len(taps["encoder"]) == 3
        state = x
        for layer, tap in zip(encoder.layers, taps["encoder"], strict=True):  # type: ignore[arg-type]
            read = layer.norm1(state) if norm_first else state
            read = read if batch_first else read.transpose(0, 1)
            _, weights = layer.self_attn(read, read, read, key_padding_mask=~valid, average_attn_weights=False)
            rows = valid[:, None, :, None]
            torch.testing.assert_close(map_of(tap.attention[0]), weights * rows)
            assert torch.equal(tap.valid, valid)
            state = tap.hidden
    if not norm_first:
        torch.testing.assert_close(taps["encoder"][-1].hidden[valid], output[valid])


def test_torchs_decoder_with_attention_over_another_modules_tokens(seed: int) -> None:
    model = nn.Transformer(WIDTH, HEADS, 1, 2, 32, 0.0, batch_first=True).eval()
    cross = TorchAttention("multihead_attn", context="encoder")
    modules = {
        "encoder": LayerPaths("encoder.layers.*", (TorchAttention("self_attn"),)),
        "decoder": LayerPaths("decoder.layers.*", (TorchAttention("self_attn"), cross), causal=True),
    }
    source, target, valid = torch.randn(B, N, WIDTH), torch.randn(B, 4, WIDTH), padding(seed)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad():
        _, taps = Adaptor(model, modules).run(
            {"decoder": (1,), "encoder": (0,)},
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=~valid,
            memory_key_padding_mask=~valid,
            valid={"encoder": valid},
        )
        layer, (own, over) = model.decoder.layers[1], taps["decoder"][0].attention
        state = model.decoder.layers[0](
            target, memory := model.encoder(source, src_key_padding_mask=~valid), causal, memory_key_padding_mask=~valid
        )
        attended, weights = layer.self_attn(state, state, state, attn_mask=causal, average_attn_weights=False)
        torch.testing.assert_close(map_of(own), weights)
        state = layer.norm1(state + attended)
        _, weights = layer.multihead_attn(state, memory, memory, key_padding_mask=~valid, average_attn_weights=False)
        torch.testing.assert_close(map_of(over), weights)
    assert taps["decoder"][0].valid is None


class FusedBlock(nn.Module):
    """As timm's vision transformers have it: one projection, and a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        return x + (weights @ v).transpose(1, 2).flatten(2), weights


def test_a_fused_projection(seed: int) -> None:
    model = nn.Sequential(FusedBlock())
    adaptor = Adaptor(model, {"vision": LayerPaths("*", (LinearQKV("qkv", HEADS),))})
    (hidden, weights), taps = adaptor.run({"vision": (0,)}, torch.randn(B, N, WIDTH))
    assert torch.equal(taps["vision"][0].hidden, hidden)
    torch.testing.assert_close(map_of(taps["vision"][0].attention[0]), weights)


class SharedKeys(nn.Module):
    """Grouped-query attention: two query heads share a key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, width) for width in (WIDTH, WIDTH // 2, WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        d = WIDTH // HEADS
        q, k, v = (part(x).view(B, N, -1, d).transpose(1, 2) for part in (self.q, self.k, self.v))
        self.attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        self.values = v
        return x + self.attended.transpose(1, 2).flatten(2)


def test_keys_that_heads_share(seed: int) -> None:
    block = SharedKeys()
    with pytest.raises(OptimaError, match="k gives 8 features, which 5 heads do not divide"):
        Adaptor(block, {"m": LayerPaths("", (LinearQK("q", "k", HEADS, key_heads=5),))})
    _, taps = Adaptor(block, {"m": LayerPaths("", (LinearQK("q", "k", HEADS, key_heads=2),))}).run(
        {"m": (0,)}, torch.randn(B, N, WIDTH)
    )
    attended = map_of(taps["m"][0].attention[0]) @ block.values.repeat_interleave(2, dim=1)
    torch.testing.assert_close(attended, block.attended)


class Rotary(nn.Module):
    """What it does to q and k before the scores is told to it."""

    def __init__(self, change: str, fused: bool) -> None:
        super().__init__()
        self.change, self.fused = change, fused
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (part(x).view(B, N, HEADS, -1).transpose(1, 2) for part in (self.q, self.k))
        scale, bias = q.shape[-1] ** -0.5, None
        if self.change == "rotation":
            angle = torch.arange(N)[:, None] / 3
            q, k = (torch.cat([h * angle.cos() - g * angle.sin(), h * angle.sin() + g * angle.cos()], -1)
                    for h, g in (part.chunk(2, -1) for part in (q, k)))  # fmt: skip
        elif self.change == "norm":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.change == "scale":
            scale = 1.0
        elif self.change == "bias":
            bias = torch.randn(HEADS, N, N)
        elif self.change == "shift":  # the same for all keys of a query: no change to the map
            bias = torch.randn(HEADS, N, 1).expand(-1, -1, N)
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, k, attn_mask=bias, scale=scale)
        else:
            scores = q @ k.transpose(2, 3) * scale
            attended = (scores if bias is None else scores + bias).softmax(-1) @ k
        return x + attended.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", ["none", "shift", "rotation", "norm", "scale", "bias"])
def test_projections_that_are_not_what_the_scores_are_made_of_are_refused(change: str, fused: bool, seed: int) -> None:
    adaptor = Adaptor(Rotary(change, fused), {"m": LayerPaths("", (LinearQK("q", "k", HEADS),))})
    x = torch.randn(B, N, WIDTH)
    if change in ("none", "shift"):
        adaptor.run({"m": (0,)}, x)
        return
    with pytest.raises(OptimaError, match=r"q, k: the attention's scores are not .* off .*TransformersAdaptor"):
        adaptor.run({"m": (0,)}, x)


def test_causal_attention_that_is_not_told_is_refused(seed: int) -> None:
    class Causal(Rotary):
        def forward(self, x: Tensor) -> Tensor:
            q, k = (part(x).view(B, N, HEADS, -1).transpose(1, 2) for part in (self.q, self.k))
            return F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).flatten(2)

    model, source = Causal("none", True), (LinearQK("q", "k", HEADS),)
    Adaptor(model, {"m": LayerPaths("", source, causal=True)}).run({"m": (0,)}, torch.randn(B, N, WIDTH))
    with pytest.raises(OptimaError, match="causal=False"):
        Adaptor(model, {"m": LayerPaths("", source)}).run({"m": (0,)}, torch.randn(B, N, WIDTH))


def test_nothing_is_left_behind_and_untapped_layers_are_not_hooked(seed: int) -> None:
    encoder, x = make_encoder().eval(), torch.randn(B, N, WIDTH)
    hooks: list[int] = []

    def count(module: nn.Module, arguments: object) -> None:
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules()) - 1)

    adaptor = Adaptor(encoder, {"encoder": TORCH_LAYERS})
    handle = encoder.register_forward_pre_hook(count)
    adaptor.run({"encoder": (1,)}, x)
    adaptor.run({}, x)
    assert hooks == [2, 0]  # the layer's output, and what its attention is given
    handle.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in encoder.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(AssertionError, match="embedding dimension"):
        adaptor.run({"encoder": (0, 1, 2)}, torch.randn(B, N, WIDTH + 1))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in encoder.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Classifier(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(8, width), make_encoder(width, depth), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(x)).mean(dim=1))
        return logits


ENCODER = {"encoder": LayerPaths("encoder.layers.*", (TorchAttention("self_attn"),))}


def adapted(adaptor: Adaptor):
    def forward(batch: tuple[Tensor, Tensor], wanted: WantedTaps) -> Forward:
        logits, taps = adaptor.run(wanted, batch[0])
        return Forward(F.cross_entropy(logits, batch[1]), LogitPrediction(logits), taps)

    return forward


def load(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, N, 8, generator=torch.Generator().manual_seed(step))
    return x, x.mean(dim=1)[:, :3].argmax(dim=-1)


def make_distiller(config: DistillerConfig, recompute: bool = False, seed: int = 0) -> Distiller:
    torch.manual_seed(seed)
    teacher, student = Classifier(16, 4).eval(), Classifier(8, 2)
    student_adaptor = Adaptor(student, ENCODER)
    if recompute:
        student_adaptor.recompute_activations()
    pair = ModulePair("encoder", 2, 4, 8, 16)
    forward = adapted(student_adaptor)
    return Distiller(student, forward, adapted(Adaptor(teacher, ENCODER)), [pair], load, load(10**6), config)


def test_models_behind_adaptors_are_distilled(seed: int) -> None:
    config = DistillerConfig(rounds=8, steps_per_round=5, optimiser=OptimiserConfig(learning_rate=1e-2))
    distiller = make_distiller(config, seed=seed)
    start = distiller.initial_probe.named()
    end = [distiller.run_round() for _ in range(8)][-1].probe
    assert set(end) == {"task", "logits"} | {f"{kind}/encoder/{i}" for kind in ("hidden", "attention") for i in (0, 1)}
    assert end["hidden/encoder/1"] < start["hidden/encoder/1"]
    assert end["attention/encoder/0"] < start["attention/encoder/0"]


def test_recomputed_activations_change_no_loss_and_no_weight(seed: int) -> None:
    config = DistillerConfig(rounds=2, steps_per_round=3, ema=0.5)
    plain, frugal = make_distiller(config, seed=seed), make_distiller(config, recompute=True, seed=seed)
    assert [plain.run_round() for _ in range(2)] == [frugal.run_round() for _ in range(2)]
    for ours, theirs in ((plain.student, frugal.student), (plain.result, frugal.result)):
        assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())


def test_compiling_a_model_behind_an_adaptor_is_refused_in_a_line() -> None:
    config = DistillerConfig(compile=True, bandit=BanditConfig("all_modules"))
    with pytest.raises(OptimaError, match=r"compile: .*hooks cannot be compiled.*take compile: false") as error:
        make_distiller(config).run_round()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("paths", "complaint"),
    [
        (LayerPaths("layrs.*"), r"'layrs': the model has no submodule 'layrs'; did you mean 'layers'\?"),
        (LayerPaths("layers.7"), "'layers.7': layers has no submodule '7'; it has 0, 1, 2"),
        (
            LayerPaths("layers.*", hidden="nrm2"),
            r"no submodule 'nrm2'; did you mean 'layers\.0\.norm2'\?",
        ),
        (LayerPaths("layers.*", (TorchAttention("self_atn"),)), r"did you mean 'layers\.0\.self_attn'\?"),
        (LayerPaths("layers.*", (TorchAttention("linear1"),)), r"layers\.0\.linear1 is a Linear, no nn\.Multihead"),
        (LayerPaths("layers.*", (LinearQK("self_attn", "self_attn", 4),)), "name it in a TorchAttention"),
        (LayerPaths("layers.*", (LinearQKV("linear1", 5),)), "32 features, which 15 heads of q, k and v do not divide"),
        (LayerPaths("layers.0.self_attn.*"), "'layers.0.self_attn.*': layers.0.self_attn has no numbered layers"),
        (LayerPaths("layers.*", (TorchAttention("self_attn", "text"),)), "context 'text' is none of the modules"),
    ],
)
def test_paths_that_lead_nowhere_are_named_with_the_nearest(paths: LayerPaths, complaint: str) -> None:
    with pytest.raises(OptimaError, match=complaint) as error:
        Adaptor(make_encoder(), {"encoder": paths})
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_in_the_forward_pass_is_named() -> None:
    x = torch.randn(B, N, WIDTH)
    idle = nn.ModuleDict({"used": nn.Linear(WIDTH, WIDTH), "idle": nn.Linear(WIDTH, WIDTH)})
    idle.forward = lambda x: idle["used"](x)  # type: ignore[method-assign]
    with pytest.raises(OptimaError, match="idle was not called"):
        Adaptor(idle, {"m": LayerPaths("idle")}).run({"m": (0,)}, x)
    idle.forward = lambda x: idle["used"](idle["used"](x))  # type: ignore[method-assign]
    with pytest.raises(OptimaError, match="used ran twice"):
        Adaptor(idle, {"m": LayerPaths("used")}).run({"m": (0,)}, x)
    idle.forward = lambda x: idle["used"](x[0, 0])  # type: ignore[method-assign]
    with pytest.raises(OptimaError, match=r"used gave a tensor of shape \[16\]; a tensor \[B, N, D\] is needed"):
        Adaptor(idle, {"m": LayerPaths("used")}).run({"m": (0,)}, x)
    with pytest.raises(OptimaError, match=r"no module 'text'; the adaptor has \['m'\]"):
        Adaptor(idle, {"m": LayerPaths("used")}).run({"text": (0,)}, x)
    biased = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True))
    with pytest.raises(OptimaError, match="adds a key of its own"):
        Adaptor(biased, {"m": LayerPaths("", (TorchAttention("0"),))})
