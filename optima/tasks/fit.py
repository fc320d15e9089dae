"""Whether a CoCa fits the images and texts of a data set, asked before a long run rather than in its first step."""

from optima.coca import CoCa
from optima.data.config import Held
from optima.tasks.data import TaskData, head_spec
from optima_core.errors import OptimaError


def refuse_misfit(model: CoCa, name: str, data: TaskData) -> None:
    """Raises OptimaError, calling the model `name`, if it cannot be run on the data or its head is for other classes.

    A model without a head for the task is let through.
    """
    text, size = model.config.text_decoder, model.config.image_encoder.image_size
    if size != data.image_size:
        raise OptimaError(f"{name} takes images of {size} pixels; those of {data.name} have {data.image_size}")
    if text.vocab_size < data.tokenizer.vocab_size:
        raise OptimaError(
            f"{name} has a vocabulary of {text.vocab_size} tokens; "
            f"the texts of {data.name} need {data.tokenizer.vocab_size}"
        )
    if text.context_length < data.text_length:
        raise OptimaError(
            f"{name} reads texts of {text.context_length} tokens; those of {data.name} take {data.text_length}"
        )
    if text.pad_id != data.tokenizer.pad_id:
        raise OptimaError(f"{name} pads texts with token {text.pad_id}; {data.name} pads with {data.tokenizer.pad_id}")
    found, wanted = model.head_specs.get(data.task), head_spec(data)
    if found is not None and found != wanted:
        raise OptimaError(f"{name} has a head for {data.task} with {found}; {data.name} takes {wanted}")


def refuse_unscorable(data: TaskData, split: Held) -> None:
    """Raises OptimaError if predictions for a held-out split cannot be scored."""
    if not data.has_truth(split):
        raise OptimaError(
            f"the {split} split of {data.name} has no published truth to score by; "
            f"name one that has with --data.{split}, such as validation"
        )


def refuse_headless(model: CoCa, name: str, data: TaskData) -> None:
    """Raises OptimaError if the model has no head for the task of the data and needs one."""
    if data.classes and data.task not in model.head_specs:
        heads = ", ".join(model.head_specs) or "none"
        raise OptimaError(
            f"{name} has no head for {data.task} (it has {heads}); train it on the task first with `optima finetune`"
        )
