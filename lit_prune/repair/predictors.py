"""Predicting what a consumer reads of each group from what it reads of the others, as a refit by least squares does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prune.repair.regression import SHARE_DAMPING


class Prediction(NamedTuple):
    """What the kept features of other groups say of each group.

    Args:
        matrix: Predicts each feature, shape ``(features, features)``; its columns of removed features are 0, and so are its
            rows of features in no group.
        shares: The fraction of what each group adds to the output that is not predicted, in (0, 1]; shape ``(groups,)``, by
            group set.
    """

    matrix: Tensor
    shares: list[Tensor]


@torch.no_grad()
def predict(gram: Tensor, tokens: float, groups: Sequence[Tensor], keep: Tensor, weight: Tensor) -> Prediction | None:
    r"""Return the matrix that predicts each feature from the kept features of other groups by ridge regression.

    With :math:`A=X_K^TX_K+\lambda I` over the kept features K, removed features are predicted by :math:`X_S^TX_KA^{-1}`.
    For a kept group G it is the regression on the kept features without G's own, from the same inverse:
    :math:`\hat x_G=x_G-([A^{-1}]_{GG})^{-1}[A^{-1}]_{GK}\,x_K`.

    Args:
        gram: :math:`X^TX`, shape ``(features, features)``.
        tokens: Number of rows of X.
        groups: Features of every group, each of shape ``(groups, width)``; a tensor for every group set.
        keep: Which features are kept, bool tensor of shape ``(features,)``.
        weight: The layer's weight, shape ``(outputs, features)``.

    Returns:
        The prediction; ``None`` if the system cannot be solved.
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
    place = torch.full((len(gram),), -1, dtype=torch.long, device=gram.device)
    place[kept] = torch.arange(len(kept), device=gram.device)
    columns, shares = weight.double(), []
    for index in groups:
        index = index.to(gram.device)
        whole = gram[index[:, :, None], index[:, None, :]].double()
        stays = keep[index].all(dim=1)
        own = place[index[stays]]
        factors, errors = torch.linalg.cholesky_ex(inverse[own[:, :, None], own[:, None, :]])
        if int(errors.abs().sum()):
            return None
        rows = -torch.cholesky_solve(inverse[own], factors)
        # of what is its own the solution is minus the identity
        rows.scatter_(2, own[:, None, :].expand(-1, own.shape[1], -1), 0.0)
        result[kept[own][:, :, None], kept[None, None, :]] = rows
        left = torch.empty_like(whole)
        left[stays] = torch.cholesky_inverse(factors)
        lost = index[~stays]
        left[~stays] = whole[~stays] - result[lost] @ gram[:, lost].double().transpose(0, 1)
        shares.append(_shares(columns[:, index].movedim(0, 1), left, whole))
    return Prediction(result.to(gram.dtype), shares) if bool(result.isfinite().all()) else None


def _shares(columns: Tensor, left: Tensor, whole: Tensor) -> Tensor:
    before = torch.einsum("gow,gwv,gov->g", columns, whole, columns)
    after = torch.einsum("gow,gwv,gov->g", columns, left, columns)
    share = (after / before.clamp_min(torch.finfo(torch.float64).tiny)).clamp(1e-6, 1.0)
    return torch.where(share.isfinite(), share, 1.0)
