"""timm, torchvision and litgpt from a folder beside the environment, where they are installed without their dependencies."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(sys.prefix) / "models"
_KEPT: list[torch.library.Library] = []
# the compiled operators of torchvision that its Python code registers fakes for when it is imported
_BOXES = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_BACKWARD = "Tensor grad, Tensor rois, {}float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_STEPS = ", ".join(f"SymInt {n}_{d}" for n in ("stride", "pad", "dilation") for d in "hw")
_DEFORM = f"Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_STEPS}, SymInt groups, SymInt offset_groups"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_BOXES}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward({_BACKWARD.format('')}, {_SIZES}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_BOXES}) -> (Tensor, Tensor)",
    f"_roi_pool_backward({_BACKWARD.format('Tensor argmax, ')}, {_SIZES}) -> Tensor",
    f"ps_roi_align({_BOXES}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({_BACKWARD.format('Tensor mapping, ')}, int sampling_ratio, {_SIZES}) -> Tensor",
    f"ps_roi_pool({_BOXES}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({_BACKWARD.format('Tensor mapping, ')}, {_SIZES}) -> Tensor",
    f"deform_conv2d(Tensor input, {_DEFORM}, bool use_mask) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, {_DEFORM}, bool use_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def vision_package(name: str) -> ModuleType:
    """The package, or a skipped test if it is not there."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        pass
    if not (FOLDER / name.partition(".")[0]).is_dir():
        pytest.skip(f"{name} is not installed, and not in {FOLDER}")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if not _KEPT and name.startswith(("torchvision", "timm")):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _KEPT.append(library)
    return importlib.import_module(name)
