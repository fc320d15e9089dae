"""Small random models of transformers, made offline from their configurations, each with a batch that it takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, WORDS = 32, 4, 2, 99
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
}
_LANGUAGE: dict[str, Any] = {**_SIZES, "vocab_size": WORDS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_VISION: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = 98
"""The word that stands for a token of an image."""


class Case(NamedTuple):
    """make: makes the model, with any number of layers. batch: its arguments. maps: module -> field of its output that
    has eager's own maps; refused: what a tap's `unlike` says, where the map is refused."""

    make: Callable[[int], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    modules: tuple[str, ...]
    maps: dict[str, str]
    refused: str = ""


def words(length: int = 12, images: int = 0) -> dict[str, Tensor]:
    """Two samples; of the second the first tokens are padding. The first `images` others stand for an image."""
    ids = torch.randint(3, WORDS - 1, (2, length))
    valid = torch.ones(2, length, dtype=torch.long)
    valid[1, :3] = 0
    ids[0, :images] = _IMAGE
    ids[1, 3 : 3 + images] = _IMAGE
    return {"input_ids": ids.masked_fill(valid == 0, 0), "attention_mask": valid}


def words_padded_behind(length: int = 12) -> dict[str, Tensor]:
    """Two samples; of the second the last tokens are padding."""
    found = words(length)
    return {name: tensor.flip(1) for name, tensor in found.items()}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def captioned(count: int) -> dict[str, Tensor]:
    return words(8 + count, count) | images()


def two_sizes() -> dict[str, Tensor]:
    """Two images of different sizes, their patches packed, and the words that stand for them."""
    grids = ((1, 4, 4), (1, 8, 4))
    texts = words(16)
    for row, (_, height, width) in enumerate(grids):
        texts["input_ids"][row, 3 : 3 + height * width // 4] = _IMAGE
    return texts | {
        "pixel_values": torch.randn(sum(height * width for _, height, width in grids), 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (texts["input_ids"] == _IMAGE).long(),
    }


def _clip(layers: int) -> nn.Module:
    sizes = {"num_hidden_layers": layers}
    return hf.CLIPModel(hf.CLIPConfig(text_config=_TEXT | sizes, vision_config=_VISION | sizes, projection_dim=16))


def _siglip2(layers: int) -> nn.Module:
    vision = {**_VISION, "num_hidden_layers": layers, "num_patches": 16, "num_channels": 3}
    return hf.Siglip2Model(hf.Siglip2Config(text_config=_TEXT | {"num_hidden_layers": layers}, vision_config=vision))


def _siglip2_batch() -> dict[str, Tensor]:
    valid = torch.ones(2, 16, dtype=torch.long)
    valid[1, 8:] = 0
    return words_padded_behind() | {
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": valid,
        "spatial_shapes": torch.tensor([[4, 4], [4, 2]]),
    }


def _blip2(layers: int) -> nn.Module:
    depth = {"num_hidden_layers": layers}
    qformer = {**_SIZES, **depth, "vocab_size": WORDS, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
    text = {
        "model_type": "opt",
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 48,
        "num_attention_heads": HEADS,
        "vocab_size": WORDS,
        "pad_token_id": 0,
        **depth,
    }
    config = hf.Blip2Config(
        vision_config=_VISION | depth,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_token_index=_IMAGE,
        image_text_hidden_size=16,
    )
    return hf.Blip2ForConditionalGeneration(config)


def _idefics3(layers: int) -> nn.Module:
    depth = {"num_hidden_layers": layers}
    config = hf.Idefics3Config(
        vision_config=_VISION | depth,
        text_config={"model_type": "llama", **_LANGUAGE, **depth},
        scale_factor=2,
        image_token_id=_IMAGE,
        pad_token_id=0,
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm(layers: int) -> nn.Module:
    depth = {"num_hidden_layers": layers}
    config = hf.SmolVLMConfig(
        vision_config=_VISION | depth,
        text_config={"model_type": "llama", **_LANGUAGE, **depth},
        scale_factor=2,
        image_token_id=_IMAGE,
        pad_token_id=0,
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _five_dimensional() -> dict[str, Tensor]:
    found = captioned(4)
    return found | {"pixel_values": found["pixel_values"][:, None]}


_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen2_5_vl(layers: int) -> nn.Module:
    vision = {
        "depth": layers,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [layers - 1],
    }
    text = {**_LANGUAGE, "num_hidden_layers": layers, "rope_parameters": _MROPE}
    ids = {"image_token_id": _IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def _qwen3_vl(layers: int) -> nn.Module:
    vision = {
        "depth": layers,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "patch_size": 8,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = {**_LANGUAGE, "num_hidden_layers": layers, "rope_parameters": _MROPE}
    ids = {"image_token_id": _IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def _paligemma(layers: int) -> nn.Module:
    depth = {"num_hidden_layers": layers}
    config = hf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, **depth, "projection_dim": WIDTH},
        text_config={"model_type": "gemma", **_LANGUAGE, **depth},
        image_token_index=_IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _llava(layers: int) -> nn.Module:
    depth = {"num_hidden_layers": layers}
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, **depth},
        text_config={"model_type": "llama", **_LANGUAGE, **depth},
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config)


def _whisper(layers: int) -> nn.Module:
    config = hf.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=WORDS,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def _t5(layers: int) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": HEADS, "vocab_size": WORDS}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def _language(model: type, config: type, **options: Any) -> Callable[[int], nn.Module]:
    return lambda layers: model(config(**{**_LANGUAGE, "num_hidden_layers": layers, **options}))


def _image_encoder(model: type, config: type) -> Callable[[int], nn.Module]:
    return lambda layers: model(config(**{**_VISION, "num_hidden_layers": layers}))


_OF_LANGUAGE = {"language": "attentions"}

CASES: dict[str, Case] = {
    "CLIP": Case(
        _clip, lambda: words_padded_behind() | images(), ("text", "vision"),
        {"text": "text_model_output.attentions", "vision": "vision_model_output.attentions"},
    ),
    "SigLIP 2": Case(
        _siglip2, _siglip2_batch, ("text", "vision"),
        {"text": "text_model_output.attentions", "vision": "vision_model_output.attentions"},
    ),
    "BLIP-2": Case(
        _blip2, lambda: captioned(4), ("vision", "qformer", "projector", "language"),
        {},
    ),
    "Idefics 3": Case(_idefics3, _five_dimensional, ("vision", "projector", "language"), _OF_LANGUAGE),
    "SmolVLM": Case(_smolvlm, _five_dimensional, ("vision", "projector", "language"), _OF_LANGUAGE),
    "Qwen2.5-VL": Case(
        _qwen2_5_vl, two_sizes, ("vision", "projector", "language"), _OF_LANGUAGE
    ),
    "Qwen3-VL": Case(
        _qwen3_vl, two_sizes, ("vision", "projector", "language"), _OF_LANGUAGE
    ),
    "PaliGemma": Case(_paligemma, lambda: captioned(16), ("vision", "projector", "language"), _OF_LANGUAGE),
    "LLaVA": Case(_llava, lambda: captioned(16), ("vision", "projector", "language"), _OF_LANGUAGE),
    "Whisper": Case(
        _whisper,
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, WORDS, (2, 6))},
        ("encoder", "decoder"),
        {"encoder": "encoder_attentions", "decoder": "decoder_attentions"},
    ),
    "ViT": Case(_image_encoder(hf.ViTModel, hf.ViTConfig), images, ("vision",), {"vision": "attentions"}),
    "DINOv2": Case(_image_encoder(hf.Dinov2Model, hf.Dinov2Config), images, ("vision",), {"vision": "attentions"}),
    "BERT": Case(_language(hf.BertModel, hf.BertConfig), words_padded_behind, ("encoder",), {"encoder": "attentions"}),
    "Llama": Case(_language(hf.LlamaForCausalLM, hf.LlamaConfig), words, ("language",), _OF_LANGUAGE),
    "Qwen3": Case(_language(hf.Qwen3ForCausalLM, hf.Qwen3Config), words, ("language",), _OF_LANGUAGE),
    "Mistral": Case(
        _language(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=4), words, ("language",), _OF_LANGUAGE
    ),
    "Gemma 3": Case(
        _language(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, sliding_window=4), words, ("language",), _OF_LANGUAGE
    ),
    "GPT-2": Case(
        lambda layers: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=layers, vocab_size=WORDS, bos_token_id=1, eos_token_id=2)
        ),
        words, ("language",), _OF_LANGUAGE,
    ),
    "Gemma 2": Case(
        _language(hf.Gemma2ForCausalLM, hf.Gemma2Config, sliding_window=4), words, ("language",), {}, "soft-capped"
    ),
    "T5": Case(
        _t5, lambda: words_padded_behind() | {"decoder_input_ids": torch.randint(3, WORDS, (2, 6))},
        ("encoder", "decoder"), {}, "position biases",
    ),
    "gpt-oss": Case(
        _language(hf.GptOssForCausalLM, hf.GptOssConfig, num_local_experts=2, num_experts_per_tok=1), words,
        ("language",), {}, "sinks",
    ),
}  # fmt: skip
"""Architecture -> its model. Grouped key heads and rotary positions: _LANGUAGE; norms of q and k: Qwen3, Gemma 3."""


def make(name: str, layers: int = LAYERS) -> nn.Module:
    """In eval mode, its weights large enough that attention is far from uniform."""
    model = CASES[name].make(layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model
