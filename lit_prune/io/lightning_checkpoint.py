"""Rebuilds the smaller model that a Lightning checkpoint's weights belong to, before they load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prune.architectures.registry import find_group_sets, find_model, has_groups, submodule
from lit_prune.errors import ArgumentTypeError, PlanError, UnsupportedModelError
from lit_prune.plan import FORMAT, PruningPlan, get_plan
from lit_prune.surgery.apply import cut

# where a checkpoint holds what its weights need, at its top level, in every save mode
KEY = "lit_prune"
VERSION = 1
ADAPTERS = "adapters"
ADAPTERS_FORMAT = "lit_prune.adapters"


@dataclass(frozen=True)
class SavedPruning:
    """What a Lightning checkpoint says of one pruned model.

    Args:
        model_path: Qualified name of the model in the LightningModule, ``None`` if it is the only one.
        plan: The plan for the model that the run began with; ``None`` if nothing was removed.
        start: Digest of the plan of the model that the run began with, ``None`` if it was dense.
        now: Digest of the plan of the model that the checkpoint's weights belong to.
        state: The callback's whole state, plain data.
    """

    model_path: str | None
    plan: PruningPlan | None
    start: str | None
    now: str | None
    state: Mapping[str, Any]

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SavedPruning:
        """Read a callback's state.

        Raises:
            PlanError: If it is malformed, or its plan was changed after it was saved.
        """
        try:
            digests = state["digests"]
            plan = None if state["plan"] is None else PruningPlan.from_dict(state["plan"])
            saved = cls(state["model_path"], plan, digests["start"], digests["now"], state)
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"The pruning state in the checkpoint is malformed: {type(error).__name__}: {error}."
            ) from error
        if plan is not None:
            # a plan for a dense model is the whole plan; states of older versions say no more
            expected = digests.get("plan", saved.now if saved.start is None else plan.digest())
            if plan.digest() != expected:
                raise _changed(plan, expected)
        return saved

    def plan_for(self, before: PruningPlan | None) -> PruningPlan:
        """The plan, for a model that ``before`` was cut from.

        Raises:
            PlanError: If there is none, or the plan or the model is not the one that the checkpoint's weights belong to.
        """
        if self.plan is None:
            raise PlanError("The checkpoint's weights are of a model that nothing was removed from; it holds no plan.")
        whole = self.plan if before is None else before.compose(self.plan)
        if whole.digest() != self.now:
            raise _changed(whole, self.now)
        return self.plan


def saved_prunings(checkpoint: Mapping[str, Any]) -> list[SavedPruning]:
    """What a Lightning checkpoint says of each model that a pruning callback was for; empty if there was none.

    Raises:
        PlanError: If it is malformed, of a newer version, or a plan in it was changed after it was saved.
    """
    return [SavedPruning.from_state(state) for state in _states(checkpoint, FORMAT)]


def _states(checkpoint: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The states of one format: beside the weights, or, in checkpoints of older versions, among those of callbacks."""
    callbacks = checkpoint.get("callbacks")
    states: Any = callbacks.values() if isinstance(callbacks, Mapping) else ()
    if KEY in checkpoint:
        content = checkpoint[KEY]
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != VERSION:
            raise PlanError(
                f"The checkpoint's entry {KEY!r} has version {version!r}; this lit_prune reads version {VERSION}."
            )
        states = content["states"]
    return [state for state in states if isinstance(state, Mapping) and state.get("format") == kind]


def put_states(checkpoint: dict[str, Any], states: Iterable[Mapping[str, Any]]) -> None:
    """Write states beside the weights of a Lightning checkpoint, where every save mode keeps them."""
    checkpoint[KEY] = {"version": VERSION, "states": list(states)}


def true_to(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pruning callback's state that fits the model's weights: the state, or, if that is of another model, a new one.

    Args:
        model: The model that is being saved.
        state: The state of the callback that is for it.
    """
    plan = get_plan(model)
    now = None if plan is None else plan.digest()
    if state["digests"]["now"] == now:
        return state
    content = None if plan is None else plan.to_dict()
    return {**state, "plan": content, "digests": {"start": None, "now": now, "plan": now}}


def rebuild_from_checkpoint(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Cut the model inside a module as a Lightning checkpoint's model was, so that its weights load.

    For use in a module's own ``on_load_checkpoint``, which makes ``load_from_checkpoint`` work on checkpoints of pruned
    models; within a Trainer the pruning callback sees to it itself. The model is cut as the checkpoint's was, and adapters
    in the checkpoint (from ``LoRARecovery``) are merged into its weights. A checkpoint without pruning changes nothing, nor
    does a model that is cut as the checkpoint says already. All save modes of the Trainer work, weights alone among them.

    Args:
        module: The module, with the model that the run began with somewhere in it.
        checkpoint: The loaded checkpoint; its ``state_dict`` changes if there are adapters to merge.

    Raises:
        ArgumentTypeError: If ``checkpoint`` is not a dictionary (the name of a file, for instance).
        PlanError: If the model is cut in another way than the checkpoint, or its run's first model, was; if the plan was
            changed after it was saved; or if there is no plan and the weights are of a model that was cut.

    Example::

        class MyModule(LightningModule):
            def on_load_checkpoint(self, checkpoint):
                lit_prune.rebuild_from_checkpoint(self, checkpoint)
    """
    if not isinstance(checkpoint, dict):
        raise ArgumentTypeError(
            "checkpoint must be the loaded checkpoint, a dict as torch.load(path, weights_only=True) gives it; found"
            f" {type(checkpoint).__name__}."
        )
    check_weights(module, checkpoint)
    cut_as_saved(module, checkpoint)
    merge_adapters(module, checkpoint)


def check_weights(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that has no plan and weights that only a plan could make fit.

    Only sizes that pruning changes are compared: what else differs (the classes of a head) is the module's own affair.

    Raises:
        PlanError: Naming a weight, its shape in the checkpoint and in the module.
    """
    weights = checkpoint.get("state_dict")
    if not weights or saved_prunings(checkpoint):
        return
    try:
        path, model = find_model(module)
    except UnsupportedModelError:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dims: dict[str, set[int]] = {}
    for part in (part for group_set in find_group_sets(model) for part in group_set.slices):
        dims.setdefault(part.parameter, set()).add(part.dim)
    for name, along in dims.items():
        key = f"{path}.{name}" if path else name
        value, shape = weights.get(key), parameters[name].shape
        if not isinstance(value, Tensor) or value.dim() != len(shape) or value.shape == shape:
            continue
        if all(dim in along for dim in range(len(shape)) if value.shape[dim] != shape[dim]):
            raise PlanError(
                f"The checkpoint holds no pruning plan, and {key!r} has shape {tuple(value.shape)} in it and {tuple(shape)} in"
                " the model: one of the two was pruned. Older versions of lit_prune left the plan out of checkpoints of"
                " weights alone (save_weights_only=True). If there is a plan.json of that run, call"
                " lit_prune.apply_plan(model, lit_prune.PruningPlan.load('plan.json')) before loading; otherwise save the"
                " checkpoint anew, or give the module the model that its weights belong to."
            )


def cut_as_saved(module: nn.Module, checkpoint: Mapping[str, Any], optimizers: Iterable[Optimizer] = ()) -> None:
    """Cut the model inside a module, and optimizers over it, as a Lightning checkpoint says.

    Raises:
        PlanError: If the model is cut in another way than the checkpoint, or its run's first model, was; or if the plan was
            changed after it was saved.
    """
    optimizers = list(optimizers)
    for saved in saved_prunings(checkpoint):
        model = _model_of(module, saved)
        before = get_plan(model)
        found = None if before is None else before.digest()
        if found == saved.now:
            continue
        if saved.plan is None or found != saved.start:
            raise PlanError(
                "The checkpoint belongs to a model that was cut in another way: it was saved with the plan"
                f" {_short(saved.now)}, from a run that began with {_short(saved.start)}; the model given has"
                f" {_short(found)}. Give the model that the run began with."
            )
        cut(model, saved.plan_for(before), optimizers, root=module)


def _model_of(module: nn.Module, saved: SavedPruning) -> nn.Module:
    """The model inside a module that a checkpoint's plan is for."""
    inside = submodule(module, saved.model_path)
    described = saved.plan is not None and saved.plan.groups is None
    # groups that were found by running the model come with the plan
    return find_model(inside)[1] if described or has_groups(inside) else inside


def merge_adapters(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Merge the adapters in a checkpoint's weights, in place, unless the module has adapters to take them."""
    states = [state for state in _states(checkpoint, ADAPTERS_FORMAT) if state["phase"] == ADAPTERS]
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
                delta = _adapter_product(weights, owner)
                transposed = any(owner.endswith(t) for t in states[0]["transposed"])
                value = value + states[0]["scaling"] * (delta.T if transposed else delta)
            name = f"{owner}.{parameter}"
        merged[name] = value
    checkpoint["state_dict"] = merged


def _adapter_product(weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """The product of the two matrices of a layer's adapter: of a linear layer, a convolution or an embedding."""
    embedded = weights.get(f"{layer}.lora_embedding_A.default")
    if embedded is not None:
        return (weights[f"{layer}.lora_embedding_B.default"] @ embedded).T
    first, second = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
    # the kernel of a convolution is in the first, the second is one of a single place
    return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])


def plan_digest(model: nn.Module) -> str | None:
    """Digest of the plan that a model was cut by, ``None`` for a dense one."""
    plan = get_plan(model)
    return None if plan is None else plan.digest()


def _short(digest: str | None) -> str:
    return "no plan (dense)" if digest is None else digest[:12]


def _changed(plan: PruningPlan, expected: str | None) -> PlanError:
    return PlanError(
        f"The plan in the checkpoint was changed after it was saved: its digest is {plan.digest()[:12]}; expected"
        f" {_short(expected)}. The weights belong to another plan; use the checkpoint as it was written."
    )
