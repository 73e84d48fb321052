"""How far the logits of one model are from those of another, and what both are run with for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    student, teacher = counted(student, mask), counted(teacher, mask)
    return masked_mean(_divergences(student, teacher, temperature), mask)


def output_divergence(
    model: nn.Module, student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """How far logits are from those of another model, in the units of the loss that such logits are trained by.

    That is the squared error where they are numbers (``config.problem_type`` is ``"regression"``, or there is one for each
    position); the mean over labels of the divergence of each label's probability under ``"multi_label_classification"``; else
    :func:`distillation_loss` over the classes. These are the last dimension, or the one after the samples in a map
    of four or more dimensions, like ``(batch, classes, height, width)``.

    Args:
        model: The model, whose ``config`` and output embeddings say what its logits are.
        student: Its logits.
        teacher: Those of the other model, same shape.
        temperature: Temperature of the softmaxes, positive; squared errors have none.
        mask: Positions that count, of the shape of the logits without their classes; all count under another shape.

    Returns:
        A scalar with gradients for ``student``.
    """
    of_classes = gives_classes(model, student)
    student, teacher = _classes_last(model, student), _classes_last(model, teacher)
    student, teacher = counted(student, mask), counted(teacher, mask)
    if not of_classes:
        dtype = accumulation_dtype(student.dtype)
        return masked_mean((student.to(dtype) - teacher.to(dtype)).square().mean(-1), mask)
    if _problem_type(model) == "multi_label_classification":
        # the logit of a label's absence is 0
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher))
        return masked_mean(_divergences(student, teacher, temperature).mean(-1), mask)
    return masked_mean(_divergences(student, teacher, temperature), mask)


def gives_classes(model: nn.Module, logits: Tensor) -> bool:
    """Whether the logits of a model are those of classes or labels; else they are the numbers of a regression."""
    several = logits.dim() > 1 and _classes_last(model, logits).shape[-1] > 1
    return several and _problem_type(model) != "regression"


def _problem_type(model: nn.Module) -> str | None:
    return None if _has_vocabulary(model) else getattr(getattr(model, "config", None), "problem_type", None)


def _has_vocabulary(model: nn.Module) -> bool:
    getter = getattr(model, "get_output_embeddings", None)
    return callable(getter) and getter() is not None


def _classes_last(model: nn.Module, logits: Tensor) -> Tensor:
    return logits.movedim(1, -1) if logits.dim() > 3 and not _has_vocabulary(model) else logits


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence at each position, times the temperature squared."""
    log_student, log_teacher = (
        functional.log_softmax(logits.to(accumulation_dtype(logits.dtype)) / temperature, dim=-1)
        for logits in (student, teacher)
    )
    # a class that cannot be (a logit of -inf) adds 0, where infinities would add 0 * inf
    log_student, log_teacher = (x.clamp_min(torch.finfo(x.dtype).min) for x in (log_student, log_teacher))
    divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)


def mixed_loss(loss: Tensor, divergence: Tensor, share: float) -> Tensor:
    """``(1 - share) * loss + share * divergence``."""
    return (1 - share) * loss + share * divergence


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the values that a mask of their shape lets through; of all values if it is ``None`` or of another shape."""
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum().clamp_min(1)


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Features, shape ``(..., features)``, with 0 at positions that a mask of the shape ``(...)`` leaves out: what is there,
    be it NaN, has then no part in a gradient either."""
    if mask is None or mask.shape != values.shape[:-1]:
        return values
    return torch.where(mask.bool().unsqueeze(-1), values, 0.0)


def without_labels(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call for a pass whose logits alone are wanted: labels stay for decoders that read them,
    shifted by one."""
    return {name: value for name, value in arguments.items() if name != "labels" or has_decoder(model)}
