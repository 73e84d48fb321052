"""Multiplying parameters with an orthogonal matrix along one dimension, and what optimizers remember of them likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import OptimizerStateError
from lit_prune.surgery.optimizer_search import is_lbfgs, states
from lit_prune.surgery.optimizer_state import _MIRROR_COSINE, _likeness, _state_of, reset_histories
from lit_prune.surgery.state_entries import tensors_in


@dataclass(frozen=True, eq=False)
class Turn:
    """What a parameter is multiplied with.

    Args:
        parameter: Its name.
        dim: The dimension of the hidden channels.
        directions: An orthogonal matrix with the new directions as columns; ``None`` for a parameter that becomes constant.
        scale: What the channels are multiplied with first, shape ``(channels,)``; nothing if ``None``.
        constant: What a parameter without directions becomes: a norm whose scale went elsewhere.
    """

    parameter: str
    dim: int
    directions: Tensor | None
    scale: Tensor | None = None
    constant: float = 1.0


def check_turnable(model: nn.Module, optimizers: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse state of optimizers that cannot be turned: of another shape than the parameter, or a mirror of its weights.

    Args:
        model: The model.
        optimizers: All optimizers.
        names: Names of the parameters that are to be turned.

    Raises:
        OptimizerStateError: Naming optimizer, parameter and state key.
    """
    advice = "Rotate before training begins, while the optimizer has no state yet, or leave rotate_hidden out."
    for optimizer in optimizers:
        for attribute, mapping in () if is_lbfgs(optimizer) else states(optimizer):
            for name in names:
                parameter = model.get_parameter(name)
                for found in tensors_in(_state_of(mapping, parameter)):
                    if found.value.numel() == 1:
                        continue
                    what = f"{type(optimizer).__name__} {attribute} {found} of {name!r}"
                    if found.value.shape != parameter.shape or not found.value.is_floating_point():
                        raise OptimizerStateError(
                            f"{what} has shape {tuple(found.value.shape)} and type {found.value.dtype}, the parameter"
                            f" {tuple(parameter.shape)}: it cannot be turned with hidden states. {advice}"
                        )
                    if parameter.dim() > 1 and _likeness(found.value, parameter.detach())[0] >= _MIRROR_COSINE:
                        raise OptimizerStateError(
                            f"{what} mirrors the weights (averages, slow weights), not gradients: it would be turned otherwise."
                            f" {advice}"
                        )


def turn_parameter(model: nn.Module, turn: Turn, optimizers: Sequence[Any], journal: list[Callable[[], None]]) -> None:
    """Turn a parameter, in place, and what optimizers remember of its gradients.

    Args:
        model: The model.
        turn: What to multiply with.
        optimizers: All optimizers.
        journal: Takes what undoes each step.
    """
    parameter = model.get_parameter(turn.parameter)
    reset_histories(optimizers, {id(parameter)}, journal)
    done: set[int] = set()
    for optimizer in optimizers:
        for _, mapping in () if is_lbfgs(optimizer) else states(optimizer):
            for found in tensors_in(_state_of(mapping, parameter)):
                value = found.value
                if value.numel() > 1 and id(value) not in done:
                    done.add(id(value))
                    if turn.directions is None:
                        # it has other units now, and gradients of its own
                        _write(value, value * 0, journal)
                    else:
                        _write(value, _turned_state(value, turn), journal)
    gradient = parameter.grad
    journal.append(lambda: setattr(parameter, "grad", gradient))
    parameter.grad = None
    if turn.directions is None:
        _write(parameter, torch.full_like(parameter, turn.constant), journal)
        return
    whole = parameter.detach().double().movedim(turn.dim, -1)
    if turn.scale is not None:
        whole = whole * turn.scale.to(whole)
    _write(parameter, (whole @ turn.directions.to(whole)).movedim(-1, turn.dim), journal)


def _turned_state(value: Tensor, turn: Turn) -> Tensor:
    """What is remembered of gradients: turned if it has signs, and if not, a mean of squares, with squares."""
    assert turn.directions is not None
    whole = value.detach().double().movedim(turn.dim, -1)
    signed = bool((whole < 0).any())
    # a gradient by weights that took up a scale is smaller by it
    scale = None if turn.scale is None else turn.scale.to(whole)
    directions = turn.directions.to(whole)
    if scale is not None:
        safe = torch.where(scale == 0, 1.0, scale)
        whole = torch.where(scale == 0, 0.0, whole / (safe if signed else safe.square()))
    return (whole @ (directions if signed else directions.square())).movedim(-1, turn.dim)


def _write(tensor: Tensor, values: Tensor, journal: list[Callable[[], None]]) -> None:
    """Give a tensor object other values; it is the object that is undone, whatever its size is in between."""
    before = tensor.detach().cpu().clone()

    def undo() -> None:
        tensor.copy_(before)

    journal.append(undo)
    tensor.copy_(values)
