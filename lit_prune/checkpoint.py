"""Rebuilds the smaller model that a Lightning checkpoint's weights belong to, before they load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_prune.architectures import find_model
from lit_prune.errors import PlanError
from lit_prune.plan import FORMAT, PruningPlan
from lit_prune.surgery import apply_plan, get_plan


def pruning_states(checkpoint: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The states that pruning callbacks left in a Lightning checkpoint."""
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("format") == FORMAT:
            yield state


def rebuild_from_checkpoint(
    module: nn.Module, checkpoint: Mapping[str, Any], optimizers: Iterable[Optimizer] = ()
) -> None:
    """Cut the model inside a module as a Lightning checkpoint says, so that the checkpoint's weights fit.

    For use in a module's own ``on_load_checkpoint``, which makes ``load_from_checkpoint`` work on checkpoints of pruned
    models; within a Trainer the pruning callback sees to it itself. A checkpoint without pruning changes nothing, nor
    does a model that is cut as the checkpoint says already.

    Args:
        module: The module, with the model that the run began with somewhere in it.
        checkpoint: The loaded checkpoint.
        optimizers: Optimizers over the module's parameters, if there are any yet.

    Raises:
        PlanError: If the model is cut in another way than the checkpoint, or its run's first model, was.

    Example::

        class MyModule(LightningModule):
            def on_load_checkpoint(self, checkpoint):
                lit_prune.rebuild_from_checkpoint(self, checkpoint)
    """
    optimizers = list(optimizers)
    for state in pruning_states(checkpoint):
        model = find_model(module, state["model_path"])[1]
        found, digests = plan_digest(model), state["digests"]
        if found == digests["now"]:
            continue
        if state["plan"] is None or found != digests["start"]:
            raise PlanError(
                "The checkpoint belongs to a model that was cut in another way: it was saved with the plan"
                f" {_short(digests['now'])}, from a run that began with {_short(digests['start'])}; the model given has"
                f" {_short(found)}. Give the model that the run began with."
            )
        apply_plan(model, PruningPlan.from_dict(state["plan"]), optimizers)


def plan_digest(model: nn.Module) -> str | None:
    """Digest of the plan that a model was cut by, ``None`` for a dense one."""
    plan = get_plan(model)
    return None if plan is None else plan.digest()


def _short(digest: str | None) -> str:
    return "no plan (dense)" if digest is None else digest[:12]
