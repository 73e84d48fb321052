"""Keeps the module paths of release 0.1 importable until 0.3, with a DeprecationWarning that names the new path."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# by the old module, the new modules with the public names that went there; old=new where the name changed, too
MOVED: dict[str, dict[str, str]] = {
    "lit_prune.architectures": {
        "lit_prune.architectures.components": "Block=Component",
    },
    "lit_prune.callbacks.calibration": {
        "lit_prune.callbacks.training_step": "gradient_scale",
        "lit_prune.callbacks.validation": "validation_metrics",
        "lit_prune.callbacks.ranks": "ranks_of check_same_on_all_ranks",
    },
    "lit_prune.callbacks.others": {
        "lit_prune.callbacks.compatibility": (
            "check_references averages cut_averages=prune_weight_averages start_over=reset_best_scores"
        ),
    },
    "lit_prune.callbacks.recovery": {
        "lit_prune.callbacks.rewarmup": "LearningRateRewarmup",
        "lit_prune.callbacks.distillation": "distillation_loss hidden_state_loss Distillation",
        "lit_prune.callbacks.lora": "LoRARecovery",
    },
    "lit_prune.architectures.adapt": {
        "lit_prune.architectures.adaptations": (
            "become nothing_to_undo KeptHeads kept_heads WithoutHeads without_heads WithoutInputs without_inputs"
        ),
    },
    "lit_prune.architectures.alibi": {
        "lit_prune.architectures.families.alibi": "WithOwnSlopes WithOwnBias own_slopes own_bias",
    },
    "lit_prune.architectures.base": {
        "lit_prune.architectures.slices": (
            "STACKED INTERLEAVED part_rows Projection projection produced consumed "
            "reader_adaptations parameter_of part_of group_set_of"
        ),
        "lit_prune.architectures.components": "QUERY_HEAD Block=Component Attention MLP",
        "lit_prune.architectures.registry": (
            "Architecture register_architecture architectures find_model find_group_sets depth_of"
        ),
    },
    "lit_prune.architectures.experts": {
        "lit_prune.architectures.families.experts": "ALIGNMENT expert_by_expert ExpertChannels Experts",
    },
    "lit_prune.architectures.gguf": {
        "lit_prune.architectures.families.gguf": "DECI_MODEL_TYPES",
    },
    "lit_prune.architectures.t5": {
        "lit_prune.architectures.families.t5": "WithOwnHeads own_heads",
    },
    "lit_prune.architectures.torch_modules": {
        "lit_prune.architectures.families.torch_modules": "WithFewerHeads fewer_heads no_nested_tensors MultiheadAttention",
    },
    "lit_prune.architectures.traced": {
        "lit_prune.architectures.tracing.traced": "Traced",
    },
    "lit_prune.blocks": {
        "lit_prune.architectures.layers": "hidden_input hidden_output passed_over",
    },
    "lit_prune.checkpoint": {
        "lit_prune.io.lightning_checkpoint": (
            "ADAPTERS ADAPTERS_FORMAT rebuild_from_checkpoint cut_as_saved merge_adapters plan_digest"
        ),
    },
    "lit_prune.config_view": {
        "lit_prune.architectures.config_view": "override_config",
    },
    "lit_prune.distributed": {
        "lit_prune.distributed.ranks": "Ranks",
    },
    "lit_prune.expert_equations": {
        "lit_prune.repair.experts": "Reached=StopForward expert_equations",
    },
    "lit_prune.export": {
        "lit_prune.io.huggingface": "save_pruned to_pretrained",
        "lit_prune.io.loading": "load_pruned",
        "lit_prune.io.conversion": "convert_checkpoint",
        "lit_prune.io.model_card": "model_card",
        "lit_prune.io.output_folder": "check_replaceable",
    },
    "lit_prune.figures": {
        "lit_prune.reporting.metrics": "label format_figure=format_metric figure_rows=metric_rows",
    },
    "lit_prune.files": {
        "lit_prune._files": "replacing write_text",
    },
    "lit_prune.gguf_export": {
        "lit_prune.io.gguf": "ARCHITECTURE DTYPES save_gguf",
    },
    "lit_prune.importance": {
        "lit_prune.ranking.registry": (
            "NORMALIZATIONS Criterion register_criterion criteria get_criterion check_normalization"
        ),
        "lit_prune.ranking.criteria": (
            "taylor second_order fisher taylor_2nd wanda output_wanda fluctuation magnitude random"
        ),
        "lit_prune.calibration.terms": "Term",
        "lit_prune.ranking.importance": "group_importance mixed_importance",
    },
    "lit_prune.masks": {
        "lit_prune.calibration.mask_gradients": "Key observable watch_block MaskCollector",
    },
    "lit_prune.pipeline": {
        "lit_prune.planning": "make_plan",
        "lit_prune.repairing": "repair",
        "lit_prune.config": "DEFAULT AUTO CANDIDATES HELD_BACK PruningConfig",
        "lit_prune.ranking.model_table": "model_size",
        "lit_prune.ranking.candidates": "masked masked_loss",
    },
    "lit_prune.reduction": {
        "lit_prune.calibration.reduce": "CPU_PIECE DEVICE_PIECE piece_size pieces add_line product_lines",
    },
    "lit_prune.repair": {
        "lit_prune.repair.refit": "REPAIRS DAMPING least_squares",
        "lit_prune.repair.redundancy": "SHARE_DAMPING unexplained_shares unexplained_share",
        "lit_prune.repair.regression": "ridge",
        "lit_prune.repair.bias": "bias_fold",
        "lit_prune.repair.calls": "Call=BlockCall",
    },
    "lit_prune.report": {
        "lit_prune.reporting.page": "report_table html_report write_report",
        "lit_prune.reporting.plots": "kept_figure importance_figure score_figure timeline_figure pictures",
    },
    "lit_prune.selection": {
        "lit_prune.ranking.selection": "ALIGNMENTS STEPS Limits select parameter_budget check_ratio",
    },
    "lit_prune.sharding": {
        "lit_prune.distributed.shards": (
            "is_sharded sharded_dim any_sharded check_layout local full local_range gather=sum_by_group "
            "local_part once sum_over_shards shard_like release reshard replace plain_copy"
        ),
    },
    "lit_prune.speed": {
        "lit_prune.reporting.throughput": "tokens_per_second",
    },
    "lit_prune.statistics": {
        "lit_prune.calibration.statistics": ("MODES GRADIENT_DTYPES Statistics check_gathering"),
        "lit_prune.calibration.activations": "ActivationStatistics",
        "lit_prune.calibration.collect": "collect_statistics",
        "lit_prune.calibration.evaluation": "evaluation_mode",
    },
    "lit_prune.surgery": {
        "lit_prune.surgery.tensors": "Cut=DimensionCut",
        "lit_prune.surgery.plan_cuts": "parameter_cuts",
        "lit_prune.surgery.apply": "apply_plan cut cut_block",
        "lit_prune.surgery.depth": "depth_fields",
    },
    "lit_prune.table": {
        "lit_prune.ranking.table": "COLUMNS GroupTable",
    },
    "lit_prune.training.loading": {
        "lit_prune.io.sources": "PACKAGE gguf_file load_tokenizer load_model",
    },
}


def moved_names(module: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package that has the path of an old module."""
    places = {}
    for place, names in MOVED[module].items():
        for entry in names.split():
            old, _, new = entry.partition("=")
            places[old] = place, new or old

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, new = places[name]
        warnings.warn(
            f"{module}.{name} is now {place}.{new}; the old path goes away in lit_prune 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(place), new)

    return get


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old modules of which nothing else is left."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = moved_names(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Make the old paths importable. Modules that exist are found first."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
