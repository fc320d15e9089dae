"""CoCa in PyTorch: the same code for the `pico` models that are shipped and for the full-size ones."""

from optima.coca.config import CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.model import MODULES, CoCa, CoCaOutput, HeadSpec, captioning_loss, contrastive_loss

__all__ = [
    "MODULES",
    "CoCa",
    "CoCaConfig",
    "CoCaOutput",
    "HeadSpec",
    "ImageEncoderConfig",
    "MultimodalDecoderConfig",
    "TextDecoderConfig",
    "captioning_loss",
    "contrastive_loss",
]
