"""The teacher of a distillation: told apart from others, frozen and run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.plan import get_plan


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
        dtype: Data type; the model's own if ``None``.
    """
    for parameter in model.parameters():
        parameter.grad = None
    return model.requires_grad_(False).eval().to(device=device, dtype=dtype)


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
