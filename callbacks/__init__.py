"""Lightning adapters of lit_prune: when to prune, not how."""

from lit_prune.callbacks.distillation import Distillation
from lit_prune.callbacks.gates import LearnedGates
from lit_prune.callbacks.lora import LoRARecovery
from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.report import PruningReport
from lit_prune.callbacks.rewarmup import LearningRateRewarmup
from lit_prune.callbacks.schedule import CubicSchedule, Stage
from lit_prune.callbacks.wandb_report import wandb_run

__all__ = [
    "CubicSchedule",
    "Distillation",
    "LearnedGates",
    "LearningRateRewarmup",
    "LoRARecovery",
    "PruningReport",
    "Stage",
    "StructuredPruning",
    "wandb_run",
]
