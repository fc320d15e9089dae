"""CoCa's image encoder: a vision transformer, and optionally an attentional pooler over it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optima.coca.config import ImageEncoderConfig
from optima.coca.layers import AttentionalPooler, SelfAttentionBlock, initialise_transformer
from optima_core.taps import LayerTap


class ImageEncoder(nn.Module):
    """Pictures [B, 3, S, S] (normalised) -> contrastive feature [B, E] and image tokens [B, M, C]."""

    def __init__(self, config: ImageEncoderConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, grid = config.width, config.image_size // config.patch_size
        self.patch = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.position = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.norm_input = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(width, config.heads, config.mlp_ratio) for _ in range(config.layers)
        )
        initialise_transformer(self.blocks, width, config.layers)
        out_width = embed_dim if config.pooler_queries else width
        self.pooler = (
            AttentionalPooler(config.pooler_queries, embed_dim, config.pooler_heads, width)
            if config.pooler_queries
            else None
        )
        self.norm_output = nn.LayerNorm(out_width)
        self.projection = nn.Parameter(torch.randn(out_width, embed_dim) * out_width**-0.5)

    def forward(self, images: Tensor, wanted: Sequence[int] = ()) -> tuple[Tensor, Tensor, tuple[LayerTap, ...]]:
        """images: [B, 3, S, S] -> (feature [B, E], tokens [B, M, C], taps of the wanted layers)."""
        patches = self.patch(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.to(patches.dtype).expand(len(images), 1, -1)
        x = self.norm_input(torch.cat([class_token, patches], dim=1) + self.position)
        taps = []
        for i, block in enumerate(self.blocks):
            x, attention = block(x)
            if i in wanted:
                taps.append(LayerTap(x, (attention,)))
        if self.pooler is not None:
            x = self.norm_output(self.pooler(x))
            feature, tokens = x[:, 0], x[:, 1:]
        else:
            feature, tokens = self.norm_output(x[:, 0]), x[:, 1:]
        return feature @ self.projection, tokens, tuple(taps)
