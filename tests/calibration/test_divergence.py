"""Divergences of logits: what is not counted has no part in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_prune.calibration.divergence import distillation_loss, output_divergence
from lit_prune.callbacks.distillation import hidden_state_loss


class Model(nn.Module):
    """Says what kind of logits it gives."""

    def __init__(self, problem_type):
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem_type)


LOSSES = {
    "classes": lambda s, t, mask: distillation_loss(s, t, 2.0, mask),
    "classes of a model": lambda s, t, mask: output_divergence(Model(None), s, t, 2.0, mask),
    "labels": lambda s, t, mask: output_divergence(Model("multi_label_classification"), s, t, 2.0, mask),
    "numbers": lambda s, t, mask: output_divergence(Model("regression"), s, t, 2.0, mask),
    "hidden states": lambda s, t, mask: hidden_state_loss([s], [t], mask),
}


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_at_padding_has_no_part_in_a_loss_and_its_gradient(loss, padding):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = []
    for value in (0.0, padding):
        student, teacher = torch.randn(2, 2, 3, 4, generator=generator.manual_seed(1))
        student, teacher = (torch.where(mask.bool()[..., None], x, value).requires_grad_() for x in (student, teacher))
        result = LOSSES[loss](student, teacher, mask)
        found.append((result.detach(), *torch.autograd.grad(result, student)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("barred", ["both", "teacher"])
def test_classes_that_cannot_be_add_nothing(barred):
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    more = [torch.cat([x, torch.full((5, 1), -float("inf"))], dim=1).requires_grad_() for x in (student, teacher)]
    if barred == "teacher":
        more[0] = torch.cat([student, torch.full((5, 1), -100.0)], dim=1).requires_grad_()
    loss, expected = distillation_loss(*more), distillation_loss(student.requires_grad_(), teacher)
    torch.testing.assert_close(loss, expected)
    (gradient,), (wanted,) = torch.autograd.grad(loss, more[0]), torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient[:, :4], wanted)
    assert (gradient[:, 4] == 0).all() or barred == "teacher"
    assert gradient.isfinite().all()
