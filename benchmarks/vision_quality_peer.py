"""torch-pruning in benchmarks/vision_quality.py: one progressive walk gives its models of all sizes.

As in its own experiments with CIFAR, the ratio rises in small steps up to everything, one ranking for the whole model, the layer
that gives the outputs ignored, and the walk is left where the size is reached. Of the two models around a size the nearer one is
taken. Gradients for Taylor are taken anew on the calibration batches on the way.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional
from vision_quality_models import CLASSES, SIDE, Images, Recipe, fit, flops

from lit_prune.groups import count_parameters

FAR = 0.06
MEASURES = {"parameters": count_parameters, "flops": flops}
Target = tuple[str, float, float]


@dataclass(frozen=True)
class Setting:
    """Options of torch-pruning.

    Args:
        importance: ``"taylor"``, ``"magnitude"`` or ``"bn scale"``.
        normalizer: How importance is scaled in each layer.
        isomorphic: Whether layers are only ranked against those of the same structure.
        inside_blocks: Whether what writes to a transformer's residual stream stays whole (``--bottleneck`` in its example).
        regularization: Strength of the sparse training before the cuts; 0 is none.
    """

    importance: str
    normalizer: str = "mean"
    isomorphic: bool = False
    inside_blocks: bool = False
    regularization: float = 0.0


# settings to choose from, by network and method
CANDIDATES: dict[str, dict[str, dict[str, Setting]]] = {
    "ResNet": {
        "Taylor": {"global": Setting("taylor"), "isomorphic": Setting("taylor", isomorphic=True)},
        "magnitude": {"global": Setting("magnitude"), "isomorphic": Setting("magnitude", isomorphic=True)},
        "BN scale, sparse training": {
            "global": Setting("bn scale", regularization=5e-3),
            "isomorphic": Setting("bn scale", regularization=5e-3, isomorphic=True),
            "isomorphic, weaker": Setting("bn scale", regularization=1e-3, isomorphic=True),
        },
    },
    "ViT": {
        "Taylor": {
            "inside blocks": Setting("taylor", inside_blocks=True),
            "isomorphic": Setting("taylor", isomorphic=True),
        },
        "magnitude": {
            "inside blocks": Setting("magnitude", inside_blocks=True),
            "isomorphic": Setting("magnitude", isomorphic=True),
        },
    },
}


def sparse(dense: nn.Module, setting: Setting, recipe: Recipe, images: Images, seed: int) -> nn.Module:
    """A copy that trains on, as long as the dense model did, under the penalty of torch-pruning's ``BNScalePruner``."""
    model = copy.deepcopy(dense)
    pruner = _pruner(model, setting, 1)
    fit(model, recipe, images, 500 + seed, tuning=False, before_step=pruner.regularize)
    return model


def walk(dense: nn.Module, setting: Setting, images: Images, targets: list[Target]) -> dict[Target, nn.Module]:
    """The models of the given sizes.

    Args:
        dense: Stays as it is.
        setting: Options.
        images: The calibration batches are used.
        targets: A measure, see :data:`MEASURES`, a name of the size, and the share of the measure to remove.

    Returns:
        A model by target; without those that torch-pruning did not reach.
    """
    model = copy.deepcopy(dense)
    whole = {measure: count(model) for measure, count in MEASURES.items()}
    channels = sum(m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    pruner = _pruner(model, setting, channels)
    found: dict[Target, nn.Module] = {}
    gone: dict[str, float] = dict.fromkeys(MEASURES, 0.0)
    fine, coarse, every = max(channels // 400, 1), channels // 60, channels // 12
    taken = -every
    while len(found) < len(targets) and pruner.current_step < channels:
        if setting.importance == "taylor" and pruner.current_step - taken >= every:
            _take_gradients(model, images)
            taken = pruner.current_step
        left = [target[2] - gone[target[0]] for target in targets if target not in found]
        pruner.current_step = min(pruner.current_step + (coarse if min(left) > FAR else fine), channels) - 1
        previous = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner.step()
        _set_integers(model, pruner)
        now = {measure: 1 - count(model) / whole[measure] for measure, count in MEASURES.items()}
        for target in targets:
            measure, _, share = target
            if target not in found and now[measure] >= share:
                before_is_nearer = share - gone[measure] < now[measure] - share
                found[target] = previous if before_is_nearer else copy.deepcopy(model)
        gone = now
    return found


def _pruner(model: nn.Module, setting: Setting, steps: int) -> Any:
    heads: Mapping[nn.Module, int] = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    writers = ("mlp.fc2", "attn.proj") if setting.inside_blocks else ()
    ignored = [
        module
        for name, module in model.named_modules()
        if getattr(module, "out_features", None) == CLASSES or (writers and name.endswith(writers))
    ]
    if setting.inside_blocks:
        ignored += [module for name, module in model.named_modules() if name.endswith("patch_embed.proj")]
    scores = {
        "taylor": lambda: tp.importance.GroupTaylorImportance(normalizer=setting.normalizer),
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer=setting.normalizer),
        "bn scale": lambda: tp.importance.BNScaleImportance(normalizer=setting.normalizer),
    }
    kinds = {"magnitude": tp.pruner.GroupNormPruner, "bn scale": tp.pruner.BNScalePruner}
    extra = {"reg": setting.regularization} if setting.importance == "bn scale" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kinds.get(setting.importance, tp.pruner.BasePruner)(
            model,
            torch.zeros(1, 1, SIDE, SIDE),
            importance=scores[setting.importance](),
            pruning_ratio=1.0,
            iterative_steps=steps,
            global_pruning=True,
            isomorphic=setting.isomorphic,
            ignored_layers=ignored,
            num_heads=dict(heads),
            in_channel_groups={},
            out_channel_groups=dict(heads),
            **extra,
        )


def _take_gradients(model: nn.Module, images: Images) -> None:
    model.zero_grad()
    batches: list[tuple[Tensor, Tensor]] = images.calibration
    for pixels, labels in batches:
        (functional.cross_entropy(model(pixels), labels) / len(batches)).backward()


def _set_integers(model: nn.Module, pruner: Any) -> None:
    """What torch-pruning's example for timm sets after a cut."""
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
