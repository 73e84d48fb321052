"""Ridge regression by normal equations."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


# so that a layer with one massive channel is repaired at all. Measured on SmolLM2-135M, where one layer's mean is 3,000 times its
# median, with 1,536 tokens (held-out loss 3.136, cut 3.621): ten times 3.418, thirty 3.419, three 3.423, the median 3.431, a λ
# for each feature 3.461; the plain mean, which leaves that layer as it is, 3.414
_MASSIVE = 10.0


def typical_square(gram: Tensor) -> float:
    """Return the mean of a Gram matrix's diagonal in which no feature counts for more than ten times the median.

    Without that limit one massive channel, as most language models have, would set the damping of all others.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
    """
    squares = gram.diagonal()
    present = squares[squares > 0]
    if not len(present):
        return float(squares.mean())
    return float(squares.clamp_max(_MASSIVE * float(present.median())).mean())


def ridge(gram: Tensor, cross: Tensor, prior: Tensor, damping: float = 0.01) -> Tensor:
    r"""Solve :math:`\min_W \|Y - XW^T\|^2 + \lambda\|W - W_0\|^2`, λ = ``damping`` times :func:`typical_square`.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
        cross: :math:`Y^TX`, shape ``(outputs, inputs)``.
        prior: :math:`W_0`, shape ``(outputs, inputs)``.
        damping: λ relative to :func:`typical_square` of ``gram``, at least 0.

    Returns:
        W, of the prior's dtype and shape; the prior itself, with a warning, if the system cannot be solved or the
        solution is not finite or fits worse than the prior.
    """
    g, c, w = gram.double(), cross.double(), prior.double()
    scale = typical_square(g)
    # the floor keeps a rank-deficient system solvable; the boosts are for those that fail all the same
    for boost in (1.0, 1e3, 1e6):
        strength = max(damping, 1e-12) * boost * scale
        system = g.clone()
        system.diagonal().add_(strength)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) != 0:
            continue
        solution = torch.cholesky_solve((c + strength * w).T, factor).T
        before, after = _misfit(w, g, c), _misfit(solution, g, c)
        if bool(solution.isfinite().all()) and after <= before + 1e-9 * abs(before):
            return solution.to(prior.dtype)
    log.warning("A consumer could not be refitted: its calibration inputs are ill-conditioned. It keeps its weights.")
    return prior


def _misfit(weight: Tensor, gram: Tensor, cross: Tensor) -> float:
    """``|Y - X W^T|^2`` less the constant ``|Y|^2``."""
    return float((weight @ gram * weight).sum() - 2 * (weight * cross).sum())


def _relative(damping: float, gram: Tensor, tokens: Tensor) -> float:
    return damping * gram.shape[-1] / max(float(tokens), 1.0)
