"""A model as other programs run it: torch.export and ONNX files, each checked against the model it was made from."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optima.coca import CoCa
from optima.runs.words import Words
from optima_core.errors import OptimaError

METADATA = "optima"
"""Name of what a program tells of itself."""

MOST_ROWS = 4096
"""Rows of the largest batch that an exported program takes."""

TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest of all, that a program may show: fp32 in another order."""


class Served(nn.Module):
    """A CoCa doing one task: (images, tokens) -> logits.

    images: float [B, images, 3, S, S], normalised as `optima.data.normalise.normalise` does; two images for nlvr2.
    tokens: int64 [B, L], padded on the right. Logits: [B, classes]; of captioning [B, L, V], where row p tells token
    p + 1 and does not depend on the tokens behind p.
    """

    def __init__(self, model: CoCa, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        output = self.model(images, tokens)
        if self.task == "captioning":
            return self.model.caption_logits(output.states)
        return self.model.class_logits(self.task, output)


def described(served: Served, words: Words | None, length: int) -> dict[str, Any]:
    """What a user of the program must know: how images become numbers, and which words the tokens are.

    words: None leaves out what only a run knows: how an image is fitted, the tokenizer, the classes' names.
    """
    config, specs = served.model.config, served.model.head_specs
    facts: dict[str, Any] = {
        "task": served.task,
        "images": specs[served.task].images if served.task in specs else 1,
        "image_size": config.image_encoder.image_size,
        "channels": "RGB",
        "value_range": [-1.0, 1.0],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "text_length": length,
        "pad_id": config.text_decoder.pad_id,
    }
    if words is None or words.task != served.task:
        return facts
    tokenizer = words.tokenizer
    return facts | {
        "fit": words.transform.fit,
        "interpolation": words.transform.interpolation,
        "start_id": tokenizer.start_id,
        "end_id": tokenizer.end_id,
        "classes": list(words.classes),
        "tokenizer": tokenizer.to_json()["backend"],
    }


def torch_program(served: Served, length: int, words: Words | None = None) -> bytes:
    """A torch.export program for any batch size and texts of `length` tokens; `torch.export.load` reads it.

    Its extra file optima.json holds what `described` tells.

    Raises OptimaError if the program's logits differ from the model's.
    """
    program = _exported(served, length)
    buffer = io.BytesIO()
    facts = json.dumps(described(served, words, length))
    torch.export.save(program, buffer, extra_files={f"{METADATA}.json": facts})
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    _refuse_difference("torch.export program", served, length, lambda images, tokens: loaded(images, tokens))
    return buffer.getvalue()


def onnx_program(served: Served, length: int, words: Words | None = None) -> bytes:
    """An ONNX program with inputs `images` and `tokens` and output `logits`, for any batch size.

    Its metadata `optima` holds what `described` tells, as JSON.

    Raises OptimaError if the onnx packages are missing, or if its logits, by onnxruntime, differ from the model's.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise OptimaError(
            f"ONNX needs the package {error.name}, which is not installed; `pip install onnx onnxscript onnxruntime`"
        ) from None
    with _without_chatter():
        program = torch.onnx.export(
            _exported(served, length), dynamo=True, input_names=["images", "tokens"], output_names=["logits"]
        )
    assert program is not None
    proto = program.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(described(served, words, length))
    content: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor, tokens: Tensor) -> Tensor:
        found = session.run(["logits"], {"images": images.numpy(), "tokens": tokens.numpy()})
        return torch.from_numpy(found[0])

    _refuse_difference("ONNX program", served, length, run)
    return content


def _exported(served: Served, length: int) -> Any:
    served.requires_grad_(False).eval()
    rows = torch.export.Dim("batch", min=1, max=MOST_ROWS)
    return torch.export.export(served, _inputs(served, length, 2), dynamic_shapes=({0: rows}, {0: rows}), strict=False)


def _inputs(served: Served, length: int, rows: int) -> tuple[Tensor, Tensor]:
    """Random images and texts, some of them padded."""
    config, specs = served.model.config, served.model.head_specs
    image_count = specs[served.task].images if served.task in specs else 1
    side = config.image_encoder.image_size
    generator = torch.Generator().manual_seed(rows)
    images = torch.rand(rows, image_count, 3, side, side, generator=generator) * 2 - 1
    tokens = torch.randint(0, config.text_decoder.vocab_size, (rows, length), generator=generator)
    ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
    pad = config.text_decoder.pad_id
    tokens = torch.where(tokens == pad, (pad + 1) % config.text_decoder.vocab_size, tokens)
    return images, torch.where(torch.arange(length) < ends, tokens, pad)


def _refuse_difference(name: str, served: Served, length: int, run: Callable[[Tensor, Tensor], Tensor]) -> None:
    for rows in (1, 3):
        images, tokens = _inputs(served, length, rows)
        with torch.no_grad():
            expected, found = served(images, tokens), run(images, tokens)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise OptimaError(
                f"the {name} differs from the model by {error:.1e} of the largest logit with {rows} rows, at most "
                f"{TOLERANCE:.0e} is rounding; it was not written"
            )


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Hides what torch.onnx tells developers: packages it could do without, and rewrites it tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
