"""What a CoCa shows the distillation objective when it does a task."""

from torch import Tensor
from torch.nn import functional as F

from optima.coca import CoCa, captioning_loss
from optima.task import Task
from optima.tasks.batches import TaskBatch
from optima_core.objective import Forward, LinearPrediction, LogitPrediction
from optima_core.taps import WantedTaps


class TaskForward:
    """A CoCa and a task as the callable that the engine runs: (batch, wanted taps) -> Forward."""

    def __init__(self, model: CoCa, task: Task) -> None:
        self.model = model
        self.task = task

    def __call__(self, batch: TaskBatch, wanted: WantedTaps) -> Forward:
        output = self.model(batch.images, batch.tokens, wanted)
        if self.task == "captioning":
            pad_id = self.model.config.text_decoder.pad_id
            states, following = output.states[:, :-1], batch.tokens[:, 1:]
            loss = captioning_loss(self.model.caption_logits(output.states), batch.tokens, pad_id)
            prediction = LinearPrediction(
                states.flatten(0, 1), self.model.multimodal_decoder.head.weight, mask=(following != pad_id).flatten()
            )
            return Forward(loss, prediction, output.taps, (following != pad_id).sum())
        logits: Tensor = self.model.class_logits(self.task, output)
        loss = F.cross_entropy(logits.float(), batch.targets)
        return Forward(loss, LogitPrediction(logits), output.taps, len(batch.targets))
