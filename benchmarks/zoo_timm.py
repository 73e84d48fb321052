"""Rows of benchmarks/any_module.py: timm architectures, the smallest of each family or made smaller by its own options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from any_module_models import CLASSES, CLASSIFICATION, Row, call, cross_entropy, images
from torch import nn

# name: image size, options of timm.create_model
_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (64, {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64}),
    "lambda_resnet26rpt_256": (64, {"img_size": 64}),
    "eca_botnext26ts_256": (64, {"img_size": 64}),
    "test_byobnet": (64, {}),
    "mobileone_s1": (64, {}),
    "repvgg_a0": (64, {}),
    "gernet_s": (64, {}),
    "cait_xxs24_224": (64, {"depth": 3, "img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "coat_tiny": (64, {"img_size": 64}),
    "convit_tiny": (64, {"img_size": 64, "depth": 11}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "cpubone_nano": (64, {}),
    "crossvit_tiny_240": (64, {}),
    "csatv2": (64, {}),
    "cs3darknet_focus_s": (64, {}),
    "cspnext_tiny": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1), "embed_dims": (32, 48, 64, 96), "num_heads": (2, 3, 4, 6)}),
    "deit_tiny_distilled_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "deit3_small_patch16_224": (64, {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": 64}),
    "dla46_c": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "efficientnet_lite0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),
    "mixnet_s": (64, {}),
    "test_efficientnet": (64, {}),
    "efficientvim_m1": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {}),
    "eva02_tiny_patch14_224": (64, {"depth": 3, "img_size": 64}),
    "vit_base_patch16_rope_224": (64, {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "ghostnet_050": (64, {}),
    "ghostnetv2_100": (64, {}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hrnet_w18_small": (64, {}),
    "iformer_t": (64, {}),
    "inception_next_atto": (64, {}),
    "lcnetv2_small": (64, {}),
    "lcnet_050": (64, {}),
    "levit_128s": (64, {"img_size": 64}),
    "lowformer_b0": (64, {}),
    "mambaout_femto": (64, {}),
    "test_mambaout": (64, {}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "test_maxvit": (64, {"img_size": 64}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {}),
    "naflexvit_base_patch16_gap": (64, {"depth": 4, "embed_dim": 64, "num_heads": 4}),
    "nest_tiny": (64, {"img_size": 64}),
    "nextvit_small": (64, {}),
    "test_nfnet": (64, {}),
    "nf_regnet_b0": (64, {}),
    "pit_ti_224": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "regnetz_005": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m0_9": (64, {}),
    "resnest14d": (64, {}),
    "test_resnet": (64, {}),
    "seresnet18": (64, {}),
    "resnetv2_18": (64, {}),
    "rexnet_100": (64, {}),
    "shvit_s1": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (64, {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4), "img_size": 64}),
    "swinv2_tiny_window8_256": (64, {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4), "img_size": 64}),
    "swinv2_cr_tiny_ns_224": (64, {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4), "img_size": 64}),
    "tiny_vit_5m_224": (64, {}),
    "tnt_s_legacy_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "vit_tiny_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "test_vit": (64, {}),
    "test_vit2": (64, {}),
    "test_vit3": (64, {"img_size": 64}),
    "vit_tiny_r_s16_p8_224": (64, {"depth": 3, "img_size": 64}),
    "vit_relpos_small_patch16_224": (64, {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": 64}),
    "samvit_base_patch16": (64, {"depth": 4, "embed_dim": 64, "num_heads": 4, "img_size": 64, "neck_chans": 16}),
    "volo_d1_224": (64, {"img_size": 64}),
    "ese_vovnet19b_slim": (64, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (64, {}),
    "vit_small_patch14_dinov2": (64, {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": 64}),
    "vit_small_patch16_dinov3": (64, {"depth": 3, "embed_dim": 96, "num_heads": 3}),
    "vit_pe_core_tiny_patch16_384": (64, {"depth": 3, "img_size": 64}),
    "sequencer2d_s": (64, {"layers": [1, 1, 1, 1]}),
    "twins_svt_small": (64, {"depths": [1, 1, 1, 1], "embed_dims": [32, 64, 96, 128], "num_heads": [2, 2, 4, 4]}),
    "twins_pcpvt_small": (64, {"depths": [3, 3, 3, 3], "embed_dims": [32, 64, 96, 128], "num_heads": [1, 2, 3, 4]}),
    "sam2_hiera_tiny": (64, {"stages": (1, 1, 1, 1), "embed_dim": 48, "global_att_blocks": ()}),
    "hiera_tiny_224": (64, {"stages": (1, 1, 1, 1), "embed_dim": 32, "num_heads": 1, "img_size": (64, 64)}),
    "visformer_tiny": (64, {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 96}),
    "vitamin_small_224": (64, {"img_size": 64, "depth": 2}),
    "tresnet_m": (64, {"layers": [1, 1, 1, 1]}),
    "efficientformer_l1": (224, {"depths": (1, 1, 2, 2)}),
    "rdnet_tiny": (
        64,
        {
            "num_init_features": 32,
            "growth_rates": (16, 24, 32, 32),
            "num_blocks_list": (3, 3, 3, 3),
            "is_downsample_block": (None, True, True, True),
            "transition_compression_ratio": 0.5,
            "block_type": ["Block"] * 4,
        },
    ),
}


def _smaller(models: Any) -> dict[str, Callable[[], nn.Module]]:
    """Of families whose depths and widths cannot be chosen by ``create_model``, the class itself with smaller ones."""
    mixer, resnet = models.mlp_mixer, models.resnet
    options: dict[str, Any] = {"num_classes": CLASSES}
    mixing = {"num_blocks": 3, "embed_dim": 64, "img_size": 64, **options}
    one = [1, 1, 1, 1]
    return {
        "convmixer": lambda: models.convmixer.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=4, **options),
        "focalnet": lambda: models.focalnet.FocalNet(depths=tuple(one), embed_dim=32, **options),
        "mixer": lambda: mixer.MlpMixer(**mixing),
        "resmlp": lambda: mixer.MlpMixer(mlp_ratio=4, block_layer=mixer.ResBlock, norm_layer=mixer.Affine, **mixing),
        "gmlp": lambda: mixer.MlpMixer(
            mlp_ratio=6, block_layer=mixer.SpatialGatingBlock, mlp_layer=mixer.GatedMlp, **mixing
        ),
        "metaformer (pooling)": lambda: models.metaformer.MetaFormer(
            depths=(2, 2, 2, 2), dims=(32, 64, 96, 128), **options
        ),
        "res2net": lambda: resnet.ResNet(
            models.res2net.Bottle2neck, one, base_width=14, block_args={"scale": 8}, **options
        ),
        "sknet": lambda: resnet.ResNet(models.sknet.SelectiveKernelBasic, one, **options),
        "dpn": lambda: models.dpn.DPN(
            small=True, num_init_features=10, k_r=64, groups=8, k_sec=tuple(one), inc_sec=(16, 32, 32, 64), **options
        ),
    }


_SMALLER = (
    "convmixer",
    "focalnet",
    "mixer",
    "resmlp",
    "gmlp",
    "metaformer (pooling)",
    "res2net",
    "sknet",
    "dpn",
)


def _build(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return build


def _build_smaller(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm.models

        return _smaller(timm.models)[name]()

    return build


_BUILDERS = {name: (size, _build(name, options)) for name, (size, options) in _MODELS.items()}
_BUILDERS |= {name: (64, _build_smaller(name)) for name in _SMALLER}
ROWS = tuple(
    Row("timm", name, build, images(size), CLASSIFICATION, call, cross_entropy)
    for name, (size, build) in sorted(_BUILDERS.items())
)
