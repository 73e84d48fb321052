"""Ridge regression by normal equations, and what it leaves unexplained."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SHARE_DAMPING = 0.1


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


def unexplained_share(gram: Tensor, weight: Tensor, index: Tensor, damping: float) -> Tensor:
    r"""The share of what each group of inputs adds to an output that regression on the other inputs cannot explain.

    For one input that is :math:`1/(H_{jj}[H^{-1}]_{jj})`, with :math:`H=X^TX+\lambda I` one minus the squared multiple
    correlation of input j with the others. For several, :math:`R_g=([H^{-1}]_{gg})^{-1}` is what is left of their Gram
    matrix, and the share is :math:`\mathrm{tr}(W_gR_gW_g^T)/\mathrm{tr}(W_gH_{gg}W_g^T)`.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
        weight: The consumer's weight, shape ``(outputs, inputs)``.
        index: The inputs of every group, shape ``(groups, width)``.
        damping: λ relative to the mean of the diagonal of ``gram``.

    Returns:
        Tensor of shape ``(groups,)`` in (0, 1]; ones if the inverse cannot be computed.

    Reference: Hassibi & Stork, Optimal Brain Surgeon, NeurIPS 1992, on the inputs of one layer as in Frantar & Alistarh,
    Optimal Brain Compression, NeurIPS 2022.
    """
    system = gram.double()
    index = index.to(system.device)
    system.diagonal().add_(max(damping, 1e-9) * float(system.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        return torch.ones(len(index), dtype=torch.float32, device=gram.device)
    inverse = torch.cholesky_inverse(factor)
    within = index[:, :, None], index[:, None, :]
    # torch's LU of a stack of matrices is wrong with several threads and MKL (pytorch issue 142815)
    factors, failed = torch.linalg.cholesky_ex(inverse[within])
    left = torch.cholesky_inverse(factors)
    left[failed != 0] = torch.nan
    columns = weight.double()[:, index].movedim(0, 1)
    before = torch.einsum("gow,gwv,gov->g", columns, system[within], columns)
    after = torch.einsum("gow,gwv,gov->g", columns, left, columns)
    share = (after / before.clamp_min(torch.finfo(torch.float64).tiny)).clamp(1e-6, 1.0)
    return torch.where(share.isfinite(), share, 1.0).float()
