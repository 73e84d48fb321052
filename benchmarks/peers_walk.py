"""What the peers share that change a Llama layer by layer: the walk over the layers, covariances, and matrix roots.

They leave the matrices at their size, with rows and columns that are zero where the method would remove them, and say how
many parameters the method would store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 0.01


class _Stop(Exception):
    """Ends a forward pass before the first layer."""


def stored_parameters(model: nn.Module, count: int) -> nn.Module:
    """Say how many parameters a method stores for a model whose matrices still have their full size."""
    model.stored_parameters = count
    return model


@torch.no_grad()
def walk(model: Any, batches: Sequence[Tensor]) -> Iterator[tuple[Any, list[Tensor], dict[str, Any]]]:
    """Every decoder layer with its inputs, which have gone through the layers before it as they are when it is reached.

    Yields:
        The layer, its inputs (a list of tensors of shape (batch, tokens, hidden size)) and its other arguments. The layer may be
        changed, or replaced in ``model.model.layers``, before the next one is asked for.
    """
    states, arguments = _first_inputs(model, batches)
    for position in range(len(model.model.layers)):
        yield model.model.layers[position], states, arguments
        layer = model.model.layers[position]
        states = [layer(x, **arguments) for x in states]


def _first_inputs(model: Any, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    states: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def keep(layer: nn.Module, given: tuple[Any, ...], others: dict[str, Any]) -> None:
        states.append(given[0])
        arguments.update(others)
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model.model(input_ids=batch, use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return states, arguments


@torch.no_grad()
def covariance(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of outer products over all tokens, in float64: shape (features, features)."""
    features = tensors[0].shape[-1]
    total = torch.zeros(features, features, dtype=torch.float64)
    for x in tensors:
        flat = x.reshape(-1, features)
        total += (flat.T @ flat).double()
    return total


@torch.no_grad()
def inputs_of(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """What a module read while something ran."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, given: found.append(given[0]))
    try:
        run()
    finally:
        handle.remove()
    return found


def damped(matrix: Tensor, share: float = RIDGE) -> Tensor:
    """A matrix with a share of its mean diagonal added to the diagonal."""
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def root(matrix: Tensor, power: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(values.max() * 1e-12) ** power) @ vectors.T
