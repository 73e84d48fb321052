"""Checks, before any calibration, that the modules to prune are what they look like.

A module may be an ``nn.Linear`` by class and compute something else: its weight is made of other tensors (a parametrization,
a mask), a hook changes what it gives, a subclass adds a term. Cuts and repair take ``x W^T + b`` for granted, so
:func:`check_plain` and :func:`check_parameters` look at what modules hold, and :func:`check_computation` compares what they
give on one batch with the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from lit_prune import sharding
from lit_prune.distributed import Ranks
from lit_prune.errors import UnsupportedModelError
from lit_prune.evaluation import evaluation_mode
from lit_prune.groups import GroupSet, check_names

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR = (nn.Linear, Conv1D, *CONVOLUTIONS)
# batches to look at until one reaches the model: a training step may skip some
_ATTEMPTS = 8
# units in the last place of 16-bit results that another order of summation may change
_UNITS = 4


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
                " parametrize the pruned module anew."
            )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            found, remedy = "masked by torch.nn.utils.prune", f"prune.remove(module, {hook._tensor_name!r})"
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


def check_parameters(model: nn.Module, group_sets: Sequence[GroupSet], root: nn.Module | None = None) -> None:
    """Refuse weights that are not in memory, or that a module beside the model holds, too.

    Args:
        model: The model.
        group_sets: Its group sets.
        root: The module that holds the model, whose other modules are searched.

    Raises:
        UnsupportedModelError: With what was found at which module, and what to do first.
    """
    check_names(model, group_sets)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name!r} has no values in memory (it is on the device 'meta'){_offloaded_by(model, name)}. Load the whole model"
                " onto a CPU or GPU, without offloading (device_map=None, low enough precision to fit), before pruning."
            )
    _check_beside(model, group_sets, model if root is None else root)


def _offloaded_by(model: nn.Module, name: str) -> str:
    owner = name.rpartition(".")[0]
    while True:
        hook = getattr(model.get_submodule(owner), "_hf_hook", None)
        if hook is not None:
            return f": accelerate's {type(hook).__name__} at {owner or '(root)'!r} offloads it"
        if not owner:
            return ""
        owner = owner.rpartition(".")[0]


def _check_beside(model: nn.Module, group_sets: Sequence[GroupSet], root: nn.Module) -> None:
    parameters = {s.parameter: model.get_parameter(s.parameter) for g in group_sets for s in g.slices}
    by_identity = {id(p): name for name, p in parameters.items()}
    by_address = {address: name for name, p in parameters.items() if (address := _address(p))}
    inside = {id(module) for module in model.modules()}
    for path, module in _reachable(root):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = by_identity.get(id(parameter)) if id(module) not in inside else None
            if id(parameter) not in by_identity:
                name = by_address.get(_address(parameter))
            if name is not None:
                raise UnsupportedModelError(
                    f"{name!r} shares its values with {key!r} of {path or '(root)'} ({type(module).__name__}): cutting one would"
                    " break the tie, or the other module. Untie them first: give one of them"
                    " nn.Parameter(weight.detach().clone())."
                )


def _address(parameter: Tensor) -> int:
    """Where the values start in memory; 0 if they are nowhere, or spread over processes."""
    if parameter.is_meta or sharding.is_sharded(parameter) or not parameter.numel():
        return 0
    return parameter.data_ptr()


def _reachable(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module, its submodules, and modules that they hold as plain attributes, also in lists and dictionaries."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if isinstance(value, nn.Module):
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield path, value
            children: Iterable[tuple[Any, Any]] = [*value._modules.items(), *vars(value).items()]
            children = [(k, v) for k, v in children if k not in ("_modules", "_parameters", "_buffers")]
            depth = 0
        elif isinstance(value, Mapping) and depth < 3:
            children = value.items()
        elif isinstance(value, list | tuple | set) and depth < 3:
            children = enumerate(value)
        else:
            continue
        waiting += [
            (f"{path}.{k}" if path else str(k), v, depth + 1)
            for k, v in children
            if isinstance(v, nn.Module | Mapping | list | tuple | set)
        ]


def tolerance(*dtypes: torch.dtype) -> float:
    """How far two results of one computation may be apart, relative to the largest value."""
    return max(1e-4, *(_UNITS * torch.finfo(dtype).eps for dtype in dtypes))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; 0 of nothing, infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not bool(finite.any()):
        return 0.0
    expected, found = expected[finite].double(), found[finite].double()
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if difference == 0:
        return 0.0
    return difference / scale if scale else float("inf")


@torch.no_grad()
def check_computation(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
    kinds: Collection[str] | None = None,
) -> None:
    """Compare what the modules of the groups give on one batch with what their weights say, before any calibration.

    Linear layers, Conv1D and convolutions are compared with the formula of their weight and bias, other modules with the
    ``forward`` of their class, that of torch for an ``nn.MultiheadAttention``: hooks, patches and subclasses show. Inputs are
    those that a module was called with; a hook that changes them shows, too.

    Args:
        model: The model.
        group_sets: Its group sets.
        batches: Batches, the first of which that reaches the model is run, once.
        forward: Runs one batch through the model.
        root: The module that holds the model, if ``forward`` runs more than the model.
        ranks: The processes of a distributed run; all of them raise if one finds something.
        kinds: The kinds of groups that may leave; all if ``None``.

    Raises:
        UnsupportedModelError: For modules that compute something else, with paths, differences, and what to do; and for a
            model that is called with a cache of keys and values made elsewhere, if heads may leave.
    """
    modules = {s.module: model.get_submodule(s.module) for g in group_sets for s in g.slices}
    linear = {s.module for g in group_sets for s in g.slices if s.input_dim is not None}
    watches = [_Watch(path, m, path in linear) for path, m in modules.items() if _has_formula(m)]
    cache = _CacheWatch(model)
    sharding.reshard(model)
    with evaluation_mode(model if root is None else root):
        try:
            cache.start()
            for watch in watches:
                watch.start()
            for batch in islice(batches, _ATTEMPTS):
                forward(batch)
                if cache.called or any(watch.called for watch in watches):
                    break
        finally:
            cache.stop()
            for watch in watches:
                watch.stop()
    problems = [watch.problem for watch in watches if watch.problem]
    if cache.problem and any("attention" in s.kind and (kinds is None or s.kind in kinds) for s in group_sets):
        problems.append(cache.problem)
    if ranks is not None and not ranks.all(not problems) and not problems:
        problems = ["another process found a module that does not compute what its weights say; see its error"]
    if problems:
        more = f" ({len(problems) - 1} more modules differ likewise.)" if len(problems) > 1 else ""
        raise UnsupportedModelError(problems[0] + more)


def filled(cache: Cache) -> int:
    """How many tokens a cache of keys and values holds already."""
    return int(cache.get_seq_length())


class _CacheWatch:
    """A hook that looks whether the model's first call brings a cache with tokens: somebody else's, for all heads."""

    def __init__(self, model: nn.Module) -> None:
        self.called = False
        self.problem: str | None = None
        self._model = model

    def start(self) -> None:
        """Put the hook on."""
        self._handle = self._model.register_forward_pre_hook(self._look, with_kwargs=True)

    def stop(self) -> None:
        """Take it off."""
        self._handle.remove()

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caches = [] if self.called else [a for a in (*args, *kwargs.values()) if isinstance(a, Cache)]
        self.called = True
        if any(filled(cache) for cache in caches):
            self.problem = (
                f"{type(self._model).__name__} is called with a cache that holds tokens already (prefix tuning), of as many"
                " key/value heads in every layer; layers that lose some could not read it. Merge or remove the adapter"
                " before pruning, or prune only channels (kinds=['mlp'])."
            )


def _has_formula(module: nn.Module) -> bool:
    """Whether the module can be computed once more by itself: it has no parts with weights that another call would change."""
    if isinstance(module, (*LINEAR, nn.MultiheadAttention)):
        return True
    return all(next(child.parameters(), None) is None for child in module.children())


class _Watch:
    """Hooks around one module that compare its first call with what its weights say.

    Args:
        path: Its qualified name.
        module: The module.
        linear: Whether its description takes it for no more than a product with its weight.
    """

    def __init__(self, path: str, module: nn.Module, linear: bool) -> None:
        self.called = False
        self.problem: str | None = None
        self._path, self._module = path, module
        self._linear = linear and isinstance(module, LINEAR)
        self._given: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._hooks = [hook_name(h) for h in module._forward_hooks.values()]
        self._pre_hooks = [hook_name(h) for h in module._forward_pre_hooks.values()]

    def start(self) -> None:
        """Put the hooks on, around those that are there."""
        if self._pre_hooks:
            self._handles.append(self._module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        self._handles.append(self._module.register_forward_hook(self._after, with_kwargs=True))

    def stop(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = _first_tensor(args, kwargs)
        if not self.called and first is not None:
            # a copy: the hooks behind may change it in place
            self._given = first.detach().clone()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.called:
            return
        self.called = True
        first = _first_tensor(args, kwargs)
        if first is None or sharding.any_sharded(module.parameters()) is not None:
            return
        what = f"{self._path} ({type(module).__name__})"
        if self._given is not None and (apart := _apart(first, self._given)):
            self.problem = (
                f"{what}: a forward pre-hook ({', '.join(self._pre_hooks)}) changes its input (largest relative difference"
                f" {apart:.3g}), which neither cut nor repair would know of. Remove the hook before pruning."
            )
            return
        try:
            expected = _product(module, first) if self._linear else class_forward(module)(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            self.problem = (
                f"{what} does not compute {self._formula(module)}, which fails: {error}. {self._hint(module)}"
            )
            return
        if apart := _outputs_apart(_tensors(output), _tensors(expected)):
            self.problem = (
                f"{what} does not compute {self._formula(module)} (largest relative difference {apart:.3g}), so that neither cut"
                f" nor repair would be right. {self._hint(module)}"
            )

    def _hint(self, module: nn.Module) -> str:
        if self._hooks:
            return f"Its forward hooks are {', '.join(self._hooks)}: remove the one that changes its output before pruning."
        if "forward" in vars(module):
            return "Its forward was replaced on the instance: put back that of its class before pruning."
        return (
            f"Its class {type(module).__module__}.{type(module).__qualname__} does something of its own: merge that into the"
            " weight, and put a plain module of torch in its place before pruning."
        )

    def _formula(self, module: nn.Module) -> str:
        if self._linear:
            what = "the convolution of its input with its weight" if isinstance(module, CONVOLUTIONS) else "x W^T + b"
            return "x W + b" if isinstance(module, Conv1D) else what
        return f"what the forward of {class_forward(module).func.__qualname__.partition('.')[0]} does"


def hook_name(hook: Any) -> str:
    """The name of a hook, for a message."""
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _outputs_apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if len(found) != len(expected):
        return float("inf")
    return max((_apart(f, e) for f, e in zip(found, expected, strict=True)), default=0.0)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The relative difference if it is more than rounding, else 0."""
    difference = relative_difference(found, expected)
    return difference if difference > tolerance(found.dtype, expected.dtype) or difference != difference else 0.0


def class_forward(module: nn.Module) -> partial[Any]:
    """What a module does by its class alone; a subclass of ``nn.MultiheadAttention`` what that does, as it will after a cut."""
    kind: Any = type(module)
    cut_before = any("forward" in vars(mixin) for mixin in getattr(kind, "adapted_by", ()))
    if isinstance(module, nn.MultiheadAttention) and not cut_before:
        kind = nn.MultiheadAttention
    return partial(kind.forward, module)


def _product(module: Any, x: Tensor) -> Tensor:
    """The product of an input with the weight of a linear layer, a Conv1D or a convolution, and its bias."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(module.weight.dtype)
    if isinstance(module, CONVOLUTIONS):
        base: Any = next(c for c in CONVOLUTIONS if isinstance(module, c))
        # torch's own, past what a subclass makes of it; it knows of padding modes
        return base._conv_forward(module, x, module.weight, module.bias)
    return functional.linear(x, module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias)
