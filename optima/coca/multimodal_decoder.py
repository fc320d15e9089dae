"""CoCa's multimodal decoder: causal over the text, attending over the image tokens in every layer."""

from collections.abc import Sequence

from torch import Tensor, nn

from optima.coca.cache import DecoderCache, KeysValues, SelfAttentionCache
from optima.coca.config import MultimodalDecoderConfig
from optima.coca.layers import CrossAttentionBlock, SelfAttentionBlock, initialise_transformer
from optima.coca.text_decoder import causal_mask
from optima_core.taps import AttentionTap, LayerTap


class MultimodalLayer(nn.Module):
    """A self-attention block over the text, then a cross-attention block over the image."""

    def __init__(self, config: MultimodalDecoderConfig, image_token_width: int) -> None:
        super().__init__()
        self.self_block = SelfAttentionBlock(config.width, config.heads, config.mlp_ratio, config.activation)
        self.cross_block = CrossAttentionBlock(
            config.width, config.heads, config.mlp_ratio, image_token_width, config.activation
        )

    def project(self, image_tokens: Tensor) -> KeysValues:
        """The keys and values of image tokens, to be handed to `forward` instead of them."""
        return self.cross_block.project(image_tokens)

    def forward(
        self, x_BLD: Tensor, image_tokens: Tensor | KeysValues, cache: SelfAttentionCache | None = None
    ) -> tuple[Tensor, AttentionTap, AttentionTap]:
        """-> (output, tap of the self-attention, tap of the cross-attention)."""
        x_BLD, self_tap = self.self_block(x_BLD, causal=True, cache=cache)
        x_BLD, cross_tap = self.cross_block(x_BLD, image_tokens)
        return x_BLD, self_tap, cross_tap


class MultimodalDecoder(nn.Module):
    """Text states [B, L, D] and image tokens [B, M, C] -> normalised states [B, L, D], which `head` makes logits."""

    def __init__(self, config: MultimodalDecoderConfig, image_token_width: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MultimodalLayer(config, image_token_width) for _ in range(config.layers))
        self.norm_output = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        initialise_transformer(self.layers, config.width, config.layers)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(
        self, text_states: Tensor, image_tokens: Tensor, valid: Tensor, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, tuple[LayerTap, ...]]:
        """image_tokens [B / n, M, C]: every image serves n consecutive texts.

        valid: bool [B, L], True where the text is no padding; used by the taps alone.
        """
        x = text_states
        taps = []
        for i, layer in enumerate(self.layers):
            x, self_tap, cross_tap = layer(x, image_tokens)
            if i in wanted:
                rows = valid[:, None, :, None]
                self_tap = self_tap._replace(causal=False, mask=causal_mask(x.shape[1], x.device) & rows)
                cross_rows = valid.reshape(image_tokens.shape[0], -1)[:, None, :, None]
                taps.append(LayerTap(x, (self_tap, cross_tap._replace(mask=cross_rows)), valid))
        states: Tensor = self.norm_output(x)
        return states, tuple(taps)

    def project(self, image_tokens: Tensor) -> list[KeysValues]:
        """The keys and values of image tokens [B, M, C] in every layer's cross-attention."""
        return [layer.project(image_tokens) for layer in self.layers if isinstance(layer, MultimodalLayer)]

    def step(self, text_states: Tensor, cache: DecoderCache) -> Tensor:
        """The states [B, N, D] of text that follows what `cache` remembers, and is added to it."""
        x = text_states
        for layer, image, past in zip(self.layers, cache.image, cache.multimodal, strict=True):
            x = layer(x, image, past)[0]
        states: Tensor = self.norm_output(x)
        return states
