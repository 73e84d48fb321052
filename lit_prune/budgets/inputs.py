"""What a model is called with where a budget runs it on a batch of the user's: its times are those of that batch."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.budgets.running import running_modules
from lit_prune.budgets.workloads import Workload
from lit_prune.calibration.precision import Precision
from lit_prune.torch_internals import tree_leaves


@dataclass(frozen=True)
class Inputs:
    """What one forward pass of a workload gives a model.

    Args:
        digest: Of the shapes and data types of all tensors; ``None`` where token ids are made up, which the number of
            sequences and their length describe.
        autocast: The data type that autocast computes in, ``None`` if it is off.
    """

    digest: str | None
    autocast: str | None


def inputs_of(workload: Workload) -> Inputs:
    """Learn what a model is called with, from one forward pass unless token ids are made up.

    Where a loss function calls parts of the model in place of the model, it is what those parts are called with.
    """
    device = next(workload.model.parameters()).device
    if workload.tokens:
        return Inputs(None, _autocast(device))
    called: list[Any] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not running:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            called.append([_autocast(device), [[list(x.shape), str(x.dtype)] for x in tensors]])

    with contextlib.ExitStack() as hooks:
        for module in workload.model.modules():
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        running = hooks.enter_context(running_modules(workload.model))
        workload.forward()
    digest = hashlib.sha256(json.dumps([shapes for _, shapes in called]).encode()).hexdigest()
    return Inputs(digest[:16], called[0][0] if called else None)


def _autocast(device: torch.device) -> str | None:
    dtype = Precision.current(device).autocast
    return None if dtype is None else str(dtype).removeprefix("torch.")
