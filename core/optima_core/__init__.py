"""Module-wise distillation of any torch model: taps, objective, bandit, engine. Knows losses, knows nothing of CoCa.

`Distiller` is the door. What it needs beside two models: a `ModulePair` for each part that is distilled, a function
that loads a batch, and for each model a function that returns a `Forward`.
"""

from typing import TYPE_CHECKING

from optima_core.lazily import attributes_from

if TYPE_CHECKING:
    from optima_core.adaptor import Adaptor, LayerPaths, LinearQK, LinearQKV, TorchAttention
    from optima_core.balancer import Balancer
    from optima_core.bandit.config import BanditConfig
    from optima_core.checkpoint import CheckpointStore, Saved
    from optima_core.config import DistillerConfig, ObjectiveConfig, OptimiserConfig, RewardConfig
    from optima_core.distillation import Distillation
    from optima_core.engine import Distiller
    from optima_core.errors import OptimaError
    from optima_core.modules import ModulePair
    from optima_core.objective import Forward, LinearPrediction, LogitPrediction, Objective
    from optima_core.parallel import Ranks, join_ranks
    from optima_core.recompute import recompute_activations
    from optima_core.records import PendingRecord, RoundRecord
    from optima_core.step import Step
    from optima_core.taps import AttentionTap, LayerTap, Taps, WantedTaps
    from optima_core.terms import LossTerm
else:
    __getattr__ = attributes_from(
        __name__,
        adaptor=("Adaptor", "LayerPaths", "LinearQK", "LinearQKV", "TorchAttention"),
        balancer=("Balancer",),
        bandit=("BanditConfig",),
        checkpoint=("CheckpointStore", "Saved"),
        config=("DistillerConfig", "ObjectiveConfig", "OptimiserConfig", "RewardConfig"),
        distillation=("Distillation",),
        engine=("Distiller",),
        errors=("OptimaError",),
        modules=("ModulePair",),
        objective=("Forward", "LinearPrediction", "LogitPrediction", "Objective"),
        parallel=("Ranks", "join_ranks"),
        recompute=("recompute_activations",),
        records=("PendingRecord", "RoundRecord"),
        step=("Step",),
        taps=("AttentionTap", "LayerTap", "Taps", "WantedTaps"),
        terms=("LossTerm",),
    )

__all__ = [
    "Adaptor",
    "AttentionTap",
    "Balancer",
    "BanditConfig",
    "CheckpointStore",
    "Distillation",
    "Distiller",
    "DistillerConfig",
    "Forward",
    "LayerPaths",
    "LayerTap",
    "LinearPrediction",
    "LinearQK",
    "LinearQKV",
    "LogitPrediction",
    "LossTerm",
    "ModulePair",
    "Objective",
    "ObjectiveConfig",
    "OptimaError",
    "OptimiserConfig",
    "PendingRecord",
    "Ranks",
    "RewardConfig",
    "RoundRecord",
    "Saved",
    "Step",
    "Taps",
    "TorchAttention",
    "WantedTaps",
    "join_ranks",
    "recompute_activations",
]
