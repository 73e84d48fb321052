"""The teacher of a distillation: told apart from others, frozen and run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.plan import get_plan
from lit_prune.torch_internals import tree_map


def fingerprint(model: nn.Module) -> str:
    """What tells the weights of a model from those of another: a digest of every tensor's shape, sum and norm."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            # the extra state of a module
            continue
        tensor = value if value.is_floating_point() or value.is_complex() else value.double()
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        total, norm = tensor.sum(dtype=dtype).item(), torch.linalg.vector_norm(tensor, dtype=dtype).item()
        digest.update(f"{name} {tuple(tensor.shape)} {total} {norm}\n".encode())
    return digest.hexdigest()


def frozen(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return a model in evaluation mode whose parameters are not trained, on a device.

    Args:
        model: The model, which is changed in place.
        device: Where to.
        dtype: Data type of its weights; the model's own if ``None``. Buffers that are no part of its state (tables of
            frequencies, for instance) are not rounded to 16 bits.
    """
    for parameter in model.parameters():
        parameter.grad = None
    model.requires_grad_(False).eval().to(device=device)
    if dtype is None or dtype.itemsize > 2:
        return model.to(dtype=dtype)
    for tensor in (*model.parameters(), *model.state_dict(keep_vars=True).values()):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


@torch.no_grad()
def run_teacher(teacher: nn.Module, dtype: torch.dtype | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the output of a frozen model, given the arguments of a model of perhaps another data type.

    Args:
        teacher: The model.
        dtype: What :func:`frozen` was given.
        args: Positional arguments of the forward.
        kwargs: Its other arguments.
    """
    if dtype is None:
        return teacher(*args, **kwargs)
    args, kwargs = tree_map(
        lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value,
        (args, kwargs),
    )
    device = next(teacher.parameters()).device.type
    # where a table of more bits meets weights of 16
    with torch.autocast(device, dtype) if dtype.itemsize == 2 else contextlib.nullcontext():
        return teacher(*args, **kwargs)


def taught_layers(student: nn.Module, teacher: nn.Module, layers: int) -> list[int]:
    """Which of the teacher's layers every layer of the student learns from: the one it was, and the last one the last."""
    kept = [{e.name: e.kept for e in plan.blocks} if (plan := get_plan(m)) else {} for m in (student, teacher)]
    if kept[0] == kept[1]:
        return list(range(layers))
    ((stack, ours),) = kept[0].items()
    theirs = kept[1].get(stack, tuple(range(layers)))
    return [*(theirs.index(layer) for layer in ours[:-1]), layers - 1]


def hidden_states(output: Any) -> Sequence[Tensor]:
    """The hidden states after each layer, those of the decoder if there are two stacks."""
    name = "decoder_hidden_states" if hasattr(output, "decoder_hidden_states") else "hidden_states"
    return getattr(output, name)[1:]
