"""Ridge regression by normal equations."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def ridge(gram: Tensor, cross: Tensor, prior: Tensor, damping: float = 0.01) -> Tensor:
    r"""Solve :math:`\min_W \|Y - XW^T\|^2 + \lambda\|W - W_0\|^2`, λ = ``damping`` times the mean of the Gram's diagonal.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
        cross: :math:`Y^TX`, shape ``(outputs, inputs)``.
        prior: :math:`W_0`, shape ``(outputs, inputs)``.
        damping: λ relative to the mean of the diagonal of ``gram``, at least 0.

    Returns:
        W, of the prior's dtype and shape; the prior itself, with a warning, if the system cannot be solved or the
        solution is not finite or fits worse than the prior.
    """
    g, c, w = gram.double(), cross.double(), prior.double()
    scale = float(g.diagonal().mean())
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
