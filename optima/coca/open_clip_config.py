"""open_clip's CoCa configurations as ours, and ours as theirs.

An option that we cannot compute is refused by name, never ignored. Those that change neither a weight nor an output are
listed in `_UNUSED`: what only training reads, and what open_clip's own decoder takes from nowhere.
"""

from pathlib import Path
from typing import Any

from optima.coca.config import Activation, CoCaConfig, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.coca.presets import CLIP_MEAN, CLIP_STD
from optima.limits import MAX_METADATA_BYTES
from optima.untrusted import read_json
from optima_core.errors import OptimaError

_HUGGING_FACE = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"} | {
    f"hf_{name}" for name in ("model_pretrained", "proj_type", "pooler_type")
}
_TEXT = {
    "output_tokens",
    "pool_type",
    "eos_id",
    "final_ln_after_pool",
} | _HUGGING_FACE  # the CLS token overrides pool_type
_UNUSED = {
    "the configuration": {"custom_text", "init_logit_scale", "nonscalar_logit_scale"},
    "vision_cfg": {"output_tokens", "patch_dropout", "pos_embed_type"}
    | {f"timm_{name}" for name in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")},
    "text_cfg": _TEXT,
    "multimodal_cfg": _TEXT
    | {"mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads", "vocab_size", "pad_id", "embed_cls"}
    | {"proj_type", "proj_bias"},
}
_REQUIRED = {
    ("vision_cfg", "pool_type"): "tok",
    ("vision_cfg", "block_type"): "default",
    ("text_cfg", "block_type"): "default",
    ("text_cfg", "proj_type"): "linear",
}
"""The one value that an option may have, beside null, for us to compute the same."""


class _Section:
    """A part of a configuration, whose options are taken one by one; `finish` refuses what is left."""

    def __init__(self, name: str, values: Any, source: str) -> None:
        if not isinstance(values, dict):
            raise OptimaError(f"{source}: {name} must be an object of options, got {values!r:.80}")
        self.name, self.source = name, source
        self._left = dict(values)

    def take(self, option: str, default: Any = None) -> Any:
        value = self._left.pop(option, default)
        if value is None:
            raise OptimaError(f"{self.source}: {self.name} lacks {option}")
        return value

    def number(self, option: str, default: int | None = None, least: int = 0) -> int:
        value = self.take(option, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = f"a whole number from {least} on"
            raise OptimaError(f"{self.source}: {self.name}.{option} must be {wanted}, got {value!r:.80}")
        return value

    def finish(self) -> None:
        for option, value in self._left.items():
            neutral = value in (None, False) or value == _REQUIRED.get((self.name, option))
            if not neutral and option not in _UNUSED[self.name]:
                raise OptimaError(f"{self.source}: {self.name}.{option} = {value!r:.80} is not supported")


def from_open_clip_config(values: dict[str, Any], source: str = "the configuration") -> CoCaConfig:
    """The configuration of the model that open_clip builds from `values`, with its shifted CLS mask.

    values: a file of open_clip's model_configs, or an open_clip_config.json with `model_cfg` and `preprocess_cfg`.
    Raises OptimaError, calling the file `source`, if we cannot compute such a model.
    """
    preprocessing = values.get("preprocess_cfg", {})
    model = _Section("the configuration", values.get("model_cfg", values), source)
    vision, text, multimodal = (
        _Section(name, model.take(name), source) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")
    )
    activation: Activation = "quick_gelu" if model.take("quick_gelu", False) else "gelu"
    pooled = vision.take("attentional_pool", False)
    if not isinstance(pooled, bool):
        raise OptimaError(f"{source}: vision_cfg.attentional_pool = {pooled!r} is not supported, only true and false")
    if not text.take("embed_cls", False):
        raise OptimaError(f"{source}: text_cfg.embed_cls must be true; a CoCa has a CLS token")
    width = vision.number("width", 768)
    queries, pooler_heads = vision.number("attn_pooler_queries", 256), vision.number("attn_pooler_heads", 8)
    after_pool = vision.take("final_ln_after_pool", False)
    pad_id = text.number("pad_id", 0)
    if model.number("pad_id", pad_id) != pad_id:
        raise OptimaError(f"{source}: pad_id and text_cfg.pad_id must be equal")
    try:
        config = CoCaConfig(
            embed_dim=model.number("embed_dim"),
            image_encoder=ImageEncoderConfig(
                image_size=vision.number("image_size", 224),
                patch_size=vision.number("patch_size", 16),
                width=width,
                layers=vision.number("layers", 12),
                heads=width // vision.number("head_width", 64, least=1),
                mlp_ratio=vision.take("mlp_ratio", 4.0),
                pooler_queries=queries if pooled else 0,
                pooler_heads=pooler_heads,
                activation=activation,
                norm_input=not vision.take("no_ln_pre", False),
                norm_tokens=not pooled and not after_pool,
                mean=tuple(preprocessing.get("mean", CLIP_MEAN)),
                std=tuple(preprocessing.get("std", CLIP_STD)),
            ),
            text_decoder=TextDecoderConfig(
                vocab_size=text.number("vocab_size", 49408),
                context_length=text.number("context_length", 77),
                width=text.number("width", 512),
                layers=text.number("layers", 12),
                heads=text.number("heads", 8),
                mlp_ratio=text.take("mlp_ratio", 4.0),
                pad_id=pad_id,
                activation=activation,
                class_mask="shifted",
            ),
            multimodal_decoder=MultimodalDecoderConfig(
                width=multimodal.number("width", 512),
                layers=multimodal.number("layers", 12),
                heads=multimodal.number("heads", 8),
                activation=activation,
            ),
        )
        refuse_foreign_shape(config)
    except ValueError as error:
        raise OptimaError(f"{source}: {error}") from error
    multimodal.number("context_length", 77)
    for section in (model, vision, text, multimodal):
        section.finish()
    return config


def read_open_clip_config(path: Path) -> CoCaConfig:
    """The configuration in a JSON file of open_clip's; see `from_open_clip_config`."""
    if not path.is_file():
        raise OptimaError(f"configuration {path} does not exist; give a JSON file of open_clip's")
    values = read_json(path, "configuration", MAX_METADATA_BYTES)
    if not isinstance(values, dict):
        raise OptimaError(f"configuration {path} must hold an object, got {type(values).__name__}")
    return from_open_clip_config(values, f"configuration {path}")


def refuse_foreign_shape(config: CoCaConfig) -> None:
    """Raises ValueError if open_clip has no model of this shape."""
    image, text, multimodal = config.image_encoder, config.text_decoder, config.multimodal_decoder
    if config.image_token_width != multimodal.width:
        raise ValueError(
            f"image tokens of width {config.image_token_width} and a multimodal decoder of width {multimodal.width}: "
            "open_clip's cross-attention needs equal ones"
        )
    if multimodal.mlp_ratio != 4.0:
        raise ValueError(f"multimodal_decoder.mlp_ratio {multimodal.mlp_ratio}: open_clip's is always 4")
    if len({image.activation, text.activation, multimodal.activation}) > 1:
        raise ValueError("the three modules have different activations: open_clip has one for all")


def open_clip_config(config: CoCaConfig) -> dict[str, Any]:
    """The inverse of `from_open_clip_config`: what open_clip_config.json must hold.

    open_clip computes the shifted CLS mask whatever a configuration says, so `class_mask` has no place in it.

    Raises OptimaError if open_clip has no model of this shape.
    """
    image, text, multimodal = config.image_encoder, config.text_decoder, config.multimodal_decoder
    try:
        refuse_foreign_shape(config)
    except ValueError as error:
        raise OptimaError(f"the model cannot be exported to open_clip: {error}") from error
    vision_cfg: dict[str, Any] = {
        "image_size": image.image_size,
        "layers": image.layers,
        "width": image.width,
        "head_width": image.width // image.heads,
        "mlp_ratio": image.mlp_ratio,
        "patch_size": image.patch_size,
        "no_ln_pre": not image.norm_input,
        "output_tokens": True,
    }
    if image.pooler_queries:
        vision_cfg["attentional_pool"] = True
        vision_cfg["attn_pooler_queries"] = image.pooler_queries
        vision_cfg["attn_pooler_heads"] = image.pooler_heads
    else:
        vision_cfg["final_ln_after_pool"] = not image.norm_tokens
    shared = {"context_length": text.context_length, "vocab_size": text.vocab_size}
    text_cfg = shared | {
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": text.mlp_ratio,
        "pad_id": text.pad_id,
        "embed_cls": True,
        "output_tokens": True,
    }
    multimodal_cfg = shared | {"width": multimodal.width, "heads": multimodal.heads, "layers": multimodal.layers}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": vision_cfg,
            "text_cfg": text_cfg,
            "multimodal_cfg": multimodal_cfg,
            "pad_id": text.pad_id,
            "quick_gelu": image.activation == "quick_gelu",
            "custom_text": True,
        },
        "preprocess_cfg": {"size": image.image_size, "mode": "RGB", "mean": list(image.mean), "std": list(image.std)},
    }
