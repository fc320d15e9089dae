"""What a CoCa is told: its sizes, its heads, and how it generates.

The shipped models and the full-size ones of `optima.coca.presets` are the same code with other numbers. Imports the
standard library alone, so that a command line is parsed before torch is loaded.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from optima.limits import (
    MAX_IMAGE_SIDE,
    MAX_LAYERS,
    MAX_MLP_RATIO,
    MAX_TEXT_LENGTH,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from optima.sizes import number_within, whole_number

Activation = Literal["gelu", "quick_gelu"]
ClassMask = Literal["exact", "shifted"]

MODULES = ("image_encoder", "text_decoder", "multimodal_decoder")
"""The modules of a CoCa model: the arms of the bandit."""


def _check_tower(tower: Any, name: str) -> None:
    """Raises ValueError if what all three modules have is no size that a module can have."""
    whole_number(tower.width, f"{name}.width", 1, MAX_WIDTH)
    whole_number(tower.layers, f"{name}.layers", 1, MAX_LAYERS)
    whole_number(tower.heads, f"{name}.heads", 1, MAX_WIDTH)
    number_within(tower.mlp_ratio, f"{name}.mlp_ratio", 1 / MAX_WIDTH, MAX_MLP_RATIO)
    if int(tower.width * tower.mlp_ratio) < 1:
        raise ValueError(f"{name}.mlp_ratio {tower.mlp_ratio} leaves no width to an MLP over width {tower.width}")
    _one_of(tower.activation, f"{name}.activation", get_args(Activation))


def _one_of(value: Any, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r:.80}")


@dataclass(frozen=True)
class ImageEncoderConfig:
    """A vision transformer over square patches.

    Attributes:
        image_size: Side of the square input image, pixels.
        patch_size: Side of a square patch, pixels; divides image_size.
        width: Model width D.
        layers: Number of transformer layers.
        heads: Attention heads; divides width.
        mlp_ratio: Width of the MLP over the model width.
        pooler_queries: Queries of the attentional pooler. Query 0 gives the contrastive feature, the others feed the
            multimodal decoder. 0 means no pooler: the class token gives the feature and the patch tokens feed the
            decoder.
        pooler_heads: Attention heads of the pooler; divides the embedding width.
        activation: Of the MLPs: exact GELU, or CLIP's x * sigmoid(1.702 x).
        norm_input: Whether a layer norm precedes the first layer.
        norm_tokens: Without a pooler: whether the last layer norm is applied to the patch tokens that feed the decoder,
            as to the class token. A pooler's tokens are always normalised.
        mean: Of red, green and blue, 0 to 1: what images are shifted by on their way in.
        std: Of red, green and blue, 0 to 1: what images are then divided by.
    """

    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    layers: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    pooler_queries: int = 0
    pooler_heads: int = 8
    activation: Activation = "gelu"
    norm_input: bool = True
    norm_tokens: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_tower(self, "image_encoder")
        whole_number(self.image_size, "image_encoder.image_size", 1, MAX_IMAGE_SIDE)
        whole_number(self.patch_size, "image_encoder.patch_size", 1, MAX_IMAGE_SIDE)
        whole_number(self.pooler_queries, "image_encoder.pooler_queries", 0, MAX_WIDTH)
        whole_number(self.pooler_heads, "image_encoder.pooler_heads", 1, MAX_WIDTH)
        for name in ("norm_input", "norm_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"image_encoder.{name} must be true or false, got {getattr(self, name)!r:.80}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3:
                raise ValueError(f"image_encoder.{name} must be three numbers, got {values!r:.80}")
            for value in values:
                number_within(value, f"image_encoder.{name}", -1e3, 1e3)


@dataclass(frozen=True)
class TextDecoderConfig:
    """The unimodal, causal text tower; a CLS token is appended after the text.

    Attributes:
        vocab_size: Number of tokens V.
        context_length: Longest text in tokens, start and end included, CLS not.
        width: Model width D.
        layers: Number of transformer layers.
        heads: Attention heads; divides width.
        mlp_ratio: Width of the MLP over the model width.
        pad_id: Token that fills a text up to the batch's length.
        activation: Of the MLPs: exact GELU, or CLIP's x * sigmoid(1.702 x).
        class_mask: What the CLS token sees. "exact": the text and itself. "shifted": the same mask one token later, so
            that behind a shorter text CLS sees one padding token and not itself. open_clip's released weights were
            trained with that, and it computes so to this day; texts must then be padded to context_length.
    """

    vocab_size: int = 200
    context_length: int = 20
    width: int = 128
    layers: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    pad_id: int = 0
    activation: Activation = "gelu"
    class_mask: ClassMask = "exact"

    def __post_init__(self) -> None:
        _check_tower(self, "text_decoder")
        whole_number(self.vocab_size, "text_decoder.vocab_size", 1, MAX_VOCABULARY)
        whole_number(self.context_length, "text_decoder.context_length", 1, MAX_TEXT_LENGTH)
        whole_number(self.pad_id, "text_decoder.pad_id", 0, self.vocab_size - 1)
        _one_of(self.class_mask, "text_decoder.class_mask", get_args(ClassMask))


@dataclass(frozen=True)
class MultimodalDecoderConfig:
    """The decoder whose every layer is a causal self-attention block followed by a cross-attention block.

    Attributes:
        width: Model width D; equals the text decoder's width, whose states it takes.
        layers: Number of layers; each holds one self-attention and one cross-attention block.
        heads: Attention heads; divides width.
        mlp_ratio: Width of each block's MLP over the model width.
        activation: Of the MLPs: exact GELU, or CLIP's x * sigmoid(1.702 x).
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp_ratio: float = 4.0
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        _check_tower(self, "multimodal_decoder")


@dataclass(frozen=True)
class CoCaConfig:
    """A CoCa model (Yu et al., arXiv 2205.01917).

    Attributes:
        embed_dim: Width of the shared contrastive space, and of the image tokens that a pooler hands on.
        image_encoder: The image tower.
        text_decoder: The text tower.
        multimodal_decoder: The decoder that reads both.
    """

    embed_dim: int = 128
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text_decoder: TextDecoderConfig = field(default_factory=TextDecoderConfig)
    multimodal_decoder: MultimodalDecoderConfig = field(default_factory=MultimodalDecoderConfig)

    def __post_init__(self) -> None:
        image, text, multimodal = self.image_encoder, self.text_decoder, self.multimodal_decoder
        whole_number(self.embed_dim, "embed_dim", 1, MAX_WIDTH)
        if image.image_size % image.patch_size:
            raise ValueError(
                f"image_encoder.image_size {image.image_size} is no multiple of patch_size {image.patch_size}"
            )
        if not all(value > 0 for value in image.std):
            raise ValueError(f"image_encoder.std must be above 0, got {list(image.std)}")
        for name, tower in (("image_encoder", image), ("text_decoder", text), ("multimodal_decoder", multimodal)):
            if tower.width % tower.heads:
                raise ValueError(f"{name}.width {tower.width} is no multiple of heads {tower.heads}")
        if text.width != multimodal.width:
            raise ValueError(
                f"multimodal_decoder.width {multimodal.width} must equal text_decoder.width {text.width}, "
                "whose states it takes"
            )
        if image.pooler_queries == 1:
            raise ValueError(
                "image_encoder.pooler_queries 1 leaves no token for the decoder; give 0 (no pooler) or at least 2"
            )
        if image.pooler_queries and self.embed_dim % image.pooler_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is no multiple of image_encoder.pooler_heads {image.pooler_heads}"
            )

    @property
    def image_token_width(self) -> int:
        """Width of the image tokens that the multimodal decoder reads."""
        return self.embed_dim if self.image_encoder.pooler_queries else self.image_encoder.width


@dataclass(frozen=True)
class HeadSpec:
    """A classification task: how many classes, and how many images one text speaks of."""

    classes: int
    images: int = 1

    def __post_init__(self) -> None:
        whole_number(self.classes, "classes", 1, MAX_VOCABULARY)
        whole_number(self.images, "images", 1, 2)


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen.

    Attributes:
        strategy: "greedy" takes the most probable token, "beam" searches for the most probable text, "sample" draws.
        beams: Texts that a beam search follows per image.
        length_penalty: Exponent a of a beam search's score, log-probability / tokens ** a (tokens: those generated, the
            end included); 0 compares log-probabilities as they are and favours short texts, 1 compares means per token.
        temperature: Sampling: logits are divided by this; above 0.
        top_k: Sampling: only the k most probable tokens; 0 takes all.
        top_p: Sampling: only the fewest most probable tokens that hold this share of what top_k left, in (0, 1]
            (nucleus sampling, Holtzman et al., arXiv 1904.09751).
        seed: Sampling: seed of the draws. A text is a function of the seed, its place in the batch, and the model.
        check_every: Tokens between questions of the host whether all texts have ended; 0 never asks.
    """

    strategy: Literal["greedy", "beam", "sample"] = "greedy"
    beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    check_every: int = 8

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, got {self.beams}")
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(f"length_penalty must be a finite number of at least 0, got {self.length_penalty}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("top_k", "seed", "check_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
