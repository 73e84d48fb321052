"""The normal equations of one regression, added up over the calls of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.calibration.gram import Gram, add_product, real_rows
from lit_prune.calibration.precision import accumulation_dtype

# in median lengths of what is wanted
_LONGEST = 3.0


class NormalEquations:
    """Products of inputs with each other, and of what is wanted with the inputs, in float32 or wider."""

    def __init__(self) -> None:
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
            scale = _influence(wanted, mask).reshape(-1, 1)
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


def _influence(wanted: Tensor, mask: Tensor | None) -> Tensor:
    """What to multiply tokens by, so that none counts for more than one a few times as long as the median of its sequence.

    A few tokens (the first of a sequence, separators) hold values that are tens of times those of the others and that the next
    norm takes out again; fitted as they are, they decide the weights that all other tokens are computed with.

    Args:
        wanted: Shape ``(..., tokens, outputs)``.
        mask: As of :meth:`NormalEquations.add`.

    Returns:
        Shape ``(..., tokens, 1)``.
    """
    lengths = wanted.to(accumulation_dtype(wanted.dtype)).norm(dim=-1, keepdim=True)
    counted = lengths
    if mask is not None and mask.shape == wanted.shape[:-1]:
        counted = lengths.masked_fill(~mask[..., None], torch.nan)
    limit = _LONGEST * counted.nanmedian(dim=-2, keepdim=True).values
    # a sequence that is all padding has no median
    return torch.where((lengths > limit) & (limit > 0), limit / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0)
