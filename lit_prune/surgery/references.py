"""Other things that hold a model's parameters or tensors of their sizes: hooks, ties, hand-written copies.

A parameter keeps its identity when it is cut, so whoever holds the parameter itself follows. What holds a tensor of the
parameter's old size does not, and is found here before any work is done.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lit_prune.architectures.weight_checks import shared_beside
from lit_prune.distributed import shards
from lit_prune.errors import ReferenceHeldError
from lit_prune.torch_internals import hook_tables

_OWN = frozenset(vars(nn.Module()))


def items(value: Any) -> Iterator[Any]:
    """The value itself, or the items of a container: the keys and values of a mapping, the elements of a sequence."""
    if isinstance(value, Mapping):
        yield from (*value, *value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    else:
        yield value


def attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds beside what ``nn.Module`` itself keeps track of (parameters, buffers, submodules, hooks)."""
    own = _OWN if isinstance(owner, nn.Module) else ()
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if name not in own:
            yield name, value


def parameter_hooks(parameter: Tensor) -> Iterator[Callable[..., Any]]:
    """The hooks that are called with a parameter's gradient, or once it is accumulated."""
    for hooks in hook_tables(parameter):
        yield from list(hooks.values())


def held_by(hook: Any) -> Iterator[tuple[str, Any]]:
    """What a function or callable object holds, one level deep, with words for the place."""
    if isinstance(hook, functools.partial):
        for position, value in enumerate(hook.args):
            yield f"argument {position}", value
        for name, value in hook.keywords.items():
            yield f"argument {name!r}", value
        yield from held_by(hook.func)
        return
    if isinstance(hook, types.MethodType):
        if not isinstance(hook.__self__, nn.Module):
            for name, value in attributes(hook.__self__):
                yield f"attribute {name!r}", value
        hook = hook.__func__
    if isinstance(hook, types.FunctionType):
        for name, cell in zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a variable that is not assigned yet
                yield f"variable {name!r}", cell.cell_contents
        for position, value in enumerate((*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values())):
            yield f"default {position}", value
        for name in hook.__code__.co_names:
            if name in hook.__globals__:
                yield f"global {name!r}", hook.__globals__[name]
    elif not isinstance(hook, nn.Module):
        for name, value in attributes(hook):
            yield f"attribute {name!r}", value


def check_hooks(model: nn.Module, touched: Mapping[str, Collection[int]]) -> None:
    """Refuse hooks of parameters that hold a tensor which fits the parameter's gradient at its present size only.

    Args:
        model: The model.
        touched: By the name of every parameter that may be cut, the dimensions along which it may lose something.

    Raises:
        ReferenceHeldError: Naming parameter, hook, and where the hook holds the tensor.
    """
    own = {id(p) for p in model.parameters()}
    for name, dims in touched.items():
        parameter = model.get_parameter(name)
        for hook in parameter_hooks(parameter):
            for place, value in held_by(hook):
                for item in items(value):
                    if isinstance(item, Tensor) and id(item) not in own and _follows(item, parameter, dims):
                        raise ReferenceHeldError(
                            f"A hook of the parameter {name!r}, {_described(hook)}, holds a tensor of shape"
                            f" {tuple(item.shape)} ({place}), which would not fit the smaller gradient; the parameter has"
                            f" shape {tuple(parameter.shape)}. Remove the hook before the cut and register one of the new"
                            " size after it."
                        )


def _follows(tensor: Tensor, parameter: Tensor, dims: Collection[int]) -> bool:
    """Whether a tensor is broadcast against a parameter and has the parameter's size along a dimension that is cut."""
    shape = (1,) * (parameter.dim() - tensor.dim()) + tuple(tensor.shape)
    if len(shape) != parameter.dim() or any(a not in (1, b) for a, b in zip(shape, parameter.shape, strict=True)):
        return False
    return any(shape[d] == parameter.shape[d] > 1 for d in dims)


def _described(hook: Any) -> str:
    hook = hook.func if isinstance(hook, functools.partial) else hook
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


@contextlib.contextmanager
def suspended_hooks(root: nn.Module) -> Iterator[None]:
    """Take the hooks off all parameters, and put them back in their order at the end.

    Calibration's gradients are no training's: a hook that steps an optimizer would change the weights, one that logs would
    log them, one that changes the gradient would change the ranking. Hooks that are registered meanwhile are called.
    """
    taken = [(hooks, dict(hooks)) for p in root.parameters() for hooks in hook_tables(p)]
    for hooks, _ in taken:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in taken:
            meanwhile = dict(hooks)
            hooks.clear()
            hooks.update({**before, **meanwhile})


def check_ties(root: nn.Module, model: nn.Module, touched: Iterable[str]) -> None:
    """Refuse to cut parameters that a module beside the model uses as well.

    Args:
        root: The module that holds the model.
        model: The model.
        touched: Names of the parameters that may be cut.

    Raises:
        ReferenceHeldError: Naming both.
    """
    for name, attribute, path, _ in shared_beside(root, model, touched):
        raise ReferenceHeldError(
            f"{name!r} of the model is tied to {f'{path}.{attribute}'.lstrip('.')!r}, a module beside the model, which does"
            " not follow the cut. Untie them, or protect the layer (protect=[...])."
        )


def stale_copies(owner: Any, model: nn.Module, touched: Collection[str]) -> Iterator[tuple[str, str]]:
    """Attributes of an object that the cut would leave at the old sizes, each with words for what it holds.

    These are mappings from parameter names to tensors and lists of tensors in the order of the parameters (an average kept
    by hand, values to compare with), and parameters that FSDP2 shards, in whose place the cut puts new ones.

    Args:
        owner: The object.
        model: The model.
        touched: Names of the parameters that may be cut.
    """
    yield from _stale_copies(owner, dict(model.named_parameters(remove_duplicate=False)), touched)


def _stale_copies(owner: Any, parameters: Mapping[str, Tensor], touched: Collection[str]) -> Iterator[tuple[str, str]]:
    own = {id(p) for p in parameters.values()}
    sharded = {id(p) for p in parameters.values() if shards.is_sharded(p)}
    for attribute, value in attributes(owner):
        found = _named_copy(value, parameters, touched, own) or _listed_copy(value, parameters, own)
        if not found and any(id(item) in sharded for item in items(value)):
            found = "parameters of the model that FSDP2 shards"
        if found:
            yield attribute, found


def check_copies(root: nn.Module, model: nn.Module, touched: Collection[str]) -> None:
    """Refuse modules that hold tensors of the model's sizes before the cut; see :func:`stale_copies`.

    Raises:
        ReferenceHeldError: Naming module and attribute.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, module in root.named_modules():
        for attribute, found in _stale_copies(module, parameters, touched):
            raise ReferenceHeldError(
                f"{type(module).__name__}.{attribute} (module {path or 'at the top'!r}) holds {found}, which the cut would"
                " leave at the old sizes. Make it after the cut, or keep it in a callback that defines"
                " on_pruning_end(trainer, pl_module, pruning) and makes it again there."
            )


def _named_copy(
    value: Any, parameters: Mapping[str, Tensor], touched: Collection[str], own: Collection[int]
) -> str | None:
    if not isinstance(value, Mapping):
        return None
    for key, item in list(value.items()):
        if isinstance(item, Tensor) and id(item) not in own:
            if isinstance(key, str):
                names = [n for n in touched if key == n or key.endswith(f".{n}") or n.endswith(f".{key}")]
            else:
                names = [n for n in touched if parameters[n] is key]
            if any(item.shape == parameters[n].shape for n in names):
                return f"a tensor of shape {tuple(item.shape)} for the parameter {names[0]!r}"
    return None


def _listed_copy(value: Any, parameters: Mapping[str, Tensor], own: Collection[int]) -> str | None:
    if not isinstance(value, (list, tuple)) or len(value) < 2 or not all(isinstance(v, Tensor) for v in value):
        return None
    distinct = list({id(p): p for p in parameters.values()}.values())
    if any(id(v) in own for v in value):
        return None
    shapes = [tuple(v.shape) for v in value]
    for wanted in (distinct, [p for p in distinct if p.requires_grad]):
        sizes = [tuple(p.shape) for p in wanted]
        starts = range(len(shapes) - len(sizes) + 1) if sizes else ()
        if any(shapes[start : start + len(sizes)] == sizes for start in starts):
            return f"{len(sizes)} tensors of the shapes of the model's parameters"
    return None
