"""Distil a model of transformers with its own Trainer, which evaluates; a callback tells the bandit what came of it."""

import tempfile

import torch
from tiny_clips import load, make_pair
from transformers import Trainer, TrainerCallback, TrainingArguments

from optima_core import Balancer, Distillation

torch.manual_seed(0)
student, student_forward, teacher_forward, pairs = make_pair()
balancer = Balancer([pair.name for pair in pairs])
module = Distillation(student, student_forward, teacher_forward, pairs, balancer=balancer)


class Choose(TrainerCallback):
    def on_evaluate(self, arguments, state, control, metrics, **_):
        balancer.observe(metrics["eval_loss"])


with tempfile.TemporaryDirectory() as folder:
    every = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 4, "per_device_train_batch_size": 1}
    ours = {"remove_unused_columns": False, "prediction_loss_only": True, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(folder, learning_rate=1e-2, **every, **ours)
    data = {"train_dataset": [load(i) for i in range(40)], "eval_dataset": [load(10**6)]}
    trainer = Trainer(module, arguments, data_collator=lambda batches: batches[0], callbacks=[Choose()], **data)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss {first:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
