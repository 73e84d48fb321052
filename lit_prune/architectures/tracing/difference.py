"""Whether two runs gave the same, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-6}
_RELATIVE_HALF = 3e-2


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """How the outputs of a cut model differ from those of the masked one, in words; ``None`` if by rounding alone.

    Args:
        expected: What the masked model gave.
        found: What the cut model gave.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return "the cut model returns tensors of other shapes"
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not a.numel():
            continue
        tolerance = _RELATIVE.get(a.dtype, _RELATIVE_HALF)
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        scale = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_tensor(1.0)
        error = torch.where(same, 0.0, (a - b).abs()).max() / scale.clamp_min(1e-30)
        worst = max(worst, float("inf") if error.isnan() else float(error) / tolerance)
    if worst > 1:
        return f"masked and cut outputs differ by {worst:.3g} times the tolerance"
    return None


def no_longer_finite(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether some outputs are not finite that were.

    Args:
        before: Outputs of a model.
        after: Its outputs with other values.
    """
    for a, b in zip(before, after, strict=False):
        finite = a.isfinite() if a.shape == b.shape else a.isfinite().all()
        if bool((finite & ~b.isfinite()).any()):
            return True
    return False
