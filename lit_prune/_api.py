"""All public names of the package, imported; ``lit_prune`` itself imports this module when one of them is asked for."""

from lit_prune.architectures import (
    MLP,
    Architecture,
    Attention,
    ExpertChannels,
    Experts,
    LatentAttention,
    MultiheadAttention,
    SequenceMixer,
    Stream,
    Traced,
    find_group_sets,
    find_model,
    register_architecture,
)
from lit_prune.architectures.tracing import TracedGroups
from lit_prune.budgets.budget import Budget
from lit_prune.budgets.latency import measure_latency
from lit_prune.calibration.statistic_registry import (
    GradientStatistic,
    GroupStatistic,
    InputStatistic,
    register_statistic,
    statistic_names,
)
from lit_prune.calibration.statistics import Statistics
from lit_prune.calibration.terms import Term
from lit_prune.config import PruningConfig
from lit_prune.detection import trace
from lit_prune.errors import BudgetError, CalibrationError, PlanError, PruningError, UnsupportedModelError
from lit_prune.gating import GateOptions, learn_gates
from lit_prune.groups import GroupSet
from lit_prune.io.huggingface import save_pruned
from lit_prune.io.lightning_checkpoint import rebuild_from_checkpoint
from lit_prune.io.loading import load_pruned
from lit_prune.pipeline import calibrate, prune
from lit_prune.plan import PruningPlan, get_plan
from lit_prune.planning import make_plan
from lit_prune.ranking.registry import Criterion, criteria, register_criterion
from lit_prune.ranking.selection import Limits
from lit_prune.ranking.table import GroupTable
from lit_prune.ratios import RatioPlan, plan_ratios
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.rotation import rotate_hidden
from lit_prune.repairing import repair
from lit_prune.surgery.apply import apply_plan
from lit_prune.verify import verify_architecture
from lit_prune.version import __version__

__all__ = [
    "MLP",
    "Architecture",
    "Attention",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Criterion",
    "ExpertChannels",
    "Experts",
    "GateOptions",
    "GradientStatistic",
    "GroupSet",
    "GroupStatistic",
    "GroupTable",
    "InputStatistic",
    "LatentAttention",
    "Limits",
    "MultiheadAttention",
    "PlanError",
    "PruningConfig",
    "PruningError",
    "PruningPlan",
    "RatioPlan",
    "SequenceMixer",
    "Statistics",
    "Stream",
    "Term",
    "Traced",
    "TracedGroups",
    "UnsupportedModelError",
    "__version__",
    "apply_plan",
    "calibrate",
    "criteria",
    "find_group_sets",
    "find_model",
    "get_plan",
    "learn_gates",
    "load_pruned",
    "make_plan",
    "measure_latency",
    "plan_ratios",
    "prune",
    "rebuild_from_checkpoint",
    "register_architecture",
    "register_criterion",
    "register_statistic",
    "repair",
    "rotate_hidden",
    "save_pruned",
    "statistic_names",
    "trace",
    "unexplained_shares",
    "verify_architecture",
]
