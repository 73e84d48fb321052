"""Gram matrices of what the consumers of groups read, added up over the calls of decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_prune.calibration.gram import Gram, real_rows
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.groups import BLOCK, GroupSet, Slice


@dataclass
class ConsumerGrams:
    """Gram matrices of the inputs of some projections, by path.

    Attributes:
        grams: The products of the inputs with each other, shape ``(inputs, inputs)``, in float32 or more.
        tokens: How many tokens they are of, float64.
    """

    grams: dict[str, Gram] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def add(self, path: str, inputs: Tensor, mask: Tensor | None) -> None:
        """Add the inputs of one call.

        Args:
            path: Path of the projection.
            inputs: What it read, shape ``(..., inputs)``.
            mask: The tokens that count, of the shape of ``inputs`` without its last dimension; all of them if it is of
                another shape (some layers give their projections some tokens only).
        """
        rows, count = real_rows(inputs, mask)
        if path not in self.grams:
            self.grams[path] = Gram(rows.shape[1], rows.device, accumulation_dtype(rows.dtype))
            self.tokens[path] = torch.zeros((), dtype=torch.float64, device=rows.device)
        self.grams[path].add(rows)
        self.tokens[path] += count

    def take(
        self, path: str, weight: Tensor, dim: int, all_reduce: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the matrix of a projection and its number of tokens, over all processes; they are not kept.

        Args:
            path: Path of the projection; if it was never called, there are zeros.
            weight: Its weight.
            dim: The dimension of the weight that its inputs lie along.
            all_reduce: Sums a tensor over the processes.
        """
        gram = self.grams.pop(path, None)
        if gram is None:
            gram = Gram(weight.shape[dim], weight.device, accumulation_dtype(weight.dtype))
        tokens = self.tokens.pop(path, torch.zeros((), dtype=torch.float64, device=weight.device))
        if all_reduce is not None:
            gram.replace(all_reduce)
            tokens = all_reduce(tokens)
        return gram.matrix, tokens


def observable_consumers(group_sets: Sequence[GroupSet]) -> dict[str, dict[str, list[tuple[GroupSet, Slice]]]]:
    """The consumers of groups in decoder layers, by layer and by the path of the module: the sets that they read.

    Returns:
        Nothing if the inputs of some cannot be observed.
    """
    scored = [s for s in group_sets if s.kind != BLOCK]
    if not all(s.block and s.consumers and len(s.repairable) == len(s.consumers) for s in scored):
        return {}
    found: dict[str, dict[str, list[tuple[GroupSet, Slice]]]] = {}
    for group_set in scored:
        for part in group_set.repairable:
            found.setdefault(group_set.block, {}).setdefault(part.module, []).append((group_set, part))
    return found


def gram_bytes(model: nn.Module, group_sets: Sequence[GroupSet]) -> int:
    """Number of bytes that the matrices of all consumers take."""
    total = 0
    for of_block in observable_consumers(group_sets).values():
        for uses in of_block.values():
            weight, part = model.get_parameter(uses[0][1].parameter), uses[0][1]
            total += weight.shape[part.dim] ** 2 * accumulation_dtype(weight.dtype).itemsize
    return total
