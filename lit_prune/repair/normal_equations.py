"""The normal equations of one regression, added up over the calls of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.calibration.gram import Gram, add_product, real_rows
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.repair.influence import influence


class NormalEquations:
    """Products of inputs with each other, and of what is wanted with the inputs, in float32 or wider.

    Args:
        batch_dim: The dimension that the sequences of a call lie along.
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self._batch_dim = batch_dim
        self._gram: Gram | None = None
        self._cross = torch.empty(0, dtype=torch.float32)
        self._tokens = torch.empty(0, dtype=torch.float64)

    def add(self, inputs: Tensor, wanted: Tensor, mask: Tensor | None) -> None:
        """Add the tokens of one call.

        Args:
            inputs: Shape ``(..., inputs)``.
            wanted: Shape ``(..., outputs)``.
            mask: True for tokens that count; all do if it is ``None``.
        """
        a, count = real_rows(inputs, mask)
        b, _ = real_rows(wanted, mask)
        if self._gram is None:
            wide = accumulation_dtype(wanted.dtype)
            self._gram = Gram(a.shape[1], a.device, wide)
            self._cross = torch.zeros(b.shape[1], a.shape[1], device=a.device, dtype=wide)
            self._tokens = torch.zeros((), dtype=torch.float64, device=a.device)
        if wanted.dim() > 2:
            scale = influence(wanted, mask, self._batch_dim).reshape(-1, 1)
            a, b = a * scale.to(a.dtype), b * scale
        self._gram.add(a)
        add_product(self._cross, b, a)
        self._tokens += count

    def reduced(self, all_reduce: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the products of the inputs, those with what is wanted, and the number of tokens, over all processes.

        Args:
            all_reduce: Sums a tensor over the processes, if there are several.

        Returns:
            Tensors of shapes ``(inputs, inputs)``, ``(outputs, inputs)`` and ``()``.
        """
        assert self._gram is not None
        values = self._gram.matrix, self._cross, self._tokens
        if all_reduce is None:
            return values
        gram, cross, tokens = values
        return all_reduce(gram), all_reduce(cross), all_reduce(tokens)
