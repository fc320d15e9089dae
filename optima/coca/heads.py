"""Task heads: an attentional pooler over the multimodal decoder's states, then a classifier (CoCa, section 4.2)."""

import torch
from torch import Tensor, nn

from optima.coca.layers import AttentionalPooler


class ClassificationHead(nn.Module):
    """States of `pictures` image-text pairs [B * pictures, L, D] -> class logits [B, classes].

    One picture: a linear classifier on the pooled state. Two pictures (NLVR2): the pair's pooled states, side by side,
    through an MLP.
    """

    def __init__(self, width: int, heads: int, classes: int, pictures: int = 1) -> None:
        super().__init__()
        self.pictures = pictures
        self.pooler = AttentionalPooler(1, width, heads, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = (
            nn.Linear(width, classes)
            if pictures == 1
            else nn.Sequential(nn.Linear(pictures * width, width), nn.GELU(), nn.Linear(width, classes))
        )

    def forward(self, states: Tensor, valid: Tensor) -> Tensor:
        """valid: bool [B * pictures, L], True where the text is no padding."""
        pooled = self.norm(self.pooler(states, mask=valid[:, None, None, :])[:, 0])
        logits: Tensor = self.classifier(torch.reshape(pooled, (-1, self.pictures * pooled.shape[-1])))
        return logits
