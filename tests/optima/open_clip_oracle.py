"""open_clip itself as the oracle: small models, weights that any machine can make again, outputs, and its tokens."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = Path(__file__).parent / "coca" / "golden"
TOKENS = Path(__file__).parent / "data" / "golden" / "clip_tokens.json"

TEXTS = (
    "a photo of a cat", "", "  \t\n ", "Hello, World!!", "hi!) !! wow!?", "👨‍👩‍👧‍👦 family 🎉🎉 🏳️‍🌈",
    "שלום עולם, مرحبا بالعالم", "&amp;lt;b&amp;gt; &eacute; &#128512; &notanentity;", "it's I'M we'Ll don't 'S 'ſ",
    "naïve café ÇA", "123 4567 ٣٤ ⅷ ½", "“curly” ‘quotes’ …", "ï¿½ schÃ¶n", "日本語のテキスト", "ΣΊΣΥΦΟΣ İstanbul ǅ ß",
    "a_b__c--d", "\u200b zero\u00a0width\ufeff", "x" * 150, "e\u0301 combining", "\x00\x01 control", "<|endoftext|>",
    "ﬁ ligature", "https://example.org/?q=1&lt=2", "Ｆｕｌｌ ｗｉｄｔｈ", "\ud7ff\ue000 \U0010ffff",
)  # fmt: skip
"""Texts on which tokenizers differ."""

_VISION = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2, "output_tokens": True}
_POOLED = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
_TEXT = {"context_length": 7, "vocab_size": 20, "layers": 2, "heads": 2, "embed_cls": True, "output_tokens": True}
_DECODER = {"context_length": 7, "vocab_size": 20, "layers": 1, "heads": 2}


def _case(embed_dim: int, width: int, vision: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "vision_cfg": _VISION | vision,
        "text_cfg": _TEXT | {"width": width},
        "multimodal_cfg": _DECODER | {"width": width},
        "custom_text": True,
    } | top


CASES: dict[str, dict[str, Any]] = {
    # The pooler's queries are narrower than what it reads, so open_clip keeps its q, k and v apart, as in ViT-L-14.
    "pooler": _case(8, 8, _POOLED),
    "pooler_of_equal_width": _case(16, 16, _POOLED | {"no_ln_pre": True}, quick_gelu=True),
    "no_pooler": _case(8, 16, {}),
    "no_pooler_raw_tokens": _case(8, 16, {"final_ln_after_pool": True, "mlp_ratio": 2.0}),
}
"""open_clip configurations that between them reach every branch of its CoCa that we compute."""


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Made of the names alone, the same everywhere: numpy keeps RandomState's stream for ever."""
    made = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        is_norm = ".ln_" in name and name.endswith("weight")
        scale = max(shape) ** -0.5 if len(shape) > 1 else 0.2
        made[name] = torch.tensor(noise * scale + is_norm, dtype=torch.float32).reshape(shape)
    return made


def inputs(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pixels in 0..1 [3, 3, S, S]; texts [3, context]: one full, one padded, one with the padding token inside."""
    size, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    length, words = text["context_length"], text["vocab_size"]
    draw = np.random.RandomState(0)
    pixels = torch.tensor(draw.uniform(size=(3, 3, size, size)), dtype=torch.float32)
    tokens = torch.tensor(draw.randint(1, words, (3, length)), dtype=torch.int64)
    tokens[1, length // 2 :] = 0
    tokens[2, length - 2 :] = 0
    tokens[2, 2] = 0
    return pixels, tokens


def load_open_clip() -> types.ModuleType:
    """The module, or a skip where it is not installed; only its models are used, so torchvision need not be there."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed (pip install --no-deps open-clip-torch ftfy regex timm)")
    with _torchvision():
        return importlib.import_module("open_clip")


def build(config: dict[str, Any]) -> nn.Module:
    """open_clip's model of a configuration, in eval mode."""
    values = {name: value for name, value in config.items() if name != "custom_text"}
    return sys.modules["open_clip"].CoCa(**values).eval()


def token_ids(texts: Iterable[str]) -> list[list[int]]:
    """What open_clip's tokenizer makes of texts, without start and end."""
    tokenizer = sys.modules["open_clip"].tokenizer.SimpleTokenizer()
    return [tokenizer.encode(text) for text in texts]


@torch.no_grad()
def outputs(model: nn.Module, pixels: Tensor, tokens: Tensor, mean: Any, std: Any) -> dict[str, Tensor]:
    """What the model gives: features (normalised; of texts under both CLS masks), logits, every layer's states."""
    hidden: dict[str, Tensor] = {}
    towers = {
        "image_encoder": model.visual.transformer.resblocks,
        "text_decoder": model.text.transformer.resblocks,
        "multimodal_decoder": model.text_decoder.cross_attn,
    }
    hooks = [
        block.register_forward_hook(lambda _, __, out, key=f"{tower}.{i}": hidden.__setitem__(key, out))
        for tower, blocks in towers.items()
        for i, block in enumerate(blocks)
    ]
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    model.text.correct_cls_mask = True
    exact = F.normalize(model.text(tokens)[0], dim=-1)
    model.text.correct_cls_mask = False
    found = model((pixels - mean_C11) / std_C11, tokens)
    shifted, labels = found["logits"], found.get("labels")
    if labels is not None:  # 3.3.0: without the last position, unless asked for it
        found = model((pixels - mean_C11) / std_C11, tokens, output_labels=False)
        assert torch.equal(labels, tokens[:, 1:])
        torch.testing.assert_close(found["logits"][:, :-1], shifted)
    for hook in hooks:
        hook.remove()
    return {
        "image_feature": found["image_features"],
        "text_feature": found["text_features"],
        "text_feature_exact": exact,
        "logits": found["logits"],
        **hidden,
    }


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """Stands in for torchvision while open_clip is imported, if it is missing: its images are not needed here."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = [
        "torchvision",
        *(f"torchvision.{name}" for name in ("transforms", "transforms.functional", "ops", "ops.misc")),
    ]
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        module.__getattr__ = lambda attribute: _Anything.made(attribute)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class _Anything(type):
    """A class with every attribute, each again such a class."""

    @classmethod
    def made(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls(name, (), {})

    def __getattr__(cls, name: str) -> type:
        return _Anything.made(name)
