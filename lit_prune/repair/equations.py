"""Normal equations of one layer, added up in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_prune.calibration.gram import Gram, add_product
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.calibration.reduce import piece_size
from lit_prune.repair.regression import _relative, ridge

# of products in float32
_ROUNDING = 1e-5


class Equations:
    """The products of a layer's inputs with each other and with what it should give, over rows.

    Products of a piece of rows are computed in float32 (float64 if the rows are), and added up in float64.

    Args:
        inputs: Number of inputs of a row.
        outputs: Number of outputs.
        layer: The layer; the sums are where its weight is.
    """

    def __init__(self, inputs: int, outputs: int, layer: nn.Module) -> None:
        device = next(layer.parameters()).device
        # Apple's devices have no float64
        precision = torch.float32 if device.type == "mps" else torch.float64
        self._gram = Gram(inputs, device, precision)
        self.cross = torch.zeros(outputs, inputs, dtype=precision, device=device)
        self.input_sum = torch.zeros(inputs, dtype=precision, device=device)
        self.output_sum = torch.zeros(outputs, dtype=precision, device=device)
        self.rows = torch.zeros((), dtype=precision, device=device)
        # of the squares of what rows are multiplied by
        self.counted = torch.zeros((), dtype=precision, device=device)
        self._usable = True

    def give_up(self) -> None:
        """Let the layer keep its weights."""
        self._usable = False

    def add(self, inputs: Tensor, outputs: Tensor, influence: Tensor | None = None) -> None:
        """Add rows.

        Args:
            inputs: Shape ``(rows, inputs)``.
            outputs: Shape ``(rows, outputs)``.
            influence: What to multiply each row by, shape ``(rows, 1)``; ones if ``None``.
        """
        step = max(1, piece_size(inputs.device) // max(1, inputs.shape[1]))
        precision = accumulation_dtype(inputs.dtype)
        for first in range(0, len(inputs), step):
            piece = slice(first, first + step)
            scale = None if influence is None else influence[piece].to(precision)
            a, b = (_scaled(x[piece].to(precision), scale) for x in (inputs, outputs))
            self._gram.add(a)
            add_product(self.cross, b, a)
            self.input_sum += _scaled(a, scale).sum(dim=0)
            self.output_sum += _scaled(b, scale).sum(dim=0)
            self.counted += len(a) if scale is None else scale.square().sum()
            self.rows += len(a)

    def add_up(self, all_reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Add up what several processes have; no rows are left if one of them gave up."""
        usable = torch.tensor(int(not self._usable))
        if all_reduce is not None:
            self._gram.replace(all_reduce)
            for name in ("cross", "input_sum", "output_sum", "rows", "counted"):
                setattr(self, name, all_reduce(getattr(self, name)))
            usable = all_reduce(usable)
        if int(usable):
            self.rows.zero_()

    def solve(self, weight: Tensor, bias: Tensor | None, damping: float) -> tuple[Tensor, Tensor | None]:
        """The weights, and the bias if there is one, that fit best; to be called once.

        Args:
            weight: Those that ridge regression prefers, shape ``(outputs, inputs)``.
            bias: The bias, shape ``(outputs,)``. It is not damped: the fit is of what is left of inputs and outputs without
                their means.
            damping: As of :func:`lit_prune.repair.refit.least_squares`.
        """
        if bias is None:
            gram = self._gram.matrix
            return ridge(gram, self.cross, weight, _relative(damping, gram, self.rows)), None
        # in place: the sums are read once
        mean = self.input_sum / self.counted
        whole = self._gram.matrix.diagonal().to(torch.float64, copy=True)
        gram = self._gram.matrix.addr_(self.input_sum, mean, alpha=-1)
        cross = self.cross.addr_(self.output_sum, mean, alpha=-1)
        # an input that is always the same is rounding without its mean, and no weight is fitted to that
        left = gram.diagonal().double()
        sizes = torch.where(left > _ROUNDING * whole, left, whole)
        solved = ridge(gram, cross, weight, _relative(damping, gram, self.rows), sizes=sizes)
        shift = (self.output_sum - solved.to(self.input_sum) @ self.input_sum) / self.counted
        return solved, shift.to(bias.dtype)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale
