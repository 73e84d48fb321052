"""torch-pruning on one row of benchmarks/any_module.py, at the settings of its own examples.

Several settings are tried in turn until the cut model runs, trains, and has about the size that is asked for; of those that run
the one nearest to that size is taken:

* ``global``: group magnitude, one ranking for the whole model;
* ``uniform``: the same ratio in every layer, as most of its examples do;
* ``uniform, multiples of 8``: as its example for timm models;
* ``uniform, inside blocks``: what writes to a residual stream stays whole, as its example for transformers (``--bottleneck``);
* ``uniform, MLPs alone``: attention stays whole, too.

As in its examples the layers that give the outputs are ignored, attention layers are given by ``num_heads``, and integers of
attention modules are set after the cut. Its ratios are of channels: the ratio that removes the share of the parameters that
is asked for is searched for.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch_pruning as tp
from any_module_checks import compare, float_leaves, train_one_step
from any_module_models import CLASSES, Row
from torch import Tensor, nn

from lit_prune.errors import first_line
from lit_prune.groups import count_parameters

SETTINGS: dict[str, dict[str, Any]] = {
    "global": {"global_pruning": True},
    "uniform": {},
    "uniform, multiples of 8": {"round_to": 8},
    "uniform, inside blocks": {"whole": ("writers",)},
    "uniform, MLPs alone": {"whole": ("writers", "attention")},
}
TOLERANCE = 0.03
TRIES = 4
_JOINT = ("qkv", "in_proj", "qkv_proj", "query_key_value", "c_attn", "attn")
_SEPARATE = ("q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
_WRITERS = ("fc2", "proj", "out_proj", "c_proj", "down_proj", "o_proj", "output_dense", "linear2", "w3", "mlp.3")


class TracingError(Exception):
    """torch-pruning could not build its graph or groups of the model."""


def peer_row(row: Row, ratio: float, deadline: float) -> dict[str, Any]:
    """Prune a row to a ratio with the best of some settings.

    Args:
        row: The model.
        ratio: Share of all parameters to remove.
        deadline: ``time.monotonic()`` after which no further try begins.

    Returns:
        ``ran``: whether any setting worked; of the best one ``setting``, ``channels`` (the ratio given), ``before``, ``after``,
        ``removed``, ``masked``; ``errors`` by setting.
    """
    errors: dict[str, str] = {}
    best: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        if time.monotonic() > deadline:
            errors[name] = "not tried, for want of time"
            continue
        try:
            found = _search(row, ratio, setting, deadline)
        except TracingError as error:
            errors[name] = first_line(error.__cause__ or error)
            # tracing knows nothing of the settings
            break
        except Exception as error:
            errors[name] = first_line(error)
            continue
        if not best or abs(found["removed"] - ratio) < abs(best["removed"] - ratio):
            best = {"setting": name, **found}
        if abs(best["removed"] - ratio) < TOLERANCE:
            break
    return {"ran": bool(best), **best, "errors": errors}


def _search(row: Row, ratio: float, setting: dict[str, Any], deadline: float) -> dict[str, Any]:
    """The cut that is nearest to the ratio, of a few."""
    low, high, channels = 0.0, 1.0, 1 - (1 - ratio) ** 0.5
    best: dict[str, Any] = {}
    for _ in range(TRIES):
        try:
            found = cut(row, channels, setting)
        except Exception:
            if not best:
                raise
            break
        if not best or abs(found["removed"] - ratio) < abs(best["removed"] - ratio):
            best = found
        if abs(found["removed"] - ratio) < TOLERANCE or time.monotonic() > deadline:
            break
        low, high = (channels, high) if found["removed"] < ratio else (low, channels)
        nearer = channels * ratio / max(found["removed"], 0.01)
        channels = nearer if low < nearer < high else (low + high) / 2
    return best


def cut(row: Row, channels: float, setting: dict[str, Any]) -> dict[str, Any]:
    """Prune a fresh model by a ratio of channels, run it, train it for one step, and compare it with the masked dense model."""
    model, batch = row.make()
    dense = copy.deepcopy(model)
    before = count_parameters(model)
    _use_plain_attention(model)
    try:
        pruner = _pruner(row, model, batch, channels, setting)
    except Exception as error:
        raise TracingError from error
    consumers = _number_inputs(model)
    pruner.step()
    kept = {name: parameter.grad for name, parameter in model.named_parameters() if name in consumers}
    for parameter in model.parameters():
        parameter.grad = None
    _set_integers(model, pruner)
    after = count_parameters(model)
    if after == before:
        raise RuntimeError("removed nothing")
    with torch.no_grad():
        outputs = row.forward(model, batch)
    found = {
        "channels": channels,
        "before": before,
        "after": after,
        "removed": 1 - after / before,
        "masked": _masked(row, dense, batch, kept, outputs),
    }
    train_one_step(row, model, batch)
    return found


def _pruner(row: Row, model: nn.Module, batch: Any, channels: float, setting: dict[str, Any]) -> Any:
    heads = _heads(model)
    options: dict[str, Any] = {name: value for name, value in setting.items() if name != "whole"}
    with warnings.catch_warnings(), _without_rotation():
        warnings.simplefilter("ignore")
        return tp.pruner.BasePruner(
            model,
            example_inputs=batch,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=channels,
            max_pruning_ratio=0.95,
            num_heads=heads,
            ignored_layers=_ignored(model, setting.get("whole", ())),
            forward_fn=row.forward,
            output_transform=float_leaves,
            in_channel_groups={},
            out_channel_groups=dict(heads),
            **options,
        )


@contextlib.contextmanager
def _without_rotation() -> Iterator[None]:
    """Put LitGPT's rotation of queries and keys aside while torch-pruning traces, which does not end otherwise."""
    names = ("apply_rope", "apply_rope_interleave")
    model = sys.modules["litgpt.model"]
    functions = {name: getattr(model, name) for name in names}
    for name in names:
        setattr(model, name, lambda x, *_, **__: x)
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(model, name, function)


def _ignored(model: nn.Module, whole: Sequence[str]) -> list[nn.Module]:
    """The layers that give the outputs, by their width or name as in the examples, and those that are to stay whole."""
    ends = ("cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "lm_head", "mask_predictor", "flow_head")
    ignored: list[nn.Module] = list(_heads(model)) if "attention" in whole else []
    last: nn.Module | None = None
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not isinstance(weight, Tensor):
            if name.endswith(("roi_heads.box_predictor", "keypoint_predictor", "mask_predictor", "corr_block")):
                ignored.append(module)
            continue
        last = module
        outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
        if outputs == CLASSES or name.endswith(ends) or ("writers" in whole and name.endswith(_WRITERS)):
            ignored.append(module)
    return ignored if last is None else [*ignored, last]


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        named = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads")]
        named.append(getattr(getattr(module, "config", None), "n_head", None))
        count = next((value for value in named if isinstance(value, int)), None)
        if count is None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            heads[module] = count
            continue
        for name, child in module.named_children():
            if name in (*_JOINT, *_SEPARATE) and isinstance(child, (nn.Linear, nn.Conv2d)):
                heads[child] = count
    return heads


def _use_plain_attention(model: nn.Module) -> None:
    """As timm's example sets ``TIMM_FUSED_ATTN=0``: torch-pruning does not see through the fused kernel."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")


def _set_integers(model: nn.Module, pruner: Any) -> None:
    """What the examples set after the cut: head counts and head sizes, widths that a forward reads."""
    for module in model.modules():
        children = dict(module.named_children())
        joint = next((children[n] for n in _JOINT if children.get(n) in pruner.num_heads), None)
        single = next((children[n] for n in _SEPARATE if children.get(n) in pruner.num_heads), None)
        layer = single if joint is None else joint
        if layer is None or not hasattr(module, "num_heads"):
            continue
        width = layer.weight.shape[0] // (1 if joint is None else 3)
        heads = pruner.num_heads[layer]
        values = {"num_heads": heads, "head_dim": width // heads, "attn_dim": width, "all_head_size": width}
        values["attention_head_size"] = values["head_dim"]
        for name, value in values.items():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, value)
    if isinstance(getattr(model, "hidden_dim", None), int) and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def _number_inputs(model: nn.Module) -> dict[str, int]:
    """Give the weights that read features the gradient that numbers these, and say along which dimension.

    torch-pruning cuts gradients along with weights, so that afterwards they say which features are still read.
    """
    consumers = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not isinstance(weight, nn.Parameter):
            continue
        dim = 0 if getattr(module, "transposed", False) else 1
        shape = [1] * weight.dim()
        shape[dim] = -1
        weight.grad = torch.arange(weight.shape[dim], dtype=weight.dtype).view(shape).expand_as(weight).contiguous()
        consumers[f"{name}.weight"] = dim
    return consumers


def _masked(row: Row, dense: nn.Module, batch: Any, kept: dict[str, Tensor | None], outputs: Any) -> dict[str, Any]:
    """Compare with the dense model whose weights that read removed features are zero.

    That the two agree cannot be expected where features were removed under a norm over them, or inside the heads of attention.
    """
    with torch.no_grad():
        for name, numbers in kept.items():
            weight = dense.get_parameter(name)
            if numbers is None or numbers.shape == weight.shape:
                continue
            module = dense.get_submodule(name.rpartition(".")[0])
            dim = 0 if getattr(module, "transposed", False) else 1
            line = numbers.movedim(dim, 0).flatten(1)
            gone = torch.ones(weight.shape[dim], dtype=torch.bool)
            gone[line[:, 0].long()] = False
            weight.movedim(dim, 0)[gone] = 0
        error = compare(row.forward(dense, batch), outputs)
    return {"error": error, "comparable": comparable(dense)}


def comparable(model: nn.Module) -> bool:
    """Whether channels of zeros have no effect anywhere: no norm but batch norm, no attention over features or channels."""
    names = [type(module).__name__.lower().removesuffix("2d").removesuffix("act") for module in model.modules()]
    mixing = ("norm", "attention", "attn", "ecamodule")
    return not any(name.endswith(mixing) and "batchnorm" not in name for name in names)
