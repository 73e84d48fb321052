"""Refits experts that are modules of their own: each sees the tokens that a router sends it, and no others.

As with experts whose weights are one tensor, each is refitted by itself, in the stream of the model as pruned so far, to
what it gives there with all its channels; it does not make up for errors before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import before_layer
from lit_prune.calibration.gram import Gram, add_product
from lit_prune.calibration.precision import accumulation_dtype, transposed_product
from lit_prune.groups import GroupSet
from lit_prune.plan import PruningPlan
from lit_prune.repair.calls import BlockCall
from lit_prune.repair.regression import _relative, ridge


class _Equations:
    """The normal equations of one consumer's weight on the inputs that stay, added up over its calls."""

    def __init__(self, weight: Tensor, kept: Tensor) -> None:
        self._weight, self._kept = weight.to(accumulation_dtype(weight.dtype)), kept.to(weight.device)
        self._gram = Gram(len(kept), self._weight.device, self._weight.dtype)
        self.cross = self._weight.new_zeros(len(weight), len(kept))
        self.tokens = self._weight.new_zeros(())

    def __call__(self, _: nn.Module, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).to(self._weight)
        stays = x[:, self._kept]
        self._gram.add(stays)
        add_product(self.cross, self._weight.T, transposed_product(x, stays))
        self.tokens += len(x)

    @property
    def gram(self) -> Tensor:
        """The products of the inputs with each other."""
        return self._gram.matrix


@torch.no_grad()
def refit_routed(
    group_sets: Sequence[GroupSet],
    name: str,
    whole: nn.Module,
    smaller: nn.Module,
    plan: PruningPlan,
    inputs: Iterable[Tensor],
    calls: Sequence[BlockCall],
    damping: float,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """Refit the consumers of routed modules in a block, an ``nn.Linear`` each.

    Args:
        group_sets: The sets of these modules that the plan cuts.
        name: Qualified name of the block within the model.
        whole: A copy of the block, cut and repaired but for these sets.
        smaller: The block, cut and repaired; the consumers' weights are changed in place.
        plan: The plan for the model.
        inputs: Hidden states that the block is called with in the pruned model, each ``(batch, tokens, hidden)``.
        calls: Further arguments of each call.
        damping: As for :func:`lit_prune.repair.refit.least_squares`.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        The names within the block of the parameters that were refitted. A module that no token was sent to keeps its weights.
    """
    kept = {e.key: torch.tensor(e.kept, dtype=torch.long) for e in plan.entries}
    equations: dict[str, _Equations] = {}
    with contextlib.ExitStack() as stack:
        for group_set in group_sets:
            for part in group_set.repairable:
                path = part.module.removeprefix(f"{name}.")
                module = whole.get_submodule(path)
                stays = part.index[kept[group_set.key]].flatten()
                equations[path] = _Equations(module.get_parameter("weight"), stays)
                stack.callback(before_layer(module, equations[path]).remove)
        for x, call in zip(inputs, calls, strict=True):
            call.run(whole, x)
    refitted = []
    for path, system in equations.items():
        gram, cross, tokens = system.gram, system.cross, system.tokens
        if all_reduce is not None:
            gram, cross, tokens = all_reduce(gram), all_reduce(cross), all_reduce(tokens)
        if float(gram.diagonal().sum()) > 0:
            weight = smaller.get_parameter(f"{path}.weight")
            weight.copy_(ridge(gram, cross, weight, _relative(damping, gram, tokens)))
            refitted.append(f"{path}.weight")
    return refitted
