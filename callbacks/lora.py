"""Recovery by low-rank adapters, merged at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.registry import find_group_sets, has_groups
from lit_prune.arguments import (
    COUNT,
    FLAG,
    INTEGER,
    POSITIVE,
    TEXT,
    Rule,
    optional,
    sequence_of,
)
from lit_prune.calibration.random_state import random_state_kept
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.ranks import on_all_ranks
from lit_prune.callbacks.renewal import _any_cut, _pruning_callbacks, _renew_optimizers
from lit_prune.callbacks.runs import PerModule
from lit_prune.callbacks.strategies import renew_wrapper
from lit_prune.errors import PruningError, UnsupportedCallbackError, UnsupportedStrategyError
from lit_prune.extras import require
from lit_prune.io.lightning_checkpoint import ADAPTERS, ADAPTERS_FORMAT

_DROPOUT: Rule[float] = Rule("a number from 0 to below 1", Annotated[float, Field(ge=0, lt=1)])


# what peft has adapters for
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
_NAMES = sequence_of("a list of at least one name of a linear layer", TEXT, empty=False)


@dataclass(frozen=True)
class _Adapters:
    """State of the recovery, the modules whose weights are transposed, and what was trained before."""

    phase: str = "waiting"
    transposed: Sequence[str] = ()
    flags: Sequence[tuple[nn.Parameter, bool]] = ()


class LoRARecovery(Callback):
    """Fine-tune the pruned model by low-rank adapters alone, and merge them into it at the end.

    After the last cut, peft's LoRA layers take the place of the projections that were pruned, everything else in the pruned
    model is frozen, and the module's ``configure_optimizers`` is called anew for what is left to train; learning rates and the
    state of the schedulers carry over. What the LightningModule holds beside the model (a head) trains on as before. When the
    run is over the adapters are merged, and what remains is a plain pruned model.

    Checkpoints of this phase hold adapters and the frozen weights. A run resumes from them, ``validate(ckpt_path=...)``
    takes them, and :func:`lit_prune.rebuild_from_checkpoint` merges them for ``load_from_checkpoint``.

    Args:
        r: Rank of the adapters.
        alpha: Scale of the adapters, in units of ``r``: they are multiplied by ``alpha / r``.
        dropout: Dropout before the adapters.
        target_modules: Names of the linear layers to adapt, as peft understands them; if ``None`` all linear layers and
            convolutions that belong to groups, but for fused experts and what is in ``nn.MultiheadAttention``.
        merge: Whether to merge at the end; the adapters stay if not.
        seed: Seed of the adapters' initial values, so that they do not depend on what the run drew before.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range.
        MissingPackageError: If peft is not installed.

    Example::

        Trainer(callbacks=[StructuredPruning(), LoRARecovery(r=16)])

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; for pruned models Ma et al.,
    LLM-Pruner, NeurIPS 2023.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Sequence[str] | None = None,
        merge: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.r = COUNT.check("r", r)
        self.alpha = POSITIVE.check("alpha", alpha)
        self.dropout = _DROPOUT.check("dropout", dropout)
        names = optional(_NAMES).check("target_modules", target_modules)
        self.target_modules = None if names is None else list(names)
        self.merge = FLAG.check("merge", merge)
        self.seed = INTEGER.check("seed", seed)
        require("peft", "lora", "LoRARecovery")
        self._state: PerModule[_Adapters] = PerModule(_Adapters)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that shard the model, and averages of it.

        Raises:
            UnsupportedStrategyError: Under ``ModelParallelStrategy``.
            UnsupportedCallbackError: Beside ``WeightAveraging``.
        """
        del stage
        self._state.begin(pl_module)
        averaging = next((c for c in trainer.callbacks if is_a(c, WeightAveraging)), None)  # type: ignore[attr-defined]
        if averaging is not None:
            raise UnsupportedCallbackError(
                f"{type(averaging).__name__} averages into a copy of the module that LoRARecovery's adapters are not in."
                " Use one of the two."
            )
        if is_a(trainer.strategy, ModelParallelStrategy):
            raise UnsupportedStrategyError(
                "LoRARecovery puts layers into the model in the middle of a run, which FSDP2 cannot take up. Use DDP or one"
                " device, or save the pruned model and fine-tune it with peft in a run of its own."
            )

    @on_all_ranks("the checks before training")
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there are layers of the names given which peft can adapt, or any to adapt.

        Raises:
            PruningError: Naming those that the model does not have or peft cannot adapt, or if there are none.
        """
        if _adapted(pl_module):
            return
        for pruning in _pruning_callbacks(trainer):
            model = pruning.model(pl_module)
            if self.target_modules is None:
                if has_groups(model):
                    self._default_targets(model)
                continue
            paths = [path for path, _ in model.named_modules()]
            unknown = [n for n in self.target_modules if not any(p == n or p.endswith(f".{n}") for p in paths)]
            if unknown:
                pruned = {part.module.rpartition(".")[2] for s in find_group_sets(model) for part in s.slices}
                raise PruningError(
                    f"LoRARecovery's target_modules {unknown} are no ends of paths of modules of {type(model).__name__};"
                    f" expected such ends. Those of what is pruned are {sorted(pruned)}."
                )
            for path in paths:
                if any(path == n or path.endswith(f".{n}") for n in self.target_modules):
                    self._check_adaptable(model, path)

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Add the adapters after the last cut."""
        if pruning.dry_run or pruning.stages_done < len(pruning.stages) or _adapted(pl_module):
            return
        self._inject(pruning.model(pl_module))
        if trainer.optimizers:
            _renew_optimizers(trainer)
            pruning.notify(trainer, pl_module, "on_optimizers_renewed")
        renew_wrapper(trainer)

    def on_pruning_load_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        pruning: StructuredPruning,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Add the adapters before a checkpoint that holds adapters loads."""
        del trainer
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if state.get("phase") == ADAPTERS and not _adapted(pl_module):
            self._inject(pruning.model(pl_module))

    def _check_adaptable(self, model: nn.Module, path: str) -> None:
        """Refuse a module whose adapter would not be run or merged, and one that peft has none for: it is given one outside its
        model."""
        module = model.get_submodule(path)
        if (why := _why_lost(model, path)) is not None:
            raise self._unadaptable(path, module, why)
        flags = [(p, p.requires_grad) for p in module.parameters()]
        holder = nn.ModuleDict({"layer": module})
        try:
            self._add_adapters(holder, ["layer"])
        except torch.OutOfMemoryError:
            raise
        # peft ends with whatever its look at the layer runs into
        except Exception as error:
            why = f"which peft cannot adapt: {str(error).partition('. ')[0]}"
            raise self._unadaptable(path, module, why) from error
        finally:
            _put_back(holder, flags)

    def _unadaptable(self, path: str, module: nn.Module, why: str) -> PruningError:
        return PruningError(
            f"LoRARecovery's target_modules {self.target_modules} name {path!r} ({type(module).__name__}), {why}. Expected names"
            " of linear layers, convolutions or embeddings."
        )

    def _add_adapters(self, model: nn.Module, targets: Sequence[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = list(targets)
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=names)  # type: ignore[arg-type]
        with random_state_kept():
            torch.manual_seed(self.seed)
            inject_adapter_in_model(config, model)

    def _inject(self, model: nn.Module) -> None:
        targets = self._default_targets(model) if self.target_modules is None else self.target_modules
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            self._add_adapters(model, targets)
        except BaseException:
            _put_back(model, flags)
            raise
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        transposed = [n for n, m in _adapted(model) if getattr(m, "fan_in_fan_out", False)]
        self._state.value = _Adapters(ADAPTERS, transposed, flags)

    def _default_targets(self, model: nn.Module) -> list[str]:
        """Names of the layers of a model that belong to groups and can be adapted.

        Raises:
            PruningError: If there are none.
        """
        names = {s.module for g in find_group_sets(model) for s in g.slices if s.input_dim is not None}
        targets = sorted(name for name in names if _adaptable(model, name))
        if not targets:
            raise PruningError(
                f"LoRARecovery adapts linear layers and convolutions that are pruned; found none in {type(model).__name__},"
                f" whose groups lie in {sorted(names)[:3]}. Name other layers as target_modules, or train all weights."
            )
        return targets

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first cut of a new run; train what an earlier fit merged as any other weights."""
        if not _any_cut(trainer) or self._state.value.phase == "merged":
            self._state.reset()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge the adapters."""
        del trainer, stage
        state = self._state.value
        if state.phase != ADAPTERS or not self.merge:
            return
        for _, layer in _adapted(pl_module):
            layer.merge()
        _put_back(pl_module, state.flags)
        self._state.value = _Adapters("merged", state.transposed)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the adapters' optimizer state out of a checkpoint that has no adapters any more."""
        del trainer, pl_module
        if self._state.value.phase == "merged" and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = []

    # what merging the adapters in a checkpoint needs to know
    state_beside_weights = True

    def state_dict(self) -> dict[str, Any]:
        """State of the recovery, and what merging needs to know."""
        return {
            "format": ADAPTERS_FORMAT,
            "phase": self._state.value.phase,
            "scaling": self.alpha / self.r,
            "transposed": list(self._state.value.transposed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self._state.value = replace(
            self._state.value, phase=state_dict["phase"], transposed=list(state_dict["transposed"])
        )


def _adaptable(model: nn.Module, name: str) -> bool:
    """Whether adapters can take the place of a module, are run there and merged."""
    return isinstance(model.get_submodule(name), _LAYERS) and _why_lost(model, name) is None


def _why_lost(model: nn.Module, name: str) -> str | None:
    """Why an adapter of a module would not be run, or not be merged; ``None`` if it would."""
    places = (name, name.rpartition(".")[0])
    if any(isinstance(model.get_submodule(place), nn.MultiheadAttention) for place in places):
        return "whose weights nn.MultiheadAttention reads past any adapters"
    if getattr(model.get_submodule(name), "groups", 1) > 1:
        return "whose adapters peft cannot merge: it has groups of channels"
    return None


def _put_back(model: nn.Module, flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
    """Take all adapters out of a model, and let parameters be trained as before."""
    for name, layer in _adapted(model):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer.get_base_layer())
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
