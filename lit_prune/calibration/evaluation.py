"""Running a model for what it computes: without dropout, and through its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

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
def only_trained(root: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Let these parameters of a module require gradients and no others, so that no graph is built for those; undone at the
    end."""
    wanted = {id(p) for p in trained}
    flags = [(p, p.requires_grad) for p in root.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and caches.

    Modules that checkpoint activations do so in training mode only, and stay in it; the rates of dropout and of skipped layers
    that they and their configurations have are 0 meanwhile.
    """
    modes = [(module, module.training) for module in model.modules()]
    # torch.nn's transformers have one that packs padded batches and calls no modules
    fast = torch.backends.mha.get_fastpath_enabled()
    rates: list[tuple[dict[str, Any], str, float]] = []
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, training in modes:
            module.training = training and bool(getattr(module, "gradient_checkpointing", False))
            if module.training:
                rates += [(attributes, name, attributes[name]) for attributes, name in _drop_rates(module)]
        for attributes, name, _ in rates:
            attributes[name] = 0.0
        with without_caches(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
        for attributes, name, rate in rates:
            attributes[name] = rate


def _drop_rates(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    for owner in (module, getattr(module, "config", None)):
        attributes = getattr(owner, "__dict__", {})
        yield from ((attributes, name) for name, value in attributes.items() if "drop" in name and type(value) is float)
