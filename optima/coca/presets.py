"""Configurations by name: open_clip's CoCa models as teachers, and students for each of their patch sizes.

The three teachers have the sizes of open_clip's configurations of the same names; parameters in millions of image
encoder, text decoder, multimodal decoder and in all:

    coca_ViT-L-14   306.7   123.7   208.1   638.5
    coca_ViT-B-32    89.2    63.4   101.0   253.6
    coca_base        86.4   134.7   219.3   440.3   (no weights were released)

`base`, `tiny12` and `tiny6` have 12, 12 and 6 layers a module, as their names say. Their widths are our choice, since
the paper's definitions were not at hand: 768 in the image encoder and 512 in the decoders for `base`, as in
coca_ViT-B-32, 384 everywhere for the tiny ones, and 64 features a head. A student is named for the patches it must
share with its teacher: `tiny12-14` is for coca_ViT-L-14, `tiny12-32` for coca_ViT-B-32, `tiny12-18` for coca_base.
"""

from collections.abc import Callable
from difflib import get_close_matches

from optima.coca.config import CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima_core.errors import OptimaError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""What OpenAI's CLIP and open_clip's CoCa models subtract from pixels and divide them by."""

_VOCABULARY = {14: 49408, 32: 49408, 18: 64000}
"""Tokens by patch size: CLIP's byte pairs, and the 64k vocabulary of coca_base."""


def _image(patch_size: int, layers: int, width: int, pooler_heads: int) -> ImageEncoderConfig:
    pooled = patch_size != 18  # coca_base has no pooler
    return ImageEncoderConfig(
        image_size=224 if pooled else 288,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=width // 64,
        pooler_queries=256 if pooled else 0,
        pooler_heads=pooler_heads,
        norm_tokens=not pooled,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


def _coca(
    patch_size: int, image: tuple[int, int], text: tuple[int, int], embed_dim: int, pooler_heads: int
) -> CoCaConfig:
    """image, text: (layers, width) of the image encoder, and of both decoders."""
    layers, width = text
    return CoCaConfig(
        embed_dim,
        _image(patch_size, *image, pooler_heads),
        TextDecoderConfig(_VOCABULARY[patch_size], 76, width, layers, width // 64),
        MultimodalDecoderConfig(width, layers, width // 64),
    )


def _student(layers: int, image_width: int, text_width: int) -> Callable[[int], CoCaConfig]:
    return lambda patch_size: _coca(
        patch_size, (layers, image_width), (layers, text_width), text_width, text_width // 64
    )


TEACHERS = {
    "coca_ViT-L-14": _coca(14, (24, 1024), (12, 768), 768, 8),
    "coca_ViT-B-32": _coca(32, (12, 768), (12, 512), 512, 8),
    "coca_base": _coca(18, (12, 768), (12, 768), 512, 8),
}
"""open_clip's models, with the right CLS mask: `import` sets the shifted one where weights were trained with it."""

_STUDENTS = {"base": _student(12, 768, 512), "tiny12": _student(12, 384, 384), "tiny6": _student(6, 384, 384)}

PRESETS: dict[str, CoCaConfig] = TEACHERS | {
    f"{name}-{patch_size}": make(patch_size) for patch_size in _VOCABULARY for name, make in _STUDENTS.items()
}
"""All configurations by name."""


def is_preset(name: str) -> bool:
    """Whether `preset` knows the name, given a teacher."""
    return name in PRESETS or name in _STUDENTS


def preset(name: str, teacher: CoCaConfig | None = None) -> CoCaConfig:
    """The configuration of that name; `base`, `tiny12` and `tiny6` alone take the patch size of the teacher.

    Raises OptimaError, naming the nearest preset, if there is none of the name.
    """
    if teacher is not None and name in _STUDENTS:
        name = f"{name}-{teacher.image_encoder.patch_size}"
    if name not in PRESETS:
        nearest = [known for known in PRESETS if known.startswith(name)] or get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"the presets are {', '.join(PRESETS)}"
        raise OptimaError(f"unknown preset {name}; {hint}")
    return PRESETS[name]
