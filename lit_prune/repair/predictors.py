"""Predicting what a consumer reads of each group from what it reads of the others, as a refit by least squares does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prune.repair.regression import SHARE_DAMPING


@torch.no_grad()
def predictor(gram: Tensor, tokens: float, groups: Sequence[Tensor], keep: Tensor) -> Tensor | None:
    r"""Return the matrix that predicts each feature from the kept features of other groups by ridge regression.

    With :math:`A=X_K^TX_K+\lambda I` over the kept features K, removed features are predicted by :math:`X_S^TX_KA^{-1}`.
    For a kept group G it is the regression on the kept features without G's own, from the same inverse:
    :math:`\hat x_G=x_G-([A^{-1}]_{GG})^{-1}[A^{-1}]_{GK}\,x_K`.

    Args:
        gram: :math:`X^TX`, shape ``(features, features)``.
        tokens: Number of rows of X.
        groups: Features of every group, each of shape ``(groups, width)``; a tensor for every group set.
        keep: Which features are kept, bool tensor of shape ``(features,)``.

    Returns:
        Matrix of shape ``(features, features)``, whose columns of removed features are 0; ``None`` if the system cannot be
        solved. Rows of kept features in no group are 0.
    """
    kept = keep.nonzero().flatten()
    system = gram[kept][:, kept].double()
    relative = SHARE_DAMPING * len(gram) / max(tokens, 1.0)
    system.diagonal().add_(max(relative, 1e-9) * float(gram.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(factor)
    result = torch.zeros_like(gram, dtype=torch.float64)
    gone = (~keep).nonzero().flatten()
    result[gone[:, None], kept] = gram[gone][:, kept].double() @ inverse
    place = torch.full((len(gram),), -1, device=gram.device)
    place[kept] = torch.arange(len(kept), device=gram.device)
    for index in groups:
        index = index.to(gram.device)
        own = place[index[keep[index].all(dim=1)]]
        within = inverse[own[:, :, None], own[:, None, :]]
        factors, errors = torch.linalg.cholesky_ex(within)
        if int(errors.abs().sum()):
            return None
        rows = -torch.cholesky_solve(inverse[own], factors)
        # of what is its own the solution is minus the identity
        rows.scatter_(2, own[:, None, :].expand(-1, own.shape[1], -1), 0.0)
        features = kept[own]
        result[features[:, :, None], kept[None, None, :]] = rows
    return result.to(gram.dtype) if bool(result.isfinite().all()) else None
