"""Taps tell what the layers really did: from q, k and mask alone the attention used, and with it the layer's output.

Everything is recomputed in float64 with explicit maps.
"""

import pytest
import torch
from torch import Tensor, nn

from optima.coca import CoCa
from optima_core import AttentionTap

IMAGES, TOKENS = 3, 9


def explicit_map(tap: AttentionTap) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) as the tap's definition says, [B, H, N, M]; 0 in rows that are not compared."""
    scores = tap.q @ tap.k.transpose(-1, -2) / tap.q.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    if tap.causal:
        allowed = allowed.tril()
    if tap.mask is not None:
        allowed = allowed & tap.mask
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def assert_lse_fits(tap: AttentionTap) -> None:
    """Rows that count have the log-sum-exp of the scores which the tap's own mask leaves."""
    assert tap.lse is not None
    scores = tap.q @ tap.k.transpose(-1, -2) / tap.q.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape, dtype=torch.bool) if tap.mask is None else tap.mask.expand(scores.shape)
    rows = allowed.any(-1)
    assert rows.any()
    expected = scores.masked_fill(~allowed, -torch.inf).logsumexp(dim=-1)
    torch.testing.assert_close(tap.lse[rows], expected[rows])


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def self_block(block: nn.Module, x: Tensor, attention_map: Tensor) -> Tensor:
    """The block's output if its attention map were this one."""
    width = x.shape[-1]
    value = block.attention.qkv(block.norm_attention(x))[..., 2 * width :]
    attended = attention_map @ heads_of(value, block.attention.heads)
    x = x + block.attention.out(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm_mlp(x))


def cross_block(block: nn.Module, x: Tensor, context: Tensor, attention_map: Tensor) -> Tensor:
    value = block.attention.kv(block.norm_context(context))[..., x.shape[-1] :]
    attended = attention_map @ heads_of(value, block.attention.heads)
    x = x + block.attention.out(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm_mlp(x))


@pytest.fixture
def model(make_coca, seed: int) -> CoCa:
    return make_coca(16, 3).double()


@pytest.fixture
def images(seed: int) -> Tensor:
    return torch.rand(IMAGES, 1, 3, 64, 64, dtype=torch.float64) * 2 - 1


@pytest.fixture
def tokens(seed: int) -> Tensor:
    found = torch.randint(3, 100, (IMAGES, TOKENS))
    found[1, 5:] = 0
    found[2, 2:] = 0
    return found


def test_image_encoder(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    taps = model(images, tokens, {"image_encoder": (0, 1, 2)}).taps["image_encoder"]
    for i in (1, 2):
        (tap,) = taps[i].attention
        assert_lse_fits(tap)
        expected = self_block(model.image_encoder.blocks[i], taps[i - 1].hidden, explicit_map(tap))
        torch.testing.assert_close(taps[i].hidden, expected)
    assert taps[0].valid is None


@pytest.mark.parametrize("with_class", [False, True])
def test_text_decoder(model: CoCa, images: Tensor, tokens: Tensor, with_class: bool) -> None:
    taps = model(images, tokens, {"text_decoder": (0, 1, 2)}, with_class=with_class).taps["text_decoder"]
    for i in (1, 2):
        (tap,) = taps[i].attention
        assert_lse_fits(tap)
        valid = taps[i].valid
        assert valid is not None
        assert valid.shape == taps[i].hidden.shape[:2]
        expected = self_block(model.text_decoder.blocks[i], taps[i - 1].hidden, explicit_map(tap))
        torch.testing.assert_close(taps[i].hidden[valid], expected[valid])
        assert tap.mask is not None
        rows = tap.mask.expand(IMAGES, 1, *tap.mask.shape[-2:]).any(-1)[:, 0]
        assert torch.equal(rows, valid), "padded queries are not compared, the others are"


def test_multimodal_decoder(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    taps = model(images, tokens, {"multimodal_decoder": (0, 1, 2)}).taps["multimodal_decoder"]
    image_tokens = model.image_encoder(images[:, 0])[1]
    for i in (1, 2):
        layer = model.multimodal_decoder.layers[i]
        self_tap, cross_tap = taps[i].attention
        valid = taps[i].valid
        assert valid is not None
        assert torch.equal(valid, tokens != 0)
        between = self_block(layer.self_block, taps[i - 1].hidden, explicit_map(self_tap))
        expected = cross_block(layer.cross_block, between, image_tokens, explicit_map(cross_tap))
        torch.testing.assert_close(taps[i].hidden[valid], expected[valid])
        for tap in (self_tap, cross_tap):
            assert_lse_fits(tap)
            assert tap.mask is not None
            allowed = tap.mask.expand(IMAGES, 1, TOKENS, tap.k.shape[2])
            assert torch.equal(allowed.any(-1)[:, 0], valid)


def test_the_pooler_attends_over_all_patches_and_query_0_gives_the_feature(make_coca, images: Tensor) -> None:
    model = make_coca(16, 2, pooler_queries=5).double()
    encoder = model.image_encoder
    feature, image_tokens, taps = encoder(images[:, 0], (1,))
    assert feature.shape == (IMAGES, 8)
    assert image_tokens.shape == (IMAGES, 4, 8)
    pooler = encoder.pooler
    context = pooler.norm_context(taps[0].hidden)
    query = heads_of(pooler.attention.q(pooler.norm_query(pooler.query)).expand(IMAGES, -1, -1), 2)
    key, value = (heads_of(part, 2) for part in pooler.attention.kv(context).chunk(2, dim=-1))
    attended = (query @ key.transpose(-1, -2) / 4**0.5).softmax(dim=-1) @ value
    pooled = encoder.norm_output(pooler.attention.out(attended.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(image_tokens, pooled[:, 1:])
    torch.testing.assert_close(feature, pooled[:, 0] @ encoder.projection)


def test_only_the_wanted_layers_are_tapped_and_taps_change_nothing(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    bare = model(images, tokens)
    assert bare.taps == {}
    wanted = {"image_encoder": (2,), "multimodal_decoder": (0, 2)}
    tapped = model(images, tokens, wanted)
    assert {name: len(found) for name, found in tapped.taps.items()} == {"image_encoder": 1, "multimodal_decoder": 2}
    assert torch.equal(bare.states, tapped.states)
    every = model(images, tokens, {"image_encoder": (0, 1, 2), "multimodal_decoder": (0, 1, 2)}).taps
    assert torch.equal(tapped.taps["image_encoder"][0].hidden, every["image_encoder"][2].hidden)
    assert torch.equal(tapped.taps["multimodal_decoder"][1].hidden, every["multimodal_decoder"][2].hidden)
