"""Checks on one batch that the modules to prune compute what their weights say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.layers import first_tensor
from lit_prune.architectures.plain_modules import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED,
    class_forward,
    has_own_forward,
    hook_name,
)
from lit_prune.calibration.collect import _together
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.weight_gradients import _everywhere
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet
from lit_prune.torch_internals import convolve, forward_hooks, forward_pre_hooks, tree_leaves

# batches to look at until one reaches the model: a training step may skip some
_ATTEMPTS = 8


# units in the last place of 16-bit results that another order of summation may change
_UNITS = 4


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
    those that a module was called with; a hook that changes them shows, too. Where groups were found by running the model, and
    not described by blocks, derived classes of layers may compute what they want: the cut was compared with the masked model.

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
    linear = {
        s.module
        for g in group_sets
        for s in g.slices
        if s.input_dim is not None and (g.block or not has_own_forward(modules[s.module]))
    }
    watches = [_Watch(path, m, path in linear) for path, m in modules.items() if _has_formula(m)]
    cache = _CacheWatch(model)
    shards.reshard(model)
    with evaluation_mode(model if root is None else root):
        try:
            cache.start()
            for watch in watches:
                watch.start()
            # all processes run the same number: a step may wait for the others
            for batch in islice(_together(batches, ranks), _ATTEMPTS):
                forward(batch)
                if _everywhere(cache.called or any(watch.called for watch in watches), ranks):
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


def filled(cache: Cache) -> str:
    """What a cache holds already of earlier tokens, in words; empty if nothing."""
    try:
        tokens = int(cache.get_seq_length())
    except ValueError:
        # recurrent layers alone: they keep a state, and no number of tokens
        return "a state of earlier tokens" if cache.has_previous_state() else ""
    return f"{tokens} tokens" if tokens else ""


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
        self._hooks = [hook_name(h) for h in forward_hooks(module)]
        self._pre_hooks = [hook_name(h) for h in forward_pre_hooks(module)]

    def start(self) -> None:
        """Put the hooks on, around those that are there."""
        if self._pre_hooks:
            self._handles.append(self._module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        self._handles.append(self._module.register_forward_hook(self._after, with_kwargs=True))

    def stop(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_tensor(module, args, kwargs)
        if not self.called and first is not None:
            # a copy: the hooks behind may change it in place
            self._given = first.detach().clone()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.called:
            return
        self.called = True
        first = first_tensor(module, args, kwargs)
        if first is None or shards.any_sharded(module.parameters()) is not None:
            return
        what = f"{self._path} ({type(module).__name__})"
        if self._given is not None and (apart := _apart(first, self._given)):
            self.problem = (
                f"{what}: a forward pre-hook ({', '.join(self._pre_hooks)}) changes its input (largest relative difference"
                f" {apart:.3g}), which neither cut nor repair would know of. Remove the hook before pruning."
            )
            return
        try:
            expected = _product(module, args, kwargs) if self._linear else class_forward(module)(*args, **kwargs)
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
            convolves = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
            what = "the convolution of its input with its weight" if convolves else "x W^T + b"
            return "x W + b" if isinstance(module, Conv1D) else what
        return f"what the forward of {class_forward(module).func.__qualname__.partition('.')[0]} does"


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


def _product(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The product of an input with the weight of a linear layer, a Conv1D or a convolution, and its bias."""
    if isinstance(module, TRANSPOSED):
        # its call may say how large the output is to be
        transposed: Any = next(c for c in TRANSPOSED if isinstance(module, c))
        return transposed.forward(module, *args, **kwargs)
    x = first_tensor(module, args, kwargs)
    assert x is not None
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(module.weight.dtype)
    if isinstance(module, CONVOLUTIONS):
        return convolve(next(c for c in CONVOLUTIONS if isinstance(module, c)), module, x)
    return functional.linear(x, module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias)
