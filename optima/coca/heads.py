"""Task heads: an attentional pooler over the multimodal decoder's states, then a classifier (CoCa, section 4.2)."""

import torch
from torch import Tensor, nn

from optima.coca.layers import AttentionalPooler


class ClassificationHead(nn.Module):
    """States of `images` image-text pairs [B * images, L, D] -> class logits [B, classes].

    One image: a linear classifier on the pooled state. Two images (NLVR2): the pair's pooled states, side by side,
    through an MLP.
    """

    def __init__(self, width: int, heads: int, classes: int, images: int = 1) -> None:
        super().__init__()
        self.images = images
        self.pooler = AttentionalPooler(1, width, heads, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = (
            nn.Linear(width, classes)
            if images == 1
            else nn.Sequential(nn.Linear(images * width, width), nn.GELU(), nn.Linear(width, classes))
        )

    def forward(self, states: Tensor, valid: Tensor) -> Tensor:
        """valid: bool [B * images, L], True where the text is no padding."""
        pooled = self.norm(self.pooler(states, mask=valid[:, None, None, :])[:, 0])
        logits: Tensor = self.classifier(torch.reshape(pooled, (-1, self.images * pooled.shape[-1])))
        return logits
