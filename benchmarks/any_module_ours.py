"""lit_prune on one row of benchmarks/any_module.py, with nothing but a batch and a loss."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from any_module_checks import compare, train_one_step
from any_module_models import Row
from torch import nn

from lit_prune import (
    PruningConfig,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    find_model,
    get_plan,
    prune,
)
from lit_prune.architectures.tracing import trace_groups
from lit_prune.errors import first_line
from lit_prune.groups import GroupSet, count_parameters, count_removed


def our_row(row: Row, ratio: float, deadline: float) -> dict[str, Any]:
    """Prune a row to a ratio, and check the result.

    Args:
        row: The model.
        ratio: Share of all parameters to remove.
        deadline: Not used: nothing here is tried twice.

    Returns:
        ``prunable`` (share of the parameters that belong to groups), ``sets``, ``before``, ``after``, ``removed``; relative
        errors of the pruned model to the masked dense one (``masked``) and of the one rebuilt from plan and state dict to the
        pruned one (``resumed``); whether the ``optimizer`` followed, and whether a ``step`` of training ran. Where something
        fails ``error`` says what, and ``stage`` where.
    """
    found: dict[str, Any] = {}
    begin = time.monotonic()
    try:
        _measure(row, ratio, found)
    except Exception as error:
        found["error"] = first_line(error)
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def _measure(row: Row, ratio: float, found: dict[str, Any]) -> None:
    found["stage"] = "groups"
    model, batch = row.make()
    dense = copy.deepcopy(model)
    group_sets = _group_sets(row, copy.deepcopy(model), batch)
    before = count_parameters(model)
    belong = count_removed(_described(model), group_sets, [torch.arange(s.size) for s in group_sets])
    found.update(prunable=belong / before, sets=len(group_sets), before=before, stage="prune")
    optimizer = _with_mirrors(model)
    config = PruningConfig(
        pruning_ratio=ratio,
        importance="magnitude",
        repair=None,
        recalibrate_batch_norm=False,
        iterations=1,
        compensation=False,
    )
    prune(model, [batch], lambda one: row.loss(row.forward(model, one), one), config, [optimizer])
    plan = get_plan(_described(model))
    if plan is None:
        raise RuntimeError("the model has no plan after prune")
    after = count_parameters(model)
    found.update(after=after, removed=1 - after / before, stage="forward")
    with torch.no_grad():
        outputs = row.forward(model, batch)
        found["stage"] = "masked"
        mask(_described(dense), plan, group_sets)
        found["masked"] = compare(row.forward(dense, batch), outputs)
        found["stage"] = "resume"
        found["resumed"] = compare(outputs, row.forward(_rebuilt(row, model, plan), batch))
    found["stage"] = "optimizer"
    found["optimizer"] = _follows(model, optimizer)
    found["stage"] = "step"
    train_one_step(row, model, batch, optimizer)
    found["step"] = True
    del found["stage"]


def _described(model: nn.Module) -> nn.Module:
    """The model that the names of groups are relative to: the one inside that a description fits, or else the whole."""
    try:
        return find_model(model)[1]
    except UnsupportedModelError:
        return model


def _group_sets(row: Row, model: nn.Module, batch: Any) -> Sequence[GroupSet]:
    """The groups that a description gives, or else a run."""
    try:
        return find_group_sets(model)
    except UnsupportedModelError:
        return trace_groups(model, lambda: row.loss(row.forward(model, batch), batch)).group_sets


def _with_mirrors(model: nn.Module) -> torch.optim.Optimizer:
    """SGD whose momentum is a copy of the weights, so that a cut that treats the two differently shows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    return optimizer


def _follows(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the momentum of every parameter is still equal to it, and the optimizer has all parameters and no others."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    buffers = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
    return held == {id(p) for p in buffers} and all(torch.equal(p, b) for p, b in buffers.items())


@torch.no_grad()
def mask(dense: nn.Module, plan: PruningPlan, group_sets: Sequence[GroupSet]) -> None:
    """Set to zero what reads the groups that a plan removes.

    Args:
        dense: The model that the plan is for; changed in place.
        plan: The plan.
        group_sets: The model's group sets.
    """
    by_key = {s.key: s for s in group_sets}
    for entry in plan.group_entries:
        group_set = by_key[entry.key]
        removed = group_set.kept_to_removed(entry.kept)
        for part in group_set.masked:
            dense.get_parameter(part.parameter).index_fill_(part.dim, part.index[removed].flatten(), 0.0)


def _rebuilt(row: Row, model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A fresh dense model, cut by a plan that was written and read, with the state dict of the pruned one."""
    fresh = row.make()[0]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    apply_plan(fresh, PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))))
    fresh.load_state_dict(model.state_dict())
    return fresh
