"""Ridge regression by normal equations, and what it leaves unexplained.

Beside the Gram matrix one matrix of its size is held, in float64: the system, which becomes its Cholesky factor in place.
Everything else is done for a part of the outputs or groups at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from lit_prune.calibration.reduce import piece_size
from lit_prune.distributed.sharing import from_all_parts, own_part

log = logging.getLogger(__name__)

SHARE_DAMPING = 0.1

# right-hand sides that are solved for at a time, at least
_FEWEST_SIDES = 1 << 7


@torch.no_grad()
def ridge(gram: Tensor, cross: Tensor, prior: Tensor, damping: float = 0.01, *, sizes: Tensor | None = None) -> Tensor:
    r"""Return the weights that fit inputs to outputs, drawn to those of before: ridge regression, each input damped by its size.

    :math:`\min_W \|Y - XW^T\|^2 + \sum_j\lambda_j\|w_j - w_{0,j}\|^2`, :math:`\lambda_j` = ``damping`` times
    the input's size :math:`(X^TX)_{jj}`.

    As each input is damped in proportion to its own size, one of massive values (every Llama's ``down_proj`` reads some) does
    not keep the weights of the others from changing, and the solution is the same in whatever units inputs are measured.
    Within :func:`lit_prune.distributed.sharing.shared_work` each process solves for a part of the outputs.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
        cross: :math:`Y^TX`, shape ``(outputs, inputs)``.
        prior: :math:`W_0`, shape ``(outputs, inputs)``.
        damping: λ of each input relative to its size; at least 0.
        sizes: Sizes of the inputs, shape ``(inputs,)``, float64; the diagonal of ``gram`` if ``None``.

    Returns:
        W, of the prior's dtype and shape; the prior itself, with a warning, if the system cannot be solved or the
        solution is not finite or fits worse than the prior.
    """
    sizes = gram.diagonal().double() if sizes is None else sizes
    # an input that is zero in all rows keeps its weights
    sizes = torch.where(sizes > 0, sizes, sizes.mean())
    # the floor keeps a rank-deficient system solvable; the boosts are for those that fail all the same
    for boost in (1.0, 1e3, 1e6):
        strength = max(damping, 1e-12) * boost * sizes
        solution, misfits = _solved(gram, cross, prior, strength)
        before, after, failed = from_all_parts(misfits).tolist()
        if not failed and after <= before + 1e-9 * abs(before):
            return from_all_parts(solution).to(prior.dtype)
    log.warning("A consumer could not be refitted: its calibration inputs are ill-conditioned. It keeps its weights.")
    return prior


def _solved(gram: Tensor, cross: Tensor, prior: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """The solution for this process's outputs, zero for the others; and their misfit before and after, and how many failed."""
    wide = torch.promote_types(prior.dtype, torch.float32)
    solution = torch.zeros(prior.shape, dtype=wide, device=prior.device)
    misfits = torch.zeros(3, dtype=torch.float64, device=gram.device)
    own = own_part(len(prior))
    factor = _cholesky(gram, strength)
    if factor is None:
        misfits[2] = max(1, len(own))
        return solution, misfits
    for rows in _sections(own, gram):
        c, w = cross[rows].double(), prior[rows].double()
        half = torch.linalg.solve_triangular(factor, (c + strength * w).T, upper=False)
        found = torch.linalg.solve_triangular(factor.mT, half, upper=True).T
        misfits[0] += _misfit(w, gram, c)
        misfits[1] += _misfit(found, gram, c)
        misfits[2] += (~found.isfinite()).any()
        solution[rows] = found.to(wide)
    return solution, misfits


def _cholesky(gram: Tensor, strength: Tensor | float) -> Tensor | None:
    """The lower Cholesky factor of a Gram matrix with its diagonal raised, in float64; ``None`` if it has none."""
    system = gram.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    system.diagonal().add_(strength)
    # a symmetric matrix is its transpose, which is in LAPACK's order: it is factored in place
    factor, info = system.mT, torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor if int(info) == 0 else None


def _sections(rows: range, gram: Tensor) -> Iterator[slice]:
    """Slices of a range, of as many right-hand sides as are solved for at a time."""
    step = max(_FEWEST_SIDES, piece_size(gram.device) // max(1, len(gram)))
    yield from (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


def _misfit(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """``|Y - X W^T|^2`` less the constant ``|Y|^2``."""
    quadratic = torch.zeros((), dtype=torch.float64, device=gram.device)
    for columns in _sections(range(len(gram)), gram):
        quadratic += (weight @ gram[:, columns].double() * weight[:, columns]).sum()
    return quadratic - 2 * (weight * cross).sum()


def _relative(damping: float, gram: Tensor, tokens: Tensor) -> float:
    return damping * gram.shape[-1] / max(float(tokens), 1.0)


@torch.no_grad()
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
    strength = max(damping, 1e-9) * float(gram.diagonal().double().mean())
    shares = torch.ones(len(index), dtype=torch.float32, device=gram.device)
    factor = _cholesky(gram, strength)
    if factor is None:
        return shares
    # the inverse of a triangular factor is zero above the first input of a group: only what is below is solved for
    offset, firsts = 0, index.cpu().amin(dim=1)
    order = firsts.argsort()
    step = max(1, max(_FEWEST_SIDES, piece_size(gram.device) // max(1, len(gram))) // max(1, index.shape[1]))
    for groups in order.split(step):
        while int(firsts[groups[0]]) - offset >= (half := len(factor) // 2) > 0:
            factor, offset = factor[half:, half:].mT.contiguous().mT, offset + half
        of_these = index[groups.to(index.device)].to(gram.device)
        shares[groups.to(gram.device)] = _shares_of(factor, offset, gram, strength, weight, of_these)
    return shares


def _shares_of(factor: Tensor, offset: int, gram: Tensor, strength: float, weight: Tensor, index: Tensor) -> Tensor:
    """The shares of some groups, from the part of a system's Cholesky factor behind the first ``offset`` inputs."""
    sides = torch.zeros(len(factor), index.numel(), dtype=torch.float64, device=gram.device)
    sides[index.flatten() - offset, torch.arange(index.numel(), device=gram.device)] = 1.0
    found = torch.linalg.solve_triangular(factor, sides, upper=False).view(len(factor), *index.shape)
    inverse = torch.einsum("mgv,mgw->gvw", found, found)
    # torch's LU of a stack of matrices is wrong with several threads and MKL (pytorch issue 142815)
    factors, failed = torch.linalg.cholesky_ex(inverse)
    left = torch.cholesky_inverse(factors)
    left[failed != 0] = torch.nan
    within = gram[index[:, :, None], index[:, None, :]].double()
    within.diagonal(dim1=1, dim2=2).add_(strength)
    columns = weight[:, index].double().movedim(0, 1)
    before = torch.einsum("gow,gwv,gov->g", columns, within, columns)
    after = torch.einsum("gow,gwv,gov->g", columns, left, columns)
    share = (after / before.clamp_min(torch.finfo(torch.float64).tiny)).clamp(1e-6, 1.0)
    return torch.where(share.isfinite(), share, 1.0).float()
