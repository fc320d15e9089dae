"""What a model of transformers shows the objective: its own loss, its predictions, its taps."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optima_core.errors import OptimaError
from optima_core.integrations.huggingface.adaptor import TransformersAdaptor
from optima_core.integrations.huggingface.attention import pretrained
from optima_core.objective import Forward, LinearPrediction, LogitPrediction
from optima_core.taps import WantedTaps

_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_logits_scale")
"""Settings of language models that change the logits behind their head."""

_IGNORED = -100
"""The label of a token that does not count, everywhere in transformers."""


class TransformersForward:
    """`student_forward` or `teacher_forward` of a `Distiller`, for batches of a model's keyword arguments.

    The task loss is the model's own, where the batch has what it asks for (labels, or return_loss of CLIP's kin);
    without it the run is label-free. Predictions are the head's input and weight, so that a vocabulary's logits are
    not compared one by one, or the logits where there is no head, or more is done to them (soft-capping, a scale).
    Tokens that predict a label count; without labels, those that attention_mask has.

    Args:
        adaptor: The model.
        inputs: Batch -> keyword arguments of the model, for a teacher and a student of different processors.
        logits: Compare logits even where a head could be read, as the other model's must be.
    """

    def __init__(
        self,
        adaptor: TransformersAdaptor,
        inputs: Callable[[Any], Mapping[str, Any]] = dict,
        logits: bool = False,
    ) -> None:
        self.adaptor = adaptor
        self.inputs = inputs
        model = pretrained(adaptor.model)
        changed = any(getattr(model.config.get_text_config(), name, None) is not None for name in _AFTER_HEAD)
        self._head = None if logits or changed else model.get_output_embeddings()
        self._head_is_all: bool | None = None
        # Keys and values are of no use after the pass, and would be copied to be kept.
        caches = model.can_generate() and hasattr(model.config.get_text_config(), "use_cache")
        self._always: dict[str, Any] = {"use_cache": False} if caches else {}

    def __call__(self, batch: Any, wanted: WantedTaps) -> Forward:
        """Raises OptimaError as `TransformersAdaptor.run`."""
        given = {**self._always, **self.inputs(batch)}
        states: list[Tensor] = []
        with _inputs_kept(self._head, states):
            output, taps = self.adaptor.run(wanted, **given)
        logits = _logits(output)
        counts = None if logits is None else self._counted(logits, given)
        prediction = None if logits is None else self._prediction(logits, states, counts)
        loss = getattr(output, "loss", None)
        return Forward(loss, prediction, taps, None if counts is None or "labels" not in given else counts.sum())

    def _prediction(
        self, logits: Tensor, states: list[Tensor], counts: Tensor | None
    ) -> LinearPrediction | LogitPrediction:
        mask = None if counts is None else counts.flatten()
        if len(states) == 1 and isinstance(self._head, nn.Linear):
            if self._head_is_all is None:
                self._head_is_all = self._is_all(logits, states[0], self._head)
            if self._head_is_all:
                return LinearPrediction(states[0].flatten(0, -2), self._head.weight, self._head.bias, mask)
        return LogitPrediction(logits.flatten(0, -2), None if mask is None else mask.float())

    @torch.no_grad()
    def _is_all(self, logits: Tensor, states: Tensor, head: nn.Linear) -> bool:
        """Whether the logits are what the head gives, and nothing is done to them; the host reads it."""
        if logits.shape[:-1] != states.shape[:-1]:
            return False
        own = F.linear(states[:1], head.weight, head.bias).float()
        error = (own - logits[:1].float()).abs().max() / own.abs().max()
        return bool(error <= 8 * torch.finfo(logits.dtype).eps)

    def _counted(self, logits: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """bool [B, N], of logits [B, N, V]: the tokens whose predictions are compared."""
        tokens, labels = logits.shape[:-1], given.get("labels")
        if isinstance(labels, Tensor) and labels.shape == tokens and logits.dim() == 3:
            counts = labels != _IGNORED
            return F.pad(counts[:, 1:], (0, 1)) if self._predicts_next() else counts
        valid = given.get("attention_mask")
        return valid.bool() if isinstance(valid, Tensor) and valid.shape == tokens else None

    def _predicts_next(self) -> bool:
        """Whether a token predicts the one after it, and labels stand where their tokens do."""
        model = pretrained(self.adaptor.model)
        kind = type(model).__name__
        return not model.config.is_encoder_decoder and not kind.endswith(("ForMaskedLM", "ForTokenClassification"))


@contextlib.contextmanager
def _inputs_kept(head: nn.Module | None, states: list[Tensor]) -> Iterator[None]:
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    try:
        yield
    finally:
        handle.remove()


def _logits(output: Any) -> Tensor | None:
    for name in ("logits", "logits_per_image"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            if found.dim() not in (2, 3):
                raise OptimaError(
                    f"logits of shape {list(found.shape)} cannot be compared; they must be [B, V] or [B, N, V]"
                )
            return found
    return None
