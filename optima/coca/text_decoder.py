"""CoCa's unimodal text decoder: causal, with a CLS token appended last that reads the whole text."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima.coca.cache import DecoderCache
from optima.coca.config import TextDecoderConfig
from optima.coca.layers import SelfAttentionBlock, initialise_transformer
from optima_core.taps import LayerTap


def causal_mask(length: int, device: torch.device) -> Tensor:
    """bool [L, L], True where query i (row) may see key j <= i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class TextDecoder(nn.Module):
    """Token ids [B, L] -> states [B, L, D] and, when asked for, the CLS feature [B, E]."""

    def __init__(self, config: TextDecoderConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.class_token = nn.Parameter(torch.randn(width) * 0.01)
        self.position = nn.Parameter(torch.randn(config.context_length + 1, width) * 0.01)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(width, config.heads, config.mlp_ratio, config.activation) for _ in range(config.layers)
        )
        self.norm_output = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        initialise_transformer(self.blocks, width, config.layers)

    def forward(
        self,
        tokens: Tensor,
        wanted: Sequence[int] = (),
        *,
        with_class: bool = True,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[LayerTap, ...]]:
        """tokens: int64 [B, L] padded on the right -> (states [B, L, D], feature [B, E] or None, taps).

        The states of the text do not depend on `with_class`: no token sees the CLS behind it.
        cache: what came before `tokens`, to which they are added; without taps and CLS.
        """
        valid = tokens != self.config.pad_id
        start = 0 if cache is None else cache.length
        x = self.token_embedding(tokens) + self.position[start : start + tokens.shape[1]]
        mask = None
        if with_class:
            # CLS has a position of its own, the last: its feature must not depend on how far a batch is padded.
            class_token = (self.class_token + self.position[-1]).to(x.dtype)
            x = torch.cat([x, class_token.expand(x.shape[0], 1, -1)], dim=1)
            keys = F.pad(valid, (1, 0) if self.config.class_mask == "shifted" else (0, 1), value=True)
            valid = F.pad(valid, (0, 1), value=True)
            # Right padding and causality keep padding out of the text states; CLS, being last, needs a mask for that.
            mask = causal_mask(x.shape[1], x.device) & keys[:, None, None, :]
        taps = []
        for i, block in enumerate(self.blocks):
            x, attention = block(x, causal=mask is None, mask=mask, cache=None if cache is None else cache.text[i])
            if i in wanted:
                seen = causal_mask(x.shape[1], x.device) if mask is None else mask
                pairs = seen & valid[:, None, :, None]
                taps.append(LayerTap(x, (attention._replace(causal=False, mask=pairs),), valid))
        if not with_class:
            return x, None, tuple(taps)
        return x[:, :-1], self.norm_output(x[:, -1]) @ self.projection, tuple(taps)
