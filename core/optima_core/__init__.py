"""Module-wise distillation of any torch model: taps, objective, bandit, engine. Knows losses, knows nothing of CoCa.

`Distiller` is the door. What it needs beside two models: a `ModulePair` for each part that is distilled, a function
that loads a batch, and for each model a function that returns a `Forward`.
"""

from optima_core.adaptor import Adaptor, LayerPaths, LinearQK, LinearQKV, TorchAttention
from optima_core.checkpoint import CheckpointStore
from optima_core.engine import BanditConfig, Distiller, DistillerConfig, RewardConfig
from optima_core.errors import OptimaError
from optima_core.modules import ModulePair
from optima_core.objective import Forward, LinearPrediction, LogitPrediction, Objective, ObjectiveConfig
from optima_core.optimiser import OptimiserConfig
from optima_core.parallel import Ranks, join_ranks
from optima_core.recompute import recompute_activations
from optima_core.records import PendingRecord, RoundRecord
from optima_core.taps import AttentionTap, LayerTap, Taps, WantedTaps

__all__ = [
    "Adaptor",
    "AttentionTap",
    "BanditConfig",
    "CheckpointStore",
    "Distiller",
    "DistillerConfig",
    "Forward",
    "LayerPaths",
    "LayerTap",
    "LinearPrediction",
    "LinearQK",
    "LinearQKV",
    "LogitPrediction",
    "ModulePair",
    "Objective",
    "ObjectiveConfig",
    "OptimaError",
    "OptimiserConfig",
    "PendingRecord",
    "Ranks",
    "RewardConfig",
    "RoundRecord",
    "Taps",
    "TorchAttention",
    "WantedTaps",
    "join_ranks",
    "recompute_activations",
]
