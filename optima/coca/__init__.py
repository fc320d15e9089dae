"""CoCa in PyTorch: the same code for the small models that are shipped and for the full-size ones.

Configurations come at once; what needs torch is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optima.coca.config import (
    MODULES,
    CoCaConfig,
    HeadSpec,
    ImageEncoderConfig,
    MultimodalDecoderConfig,
    TextDecoderConfig,
)

if TYPE_CHECKING:
    from optima.coca.model import CoCa, CoCaOutput, captioning_loss, contrastive_loss

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("optima.coca.model"), name)
