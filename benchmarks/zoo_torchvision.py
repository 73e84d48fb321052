"""Rows of benchmarks/any_module.py: torchvision's classification, segmentation, detection, video and optical flow models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from any_module_models import CLASSES, CLASSIFICATION, Row, call, cross_entropy, images, spread
from torch import Tensor, nn

# name: image size; the smallest variant of each family
_CLASSIFICATION = {
    "alexnet": 64,
    "vgg11_bn": 32,
    "vgg11": 32,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "inception_v3": 96,
    "googlenet": 64,
    "squeezenet1_1": 64,
    "shufflenet_v2_x0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "vit": 64,
    "swin": 64,
    "swin_v2": 64,
    "maxvit": 64,
}
_SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_SINGLE_STAGE = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
_TWO_STAGES = ("fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")


def _classification(name: str, size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        options: dict[str, Any] = {"num_classes": CLASSES}
        if name in ("inception_v3", "googlenet"):
            options.update(aux_logits=False, init_weights=True)
        if name in smaller(models):
            return smaller(models)[name]()
        model = models.get_model(name, weights=None, **options)
        if name.startswith(("alexnet", "vgg")):
            _narrow(model, 256)
        return model

    return build


def smaller(models: Any) -> dict[str, Callable[[], nn.Module]]:
    """Of transformers the class itself, with fewer and narrower blocks than its smallest variant has."""
    swin = models.swin_transformer
    windows = {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    versions = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return {
        "vit": lambda: models.VisionTransformer(64, 16, 3, 3, 96, 192, num_classes=CLASSES),
        "swin": lambda: swin.SwinTransformer(**windows, mlp_ratio=6.0, num_classes=CLASSES),
        "swin_v2": lambda: swin.SwinTransformer(**windows, **versions, num_classes=CLASSES),
        "maxvit": lambda: models.maxvit.MaxVit(
            input_size=(64, 64),
            stem_channels=32,
            partition_size=2,
            block_channels=[32, 64],
            block_layers=[1, 1],
            head_dim=16,
            stochastic_depth_prob=0.0,
            num_classes=CLASSES,
        ),
    }


def _narrow(model: Any, width: int) -> None:
    """Fewer units than 4096 in the layers of the classifier, which are nearly all of the parameters, to save memory."""
    linear = [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    for i in linear:
        before = model.classifier[i].in_features if i == linear[0] else width
        model.classifier[i] = nn.Linear(before, CLASSES if i == linear[-1] else width)


def _segmentation(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)

    return build


def _pixels() -> Any:
    return torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))


def _pixel_loss(outputs: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs["out"], batch[1])


def _detection(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
        if not name.startswith("ssdlite"):
            options["trainable_backbone_layers"] = 5
        return models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **options)

    return build


def _pictures() -> Any:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 3.0, 60.0, 30.0]])
    return [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [boxes, boxes]


def _single_stage(model: Any, batch: Any) -> Any:
    """Features and raw heads: the detections behind them depend on the data, and read no weights."""
    pictures, _ = model.transform(batch[0])
    features = model.backbone(pictures.tensors)
    return model.head(list(features.values()) if isinstance(features, dict) else [features])


def _two_stages(model: Any, batch: Any) -> Any:
    """Proposals' logits, and all heads on given boxes: which boxes are proposed depends on the data, and reads no weights."""
    pictures, _ = model.transform(batch[0])
    features = model.backbone(pictures.tensors)
    proposals = model.rpn.head(list(features.values()))
    heads, sizes = model.roi_heads, pictures.image_sizes
    outputs = [proposals, heads.box_predictor(heads.box_head(heads.box_roi_pool(features, batch[1], sizes)))]
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"has_{kind}")():
            pooled = getattr(heads, f"{kind}_roi_pool")(features, batch[1], sizes)
            outputs.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled)))
    return outputs


def _video(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        if name == "mvit_v2":
            sizes = ((16, 32, (1, 2, 2)), *[(32, 32, (1, 1, 1))] * 3)
            blocks = [
                models.video.mvit.MSBlockConfig(2, before, after, (3, 3, 3), (3, 3, 3), stride, (1, 2, 2))
                for before, after, stride in sizes
            ]
            options = ("residual_pool", "residual_with_cls_embed", "rel_pos_embed", "proj_after_attn")
            return models.video.mvit.MViT((32, 32), 8, blocks, **dict.fromkeys(options, True), num_classes=CLASSES)
        return models.get_model(name, weights=None, num_classes=CLASSES)

    return build


def _clips(frames: int, size: int) -> Callable[[], Any]:
    return lambda: (torch.randn(2, 3, frames, size, size), torch.randint(CLASSES, (2,)))


def _flow() -> nn.Module:
    from torchvision import models

    return models.optical_flow.raft_small(weights=None)


def _two_frames(model: Any, batch: Any) -> Any:
    return model(*batch, num_flow_updates=2)


ROWS = (
    *(
        Row("torchvision", name, _classification(name, size), images(size), CLASSIFICATION, call, cross_entropy)
        for name, size in _CLASSIFICATION.items()
    ),
    *(
        Row("torchvision", name, _segmentation(name), _pixels, "segmentation", call, _pixel_loss)
        for name in _SEGMENTATION
    ),
    *(Row("torchvision", name, _detection(name), _pictures, "detection", _single_stage) for name in _SINGLE_STAGE),
    *(Row("torchvision", name, _detection(name), _pictures, "detection", _two_stages) for name in _TWO_STAGES),
    Row("torchvision", "r3d_18", _video("r3d_18"), _clips(4, 32), "video", call, cross_entropy),
    Row("torchvision", "r2plus1d_18", _video("r2plus1d_18"), _clips(4, 32), "video", call, cross_entropy),
    Row("torchvision", "mvit_v2", _video("mvit_v2"), _clips(8, 32), "video", call, cross_entropy),
    Row(
        "torchvision",
        "raft_small",
        _flow,
        lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)),
        "optical flow",
        _two_frames,
        spread,
    ),
)
