"""Puts timm, torchvision and litgpt on the path, and gives torchvision's compiled operators plain PyTorch kernels.

torchvision's wheel for CUDA does not load its compiled library beside a CPU build of torch, and then its import fails. The
schemas of three operators are enough for the import; the two that detection models run are written in PyTorch here, for
benchmarks only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = Path(__file__).resolve().parents[1] / ".venv" / "models"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio,"
    " bool aligned) -> Tensor",
)
_library: torch.library.Library | None = None


def install() -> None:
    """Make ``import timm``, ``import torchvision`` and ``import litgpt`` work; later calls do nothing."""
    global _library
    if _library is not None:
        return
    if not PACKAGES.is_dir():
        raise SystemExit(f"{PACKAGES} is missing: pip install --no-deps --target {PACKAGES} timm torchvision litgpt")
    sys.path.insert(0, str(PACKAGES))
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    _library.impl("nms", nms, "CompositeExplicitAutograd")
    _library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True
    # this one holds on to the function by name, and would compile torchvision's own replacement instead
    sys.modules["torchvision.ops.roi_align"]._has_ops = lambda: True  # type: ignore[attr-defined]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that non-maximum suppression keeps, by falling score.

    Args:
        boxes: Corners (x1, y1, x2, y2), shape ``(boxes, 4)``.
        scores: Shape ``(boxes,)``.
        iou_threshold: A box goes if its overlap with a better one, intersection over union, is larger.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    area = (ranked[:, 2:] - ranked[:, :2]).clamp(min=0).prod(dim=1)
    low = torch.maximum(ranked[:, None, :2], ranked[None, :, :2])
    high = torch.minimum(ranked[:, None, 2:], ranked[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    worse = shared / (area[:, None] + area[None, :] - shared) > iou_threshold
    keep = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for position in range(len(order)):
        if keep[position]:
            keep[position + 1 :] &= ~worse[position, position + 1 :]
    return order[keep]


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Average of bilinear samples in each bin of each box; see torchvision's ``roi_align``, with a fixed number of samples.

    Args:
        input: Shape ``(batch, channels, height, width)``.
        rois: Index in the batch and corners, shape ``(boxes, 5)``.
        spatial_scale: From the coordinates of the boxes to those of ``input``.
        pooled_height: Bins in a column.
        pooled_width: Bins in a row.
        sampling_ratio: Samples along each side of a bin; 2 where it is not positive.
        aligned: Whether pixels are centred at half coordinates.

    Returns:
        Shape ``(boxes, channels, pooled_height, pooled_width)``.
    """
    samples = sampling_ratio if sampling_ratio > 0 else 2
    height, width = input.shape[-2:]
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    extent = corners[:, 2:] - corners[:, :2]
    extent = extent if aligned else extent.clamp(min=1.0)

    def positions(start: Tensor, length: Tensor, bins: int) -> Tensor:
        steps = (torch.arange(bins * samples, dtype=input.dtype, device=input.device) + 0.5) / (bins * samples)
        return start[:, None] + steps * length[:, None]

    x = positions(corners[:, 0], extent[:, 0], pooled_width)
    y = positions(corners[:, 1], extent[:, 1], pooled_height)
    inside = ((y >= -1) & (y <= height))[:, :, None] & ((x >= -1) & (x <= width))[:, None, :]
    # grid_sample's coordinates run from -1 at the first pixel to 1 at the last
    x = 2 * x.clamp(0, width - 1) / max(width - 1, 1) - 1
    y = 2 * y.clamp(0, height - 1) / max(height - 1, 1) - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    pictures = input[rois[:, 0].long()]
    sampled = torch.nn.functional.grid_sample(pictures, grid.to(input.dtype), align_corners=True) * inside[:, None]
    return torch.nn.functional.avg_pool2d(sampled, samples)
