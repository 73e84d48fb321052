"""Running a model for what it computes: without dropout, and through its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

from lit_prune.architectures.caches import without_caches

_OBSERVED: ContextVar[bool] = ContextVar("lit_prune_observed", default=True)


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Run a model for something that is no part of a calibration batch: what observes its modules takes no note of it."""
    token = _OBSERVED.set(False)
    try:
        yield
    finally:
        _OBSERVED.reset(token)


def is_observed() -> bool:
    """Whether a forward pass is part of a calibration batch, and not within :func:`unobserved`."""
    return _OBSERVED.get()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and caches; modules that checkpoint activations keep the flag that makes them do so."""
    modes = [(module, module.training) for module in model.modules()]
    # torch.nn's transformers have one that packs padded batches and calls no modules
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, training in modes:
            module.training = training and bool(getattr(module, "gradient_checkpointing", False))
        with without_caches(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
