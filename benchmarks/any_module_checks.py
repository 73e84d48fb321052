"""What both columns of benchmarks/any_module.py measure: differences of outputs, and one training step."""

from __future__ import annotations

from typing import Any

import torch
from any_module_models import Row, float_leaves
from torch import nn

__all__ = ["compare", "float_leaves", "train_one_step"]


def compare(expected: Any, found: Any) -> float:
    """Largest difference of any output, relative to the largest value of that output; infinite if shapes differ."""
    worst = 0.0
    for left, right in zip(float_leaves(expected), float_leaves(found), strict=True):
        if left.shape != right.shape:
            return float("inf")
        scale = left.abs().max().clamp(min=torch.finfo(left.dtype).tiny)
        error = float((left - right).abs().max() / scale)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def train_one_step(row: Row, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None = None) -> float:
    """One step of SGD with momentum in training mode; gives the loss.

    Raises:
        RuntimeError: If the loss is not finite, or nothing has a gradient.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    training = model.training
    model.train()
    optimizer.zero_grad()
    loss = row.loss(row.forward(model, batch), batch)
    loss.backward()
    if not torch.isfinite(loss) or all(p.grad is None for p in model.parameters()):
        raise RuntimeError(f"the training step gave a loss of {float(loss.detach())} and no finite gradients")
    optimizer.step()
    model.train(training)
    return float(loss.detach())
