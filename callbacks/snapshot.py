"""Putting back what calibration changed in Python: attributes, containers, tensors, random number generators."""

from __future__ import annotations

import functools
import io
import random
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_prune.calibration.module_state import refill
from lit_prune.distributed import shards

# larger containers are kept without a look at what is in them, and those beyond the second bound only by their length
_LOOK_INSIDE, _COPY = 1_000, 100_000
# bytes of tensors and arrays that are copied, each and all of them together
_SMALL, _ALL_SMALL = 2**20, 2**26

_ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    torch.dtype,
    torch.device,
    torch.Size,
)
# what belongs to the run and not to the user's module
_OTHERS = (pl.Trainer, pl.Callback, Logger, Strategy)
_OURS = (nn.Module, pl.LightningDataModule, DataLoader, Dataset, Sampler, LRScheduler)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "lightning", "pytorch_lightning", "lit_prune", "numpy"} - {
    "collections"
}
# an object that holds one of these has a state outside of Python
_RESOURCES = {"_io", "io", "_thread", "threading", "queue", "_queue", "socket", "subprocess", "multiprocessing", "mmap"}


class Snapshot:
    """The state of some objects and of everything they refer to, to be put back in place.

    Every object stays the object it is, so that all references to it stay valid: containers get their old items back,
    objects their attributes, generators their state, small tensors their values. Large tensors are not copied; they are
    listed in ``large`` for others to guard. Parameters get back their storage, flag and gradient, but not their values.

    Args:
        roots: The objects, by what to call them in messages.

    Attributes:
        large: Tensors that were not copied, by name; all parameters among them.
        unknown: Names of what was too large to keep. A change of it is noticed only if its length changes.
        lost: Names of what changed and could not be put back; others may add to it.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]]) -> None:
        self.large: list[tuple[str, Tensor]] = []
        self.unknown: list[str] = []
        self.lost: list[str] = []
        self._seen: dict[int, Any] = {}
        self._restore: list[Callable[[], None]] = []
        self._fingerprints: list[tuple[str, Callable[[], Any], Any]] = []
        self._copied = 0
        self._queue: deque[tuple[str, Any]] = deque(roots)
        while self._queue:
            name, value = self._queue.popleft()
            if not isinstance(value, _ATOMS) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._take(name, value)

    def restore(self) -> None:
        """Put everything back, and add to ``lost`` what cannot be."""
        self.lost += [name for name, fingerprint, before in self._fingerprints if fingerprint() != before]
        for restore in self._restore:
            restore()

    def _take(self, name: str, value: Any) -> None:
        if type(value) in weakref.ProxyTypes or isinstance(value, _OTHERS):
            return
        if isinstance(value, Tensor):
            self._take_tensor(name, value)
        elif isinstance(value, np.ndarray):
            self._take_array(name, value)
        elif (state := _generator_state(value)) is not None:
            self._restore.append(state)
        elif isinstance(value, (list, dict, set, deque, bytearray)):
            self._take_container(name, value)
            if getattr(value, "__dict__", None):
                self._take_object(name, value)
        elif isinstance(value, (tuple, frozenset)):
            self._look_inside(name, value)
        elif isinstance(value, Optimizer):
            # its state and its parameters are stepped, which calibration does not let happen
            inner = [(k, v) for k, v in vars(value).items() if isinstance(v, Optimizer)]
            self._queue.extend((f"{name}.{key}", item) for key, item in [("param_groups", value.param_groups), *inner])
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self._take_function(name, value)
        elif isinstance(value, Iterator) and not hasattr(value, "__dict__"):
            self._take_fingerprint(name, lambda: _position(value))
        elif isinstance(value, io.IOBase):
            self._take_fingerprint(name, lambda: None if value.closed or not value.seekable() else value.tell())
        elif _is_plain(value):
            self._take_object(name, value)
        elif hasattr(value, "__dict__"):
            self._take_fingerprint(name, lambda: {k: v for k, v in vars(value).items() if isinstance(v, _ATOMS)})

    def _take_tensor(self, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self.large.append((name, tensor))
            self._restore.append(_parameter(tensor))
            return
        size = tensor.numel() * tensor.element_size()
        if tensor.is_meta or tensor.is_inference() or shards.is_sharded(tensor):
            return
        if not self._affordable(size):
            self.large.append((name, tensor))
            return
        content = tensor.detach().clone()

        def restore() -> None:
            with torch.no_grad():
                if tensor.shape == content.shape:
                    tensor.copy_(content)
                else:
                    tensor.data = content

        self._restore.append(restore)

    def _take_array(self, name: str, array: np.ndarray) -> None:
        if array.dtype == object or not array.flags.writeable:
            return
        if not self._affordable(array.nbytes):
            self.unknown.append(name)
            return
        content = array.copy()

        def restore() -> None:
            array[...] = content

        self._restore.append(restore)

    def _affordable(self, size: int) -> bool:
        if size > _SMALL or self._copied + size > _ALL_SMALL:
            return False
        self._copied += size
        return True

    def _take_container(self, name: str, container: Any) -> None:
        if len(container) > _COPY:
            self.unknown.append(name)
            self._take_fingerprint(name, lambda: len(container))
            return
        items = list(container.items()) if isinstance(container, dict) else list(container)
        self._restore.append(lambda: refill(container, items))
        self._look_inside(name, container)

    def _look_inside(self, name: str, container: Any) -> None:
        if len(container) > _LOOK_INSIDE:
            return
        named = container.items() if isinstance(container, dict) else enumerate(container)
        # the names of parameters, buffers and submodules as a user knows them
        hidden = name.endswith(("._parameters", "._buffers", "._modules"))
        prefix = name.rpartition(".")[0] if hidden else name
        for key, item in named:
            if not isinstance(item, _ATOMS):
                self._queue.append((f"{prefix}.{key}" if hidden else f"{prefix}[{key!r}]", item))

    def _take_function(self, name: str, function: Any) -> None:
        if isinstance(function, types.MethodType):
            self._queue.append((name, function.__self__))
            return
        if isinstance(function, functools.partial):
            self._queue.extend((name, item) for item in (function.func, function.args, function.keywords))
            return
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            self._restore.append(functools.partial(setattr, cell, "cell_contents", content))
            self._queue.append((name, content))

    def _take_fingerprint(self, name: str, fingerprint: Callable[[], Any]) -> None:
        self._fingerprints.append((name, fingerprint, fingerprint()))

    def _take_object(self, name: str, value: Any) -> None:
        attributes = vars(value) if hasattr(value, "__dict__") else {}
        before = list(attributes.items())
        self._restore.append(lambda: refill(attributes, before))
        slots = [s for s in _slots(type(value)) if hasattr(value, s)]
        for slot in slots:
            self._restore.append(functools.partial(setattr, value, slot, getattr(value, slot)))
        named = [*before, *((s, getattr(value, s)) for s in slots)]
        self._queue.extend((f"{name}.{k}", v) for k, v in named if not isinstance(v, _ATOMS))


def _is_plain(value: Any) -> bool:
    """Whether an object's state is its attributes, so that these can be put back."""
    if isinstance(value, (*_OURS, types.SimpleNamespace)):
        return True
    library = type(value).__module__.partition(".")[0]
    if library in _LIBRARIES or not (hasattr(value, "__dict__") or _slots(type(value))):
        return False
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    return not any(type(item).__module__.partition(".")[0] in _RESOURCES for item in held)


def _slots(kind: type) -> list[str]:
    declared = [vars(c)["__slots__"] for c in kind.__mro__ if "__slots__" in vars(c)]
    names = [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _parameter(parameter: nn.Parameter) -> Callable[[], None]:
    requires_grad, gradient, data = parameter.requires_grad, parameter.grad, parameter.data

    def restore() -> None:
        if not shards.is_sharded(parameter) and parameter.data_ptr() != data.data_ptr():
            parameter.data = data
        parameter.requires_grad_(requires_grad)
        parameter.grad = gradient

    return restore


def _generator_state(value: Any) -> Callable[[], None] | None:
    """What gives a random number generator its present state back; ``None`` for anything else."""
    if isinstance(value, torch.Generator):
        state = value.get_state()

        def restore() -> None:
            value.set_state(state)

        return restore
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _position(iterator: Any) -> Any:
    """Where an iterator stands, as far as it shows."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        local = {} if frame is None else frame.f_locals
        return (frame is None or frame.f_lasti, {k: v for k, v in local.items() if isinstance(v, _ATOMS)})
    with warnings.catch_warnings():
        # newer versions of Python mean to give this up
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            parts = iterator.__reduce__()[1:]
        except (TypeError, AttributeError):
            return None
    flat = [item for part in parts for item in (part if isinstance(part, tuple) else (part,))]
    return [item if isinstance(item, _ATOMS) else len(item) for item in flat if isinstance(item, (*_ATOMS, list))]
