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

ADAPTERS = "adapters"
ADAPTERS_FORMAT = "lit_prune.adapters"


def pruning_states(checkpoint: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The states that pruning callbacks left in a Lightning checkpoint."""
    states = checkpoint.get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        if isinstance(state, Mapping) and state.get("format") == FORMAT:
            yield state


def rebuild_from_checkpoint(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Make the model inside a module, and the weights of a Lightning checkpoint, fit each other.

    For use in a module's own ``on_load_checkpoint``, which makes ``load_from_checkpoint`` work on checkpoints of pruned
    models; within a Trainer the pruning callback sees to it itself. The model is cut as the checkpoint's was, and adapters
    in the checkpoint (from ``LoRARecovery``) are merged into its weights. A checkpoint without pruning changes nothing, nor
    does a model that is cut as the checkpoint says already.

    Args:
        module: The module, with the model that the run began with somewhere in it.
        checkpoint: The loaded checkpoint; its ``state_dict`` changes if there are adapters to merge.

    Raises:
        PlanError: If the model is cut in another way than the checkpoint, or its run's first model, was.

    Example::

        class MyModule(LightningModule):
            def on_load_checkpoint(self, checkpoint):
                lit_prune.rebuild_from_checkpoint(self, checkpoint)
    """
    cut_as_saved(module, checkpoint)
    merge_adapters(module, checkpoint)


def cut_as_saved(module: nn.Module, checkpoint: Mapping[str, Any], optimizers: Iterable[Optimizer] = ()) -> None:
    """Cut the model inside a module, and optimizers over it, as a Lightning checkpoint says.

    Raises:
        PlanError: If the model is cut in another way than the checkpoint, or its run's first model, was.
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
        apply_plan(model, plan_of_state(state, get_plan(model)), optimizers)


def plan_of_state(state: Mapping[str, Any], previous: PruningPlan | None) -> PruningPlan:
    """The plan in the state that a pruning callback left, as it was when it was saved.

    Args:
        state: The state.
        previous: What was cut from the model before the run, if anything.

    Raises:
        PlanError: If the plan is malformed, or another one than its digest says.
    """
    plan = PruningPlan.from_dict(state["plan"])
    digests = state.get("digests")
    expected = digests.get("now") if isinstance(digests, Mapping) else None
    found = (plan if previous is None else previous.then(plan)).digest()
    if found != expected:
        raise PlanError(
            f"The checkpoint is damaged: its plan has the digest {_short(found)}, and it says {_short(expected)}. Was the plan"
            " changed after it was saved, or the model given cut before the run began?"
        )
    return plan


def merge_adapters(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Merge the adapters in a checkpoint's weights, in place, unless the module has adapters to take them."""
    states = [
        state
        for state in checkpoint.get("callbacks", {}).values()
        if isinstance(state, Mapping) and state.get("format") == ADAPTERS_FORMAT and state["phase"] == ADAPTERS
    ]
    if not states or any(name.endswith(".base_layer") for name, _ in module.named_modules()):
        return
    weights, merged = checkpoint["state_dict"], {}
    for name, value in weights.items():
        owner, _, parameter = name.rpartition(".")
        if ".lora_" in name:
            continue
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            if parameter == "weight":
                delta = weights[f"{owner}.lora_B.default.weight"] @ weights[f"{owner}.lora_A.default.weight"]
                transposed = any(owner.endswith(t) for t in states[0]["transposed"])
                value = value + states[0]["scaling"] * (delta.T if transposed else delta)
            name = f"{owner}.{parameter}"
        merged[name] = value
    checkpoint["state_dict"] = merged


def plan_digest(model: nn.Module) -> str | None:
    """Digest of the plan that a model was cut by, ``None`` for a dense one."""
    plan = get_plan(model)
    return None if plan is None else plan.digest()


def _short(digest: str | None) -> str:
    return "no plan (dense)" if digest is None else digest[:12]
