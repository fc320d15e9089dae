"""Distil a model of transformers with Lightning; the bandit is told after each validation."""

import lightning
import torch
from tiny_clips import load, make_pair
from torch.utils.data import DataLoader

from optima_core import Balancer, Distillation


class Distil(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.balancer = Balancer(["text", "vision"])
        self.losses = Distillation(*make_pair(), balancer=self.balancer)

    def training_step(self, batch, number):
        return self.losses(batch)["loss"]

    def validation_step(self, batch, number):
        print("held-out loss", loss := self.losses(batch)["loss"].item(), "reward", self.balancer.observe(loss))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
when = {"max_steps": 40, "val_check_interval": 4, "check_val_every_n_epoch": None}
batches, held = (DataLoader([load(i) for i in which], batch_size=None) for which in (range(40), [10**6]))
lightning.Trainer(**when, logger=False, enable_checkpointing=False).fit(Distil(), batches, held)
