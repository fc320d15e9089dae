"""A model that trains in a second."""

from optima.coca import CoCa, CoCaConfig, HeadSpec, ImageEncoderConfig, MultimodalDecoderConfig, TextDecoderConfig
from optima.data.tokenizer import word_tokenizer
from optima.tasks.pictograms import IMAGE_SIZE, TEXT_LENGTH


def tiny_model(layers: int, heads: dict[str, HeadSpec]) -> CoCa:
    """A model of random weights that fits pictograms."""
    image = ImageEncoderConfig(IMAGE_SIZE, 16, 16, layers, 2, 2.0)
    text = TextDecoderConfig(word_tokenizer().vocab_size, TEXT_LENGTH, 16, layers, 2, 2.0)
    return CoCa(CoCaConfig(8, image, text, MultimodalDecoderConfig(16, layers, 2, 2.0)), heads)
