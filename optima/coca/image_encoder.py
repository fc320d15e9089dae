"""CoCa's image encoder: a vision transformer, and optionally an attentional pooler over it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optima.coca.config import ImageEncoderConfig
from optima.coca.layers import AttentionalPooler, SelfAttentionBlock, initialise_transformer
from optima_core.taps import LayerTap


def sine_cosine_positions(grid: int, width: int, scale: float = 0.5) -> Tensor:
    """Where learned positions start: [grid * grid + 1, width], zeros for the class token, then row by row.

    A quarter of the features each holds sine and cosine of the column, and of the row, at wavelengths from 2 pi to
    200 pi patches (after Beyer et al., arXiv 2205.01580). Measured on pictograms: from random positions the model
    learns what stands in an image long before where, and its image tokens tell a linear probe little of their place
    (R2 0.35).
    """
    quarter = width // 4
    frequency = 100 ** -(torch.arange(quarter) / quarter)
    angle = torch.arange(grid)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = wave.repeat(grid, 1)
    rows = wave.repeat_interleave(grid, dim=0)
    positions = torch.cat([columns, rows], dim=1)
    padded = torch.zeros(grid * grid + 1, width)
    padded[1:, : positions.shape[1]] = scale * positions
    return padded


class Pixels(nn.Module):
    """From pixels in -1..1 to the mean and the standard deviation that a model was trained with.

    So a teacher and a student take the same images, whatever each was trained with.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.plain = config.mean == config.std == (0.5, 0.5, 0.5)
        mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
        self.register_buffer("scale", 0.5 / std_C11, persistent=False)
        self.register_buffer("shift", (0.5 - mean_C11) / std_C11, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images if self.plain else images * self.scale + self.shift


class ImageEncoder(nn.Module):
    """Images [B, 3, S, S] in -1..1 -> contrastive feature [B, E] and image tokens [B, M, C]."""

    def __init__(self, config: ImageEncoderConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, grid = config.width, config.image_size // config.patch_size
        self.pixels = Pixels(config)
        self.patch = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.position = nn.Parameter(sine_cosine_positions(grid, width))
        self.norm_input = nn.LayerNorm(width) if config.norm_input else nn.Identity()
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(width, config.heads, config.mlp_ratio, config.activation) for _ in range(config.layers)
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
        patches = self.patch(self.pixels(images)).flatten(2).transpose(1, 2)
        class_token = self.class_token.to(patches.dtype).expand(images.shape[0], 1, -1)
        x = self.norm_input(torch.cat([class_token, patches], dim=1) + self.position)
        taps = []
        for i, block in enumerate(self.blocks):
            x, attention = block(x)
            if i in wanted:
                taps.append(LayerTap(x, (attention,)))
        if self.pooler is not None:
            x = self.norm_output(self.pooler(x))
            feature, tokens = x[:, 0], x[:, 1:]
        elif self.config.norm_tokens:
            x = self.norm_output(x)
            feature, tokens = x[:, 0], x[:, 1:]
        else:
            feature, tokens = self.norm_output(x[:, 0]), x[:, 1:]
        return feature @ self.projection, tokens, tuple(taps)
