"""Structured pruning that happens inside a normal PyTorch Lightning run. The engine works without Lightning, too.

``import lit_prune`` imports neither torch nor transformers: the public names are imported when the first of them is used.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lit_prune._auto_classes import register_config
from lit_prune._moved import install
from lit_prune.version import __version__

if TYPE_CHECKING:
    from lit_prune._api import *  # noqa: F403

install()
register_config()

# those of lit_prune._api, which a test compares
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


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lit_prune._api"), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which ``repair`` is the function although there is a folder of that name, too."""

    @property
    def repair(self) -> Any:
        """The function :func:`lit_prune.repair`."""
        return __getattr__("repair")

    @repair.setter
    def repair(self, folder: ModuleType) -> None:
        """Ignore the folder, which the import system sets as an attribute once it is imported."""


sys.modules[__name__].__class__ = _Package
