"""Whether a CoCa fits the pictures and texts of pictograms, asked before a long run rather than in its first step."""

from optima.coca import CoCa
from optima.data.tokenizer import word_tokenizer
from optima.tasks.spec import HEADS, PICTURE_SIZE, TEXT_LENGTH
from optima_core.errors import OptimaError


def refuse_misfit(model: CoCa, name: str) -> None:
    """Raises OptimaError, calling the model `name`, if it cannot be run on pictograms."""
    tokenizer = word_tokenizer()
    text, size = model.config.text_decoder, model.config.image_encoder.image_size
    if size != PICTURE_SIZE:
        raise OptimaError(f"{name} takes pictures of {size} pixels; those of pictograms have {PICTURE_SIZE}")
    if text.vocab_size < tokenizer.vocab_size:
        raise OptimaError(
            f"{name} has a vocabulary of {text.vocab_size} tokens; the texts of pictograms need {tokenizer.vocab_size}"
        )
    if text.context_length < TEXT_LENGTH:
        raise OptimaError(f"{name} reads texts of {text.context_length} tokens; those of pictograms take {TEXT_LENGTH}")
    if text.pad_id != tokenizer.pad_id:
        raise OptimaError(f"{name} pads texts with token {text.pad_id}; pictograms pad with {tokenizer.pad_id}")
    for task, spec in model.head_specs.items():
        if spec != HEADS.get(task):
            raise OptimaError(f"{name} has a head for {task} with {spec}; pictograms take {HEADS.get(task)}")
