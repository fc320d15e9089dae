"""Two small random CLIP models and batches for them, in the place of `CLIPModel.from_pretrained` and a data set."""

import torch
from transformers import CLIPConfig, CLIPModel

from optima_core.integrations.huggingface import TransformersAdaptor, TransformersForward, pair_modules


def make_clip(width: int, layers: int) -> CLIPModel:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def load(number: int) -> dict:
    """Batch of that number, as keyword arguments of the models."""
    torch.manual_seed(number)
    return {"input_ids": torch.randint(1, 48, (4, 6)), "pixel_values": torch.randn(4, 3, 16, 16), "return_loss": True}


def make_pair() -> tuple:
    """The student, and what distilling it from the teacher takes."""
    teacher, student = make_clip(32, 4).eval(), make_clip(16, 2)
    ours, theirs = TransformersAdaptor(student), TransformersAdaptor(teacher)
    return student, TransformersForward(ours), TransformersForward(theirs), pair_modules(ours, theirs, load(0))
