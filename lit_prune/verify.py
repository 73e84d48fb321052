"""Checks a description of an architecture against a model: what is cut has to be what zeros would have silenced."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_prune.architectures import find_group_sets, find_model
from lit_prune.architectures.layers import passed_over
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import BLOCK, stack_of
from lit_prune.plan import PruningPlan
from lit_prune.surgery.apply import apply_plan


@torch.no_grad()
def verify_architecture(model: nn.Module, forward: Callable[[nn.Module], Tensor], tolerance: float = 1e-4) -> list[str]:
    """Check a description: remove a group of every group set in turn, and compare with the dense model whose group is
    set to zero.

    If whole blocks can be removed, each is removed in turn, too, and compared with the dense model that skips it.

    Use a small model with random weights: the model is copied twice for every group set. Groups whose removal is not
    equal to zeros (experts, which a router with a zero row can still choose; heads under a norm over all heads) are not
    checked.

    Args:
        model: The model, or a module that holds it; it is not changed.
        forward: Runs a copy of ``model`` on a fixed input and gives its output.
        tolerance: Largest difference, relative to the largest absolute output.

    Returns:
        Names of the group sets that were checked.

    Raises:
        UnsupportedModelError: If the outputs differ, or the smaller model does not run; the message names the group set.
    """
    try:
        group_sets = find_group_sets(model, blocks=True)
    except UnsupportedModelError:
        group_sets = find_group_sets(model)
    blocks = [s.name for s in group_sets if s.kind == BLOCK]
    counting = sum(s.counts_tokens for s in group_sets)
    checked = []
    for position, group_set in enumerate(group_sets):
        whole = group_set.kind == BLOCK
        if group_set.size - group_set.equal_parts < max(group_set.minimum, 1) and not whole:
            continue
        if whole and sum(stack_of(b)[0] == stack_of(group_set.name)[0] for b in blocks) < 2:
            continue
        if group_set.counts_tokens and counting == 1:
            continue
        group = group_set.size // 2
        removed = group_set.removed_with(group)
        zeroed, smaller = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        inner = find_model(zeroed)[1]
        for part in () if whole else group_set.slices:
            inner.get_parameter(part.parameter).index_fill_(part.dim, part.index[list(removed)].flatten(), 0.0)
        kept = [[g for g in range(s.size) if n != position or g not in removed] for n, s in enumerate(group_sets)]
        apply_plan(smaller, PruningPlan.from_kept(group_sets, kept))
        with passed_over(inner, [group_set.name] if whole else ()):
            expected = forward(zeroed)
        where = f"{group_set.name} ({group_set.kind}), group {group} of {group_set.size}"
        try:
            found = forward(smaller)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise UnsupportedModelError(
                f"Without {where}, the model does not run: {error}. Does its forward take sizes (or the number of blocks) from"
                " an attribute that the description does not name, or from the width of its input?"
            ) from error
        difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= tolerance * scale:
            raise UnsupportedModelError(
                f"Without {where}, the output differs by {difference:.3g} from that of the dense model whose"
                f" {'block is passed over' if whole else 'group is set to zero'} (largest output {scale:.3g}). Do"
                f" {'depth' if whole else 'layout, head_dim and the named projections'} fit the forward?"
            )
        checked.append(group_set.name)
    return checked
