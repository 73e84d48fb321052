"""Lightning adapters of lit_prune: when to prune, not how."""

from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.recovery import Distillation, LearningRateRewarmup, LoRARecovery
from lit_prune.callbacks.report import PruningReport
from lit_prune.callbacks.schedule import CubicSchedule, Stage

__all__ = [
    "CubicSchedule",
    "Distillation",
    "LearningRateRewarmup",
    "LoRARecovery",
    "PruningReport",
    "Stage",
    "StructuredPruning",
]
