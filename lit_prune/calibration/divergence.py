"""How far the logits of one model are from those of another, and what both are run with for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.calibration.token_masks import has_decoder


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""Mean over tokens of :math:`T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(s/T))`, in nats.

    Args:
        student: Logits s, shape ``(..., classes)``; those of 16 bits are compared in float32.
        teacher: Logits t, same shape.
        temperature: T, positive.
        mask: Tokens that count, of the shape of ``student`` without its last dimension; all count under another shape.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    log_student, log_teacher = (
        functional.log_softmax(logits.to(accumulation_dtype(logits.dtype)) / temperature, dim=-1)
        for logits in (student, teacher)
    )
    divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * masked_mean(divergence, mask)


def mixed_loss(loss: Tensor, divergence: Tensor, share: float) -> Tensor:
    """``(1 - share) * loss + share * divergence``."""
    return (1 - share) * loss + share * divergence


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the values that a mask of their shape lets through; of all values if it is ``None`` or of another shape."""
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)


def without_labels(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call for a pass whose logits alone are wanted: labels stay for decoders that read them,
    shifted by one."""
    return {name: value for name, value in arguments.items() if name != "labels" or has_decoder(model)}
