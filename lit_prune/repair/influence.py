"""How much each token counts in the fit of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.calibration.precision import accumulation_dtype

# in median lengths of what is wanted
_LONGEST = 3.0


def influence(wanted: Tensor, mask: Tensor | None, batch_dim: int = 0) -> Tensor:
    """What to multiply tokens by, so that none counts for more than one a few times as long as the median of its sequence.

    A few tokens (the first of a sequence, separators) hold values that are tens of times those of the others and that the next
    norm takes out again; fitted as they are, they decide the weights that all other tokens are computed with.

    Args:
        wanted: What a layer should give, shape ``(sequences, ..., features)``.
        mask: True for tokens that count, shape ``(sequences, ...)``; all do if it is ``None`` or of another shape.
        batch_dim: The dimension that sequences lie along, where that is not the first.

    Returns:
        The shape of ``wanted`` with one feature, in float32 or wider.
    """
    lengths = wanted.to(accumulation_dtype(wanted.dtype)).norm(dim=-1)
    counted = lengths
    if mask is not None and mask.shape == lengths.shape:
        counted = lengths.masked_fill(~mask, torch.nan)
    if not lengths.numel():
        return lengths[..., None]
    # nanmedian is not for deterministic runs on CUDA
    ordered = counted.movedim(batch_dim, 0).flatten(1).sort(dim=1).values
    middle = ((~ordered.isnan()).sum(dim=1, keepdim=True) - 1).clamp_min(0) // 2
    median = ordered.gather(1, middle).reshape(-1, *[1] * (lengths.dim() - 1))
    limit = _LONGEST * median.movedim(0, batch_dim)
    # a sequence that is all padding has no median
    scale = torch.where(
        (lengths > limit) & (limit > 0), limit / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0
    )
    return scale[..., None]
