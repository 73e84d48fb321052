"""Checks that a module's weights are its own parameters, and that it holds nothing beside them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UnsupportedModelError
from lit_prune.torch_internals import forward_pre_hooks, has_own_code, pruned_name

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# what multiplies its inputs with its weight
LINEAR = (nn.Linear, Conv1D, *CONVOLUTIONS, *TRANSPOSED)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer or convolution is of a derived class with a forward of its own, which may do more than multiply."""
    kind = next((kind for kind in LINEAR if isinstance(module, kind)), None)
    return kind is not None and has_own_code(module, kind)


def check_plain(module: nn.Module, path: str) -> None:
    """Refuse a module whose weights are computed from other tensors, or that has tensors beside weight and bias.

    Args:
        module: The module that owns weights of groups.
        path: Its qualified name, for the message.

    Raises:
        UnsupportedModelError: With what was found there, and what to call first.
    """
    what = f"{path} ({type(module).__name__})"
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            raise UnsupportedModelError(
                f"{what}: its {name!r} is computed by a parametrization ({', '.join(type(p).__name__ for p in chain)}) and cannot"
                f" be cut. Call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) on it before pruning, and"
                " parametrize the pruned module again."
            )
    for hook in forward_pre_hooks(module):
        if isinstance(hook, BasePruningMethod):
            found, remedy = "masked by torch.nn.utils.prune", f"prune.remove(module, {pruned_name(hook)!r})"
        elif isinstance(hook, WeightNorm):
            found, remedy = "computed by weight_norm", f"remove_weight_norm(module, {hook.name!r})"
        elif isinstance(hook, SpectralNorm):
            found, remedy = "computed by spectral_norm", f"remove_spectral_norm(module, {hook.name!r})"
        else:
            continue
        raise UnsupportedModelError(
            f"{what}: its weight is {found} and cannot be cut. Call torch.nn.utils.{remedy} on it before pruning."
        )
    if isinstance(module, LINEAR) and (names := _tensors_beside_weight(module)):
        raise UnsupportedModelError(
            f"{what} has tensors beside its weight and bias: {names}. A cut would leave them at their old sizes. Merge them into"
            " the weight, and put a plain module of the same class of torch in its place before pruning."
        )


def _tensors_beside_weight(module: nn.Module) -> list[str]:
    plain = {n: v for n, v in vars(module).items() if isinstance(v, Tensor)}
    found = {**dict(module.named_parameters()), **dict(module.named_buffers()), **plain}
    return sorted(name for name, tensor in found.items() if name not in ("weight", "bias") and tensor.numel() > 1)


def hook_name(hook: Any) -> str:
    """The name of a hook, for a message."""
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def class_forward(module: nn.Module) -> partial[Any]:
    """What a module does by its class alone; a subclass of ``nn.MultiheadAttention`` what that does, as it will after a cut."""
    kind: Any = type(module)
    cut_before = any("forward" in vars(mixin) for mixin in getattr(kind, "adapted_by", ()))
    if isinstance(module, nn.MultiheadAttention) and not cut_before:
        kind = nn.MultiheadAttention
    return partial(kind.forward, module)
