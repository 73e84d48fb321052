"""Running a model for what it computes: without dropout, and through its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off; modules that checkpoint activations keep the flag that makes them do so."""
    modes = [(module, module.training) for module in model.modules()]
    # torch.nn's transformers have one that packs padded batches and calls no modules
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, training in modes:
            module.training = training and bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
