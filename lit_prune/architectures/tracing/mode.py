"""Runs a model once and follows the positions of its parameters through every ATen operator that it calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from lit_prune.architectures.tracing import operators  # noqa: F401
from lit_prune.architectures.tracing.aliases import Aliases
from lit_prune.architectures.tracing.fields import Rules, Value, varies
from lit_prune.architectures.tracing.labels import Labels
from lit_prune.architectures.tracing.rules import RULES, Call, Rule, elementwise, is_pointwise, unknown
from lit_prune.torch_internals import DispatchMode, decompose, tree_leaves

OUTPUT = "the model's output"
PROTECTED = -1


class LabelTracer(DispatchMode):
    """Follows labels through the operators of a run.

    Args:
        model: The model whose parameters and buffers get labels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = Labels()
        self.rules = Rules(self.labels, self._reason)
        self.reasons: list[tuple[str, str]] = []
        self.running: list[str] = []
        self.first_use: dict[str, int] = {}
        self.read: dict[tuple[str, int], bool] = {}
        self.side_by_side: list[Tensor] = []
        self.reshaped: list[tuple[str, Tensor]] = []
        self.splits: list[tuple[str, tuple[int, ...], Tensor]] = []
        self.counted: list[tuple[str, Tensor]] = []
        self.shapes: list[tuple[str, tuple[int, ...], int, Tensor]] = []
        self.unknown: dict[tuple[str, str], None] = {}
        self.names = {id(m): name for name, m in model.named_modules()}
        self._operator = OUTPUT
        self._values: Any = WeakTensorKeyDictionary()
        self._aliases = Aliases(self.rules)
        self._sources: dict[int, tuple[str, Tensor, Value]] = {}
        self._by_address: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
        self._starts: list[int] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._add(name, tensor, is_buffer=not isinstance(tensor, nn.Parameter))

    def _add(self, name: str, tensor: Tensor, is_buffer: bool) -> None:
        if not tensor.is_floating_point() or id(tensor) in self._sources:
            return
        value = Value(tuple(tensor.shape), weight=True)
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                labels = self.labels.new_atoms(name, dim, size, is_buffer)
                value.fields.append(labels.view([size if d == dim else 1 for d in range(tensor.dim())]))
        self._sources[id(tensor)] = (name, tensor, value)
        self._by_address[tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())] = id(tensor)

    @property
    def _innermost(self) -> str:
        """Name of the innermost module that runs."""
        return self.running[-1] if self.running else ""

    def _reason(self) -> int:
        here = (self._innermost, self._operator)
        if not self.reasons or self.reasons[-1] != here:
            self.reasons.append(here)
        return len(self.reasons) - 1

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; of one that comes from elsewhere, its shape alone."""
        source = self._sources.get(id(tensor))
        known = self._values.get(tensor)
        if known is None and source is None and tensor.is_floating_point() and tensor.numel():
            # a view that was made behind autograd's back: parameter.data
            key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
            source = self._sources.get(self._by_address.get(key, 0))
        if source is not None:
            self.first_use.setdefault(source[0], len(self.first_use))
        if known is not None:
            while known.when_used:
                known.when_used.pop()()
            return known
        if source is not None:
            return source[2]
        return Value(tuple(tensor.shape), weight=False)

    @property
    def collapsed(self) -> list[tuple[int, int]]:
        """Labels that were united with others because their positions cannot be told apart, with why."""
        return self.rules.collapsed

    def reads(self, weight: Value, dim: int, other: Value) -> None:
        """Note which dimensions of parameters are multiplied with another value's positions."""
        for labels in weight.fields:
            if labels.shape[dim] > 1:
                for atoms in self.labels.owners(labels):
                    inside = self._innermost == atoms.name.rpartition(".")[0]
                    key = (atoms.name, atoms.dim)
                    self.read[key] = self.read.get(key, True) and inside

    def reads_otherwise(self, module: str) -> None:
        """Note that what a module is called with is not what its weight is multiplied with."""
        for name, dim in self.read:
            if name == f"{module}.weight":
                self.read[name, dim] = False

    def met(self, fields: Iterable[Tensor]) -> None:
        """Note which labels lie side by side in a product of two activations."""
        self.side_by_side.extend(fields)

    def met_shape(self, fields: Iterable[Tensor]) -> None:
        """Note in which module tensors with these labels got another shape."""
        self.reshaped.extend((self._innermost, f) for f in fields)

    def met_split(self, sizes: Sequence[int], dim: int, fields: Iterable[Tensor]) -> None:
        """Note the sizes that a module split labels into."""
        self.splits.extend((self._innermost, tuple(sizes), f.flatten()) for f in fields if varies(f) == (dim,))

    def met_number(self, labels: Tensor, dim: int, count: int) -> None:
        """Note the first positions along a dimension, as many as some number that a module may hold."""
        if labels.shape[dim] > 1 and 0 < count <= labels.shape[dim]:
            self.counted.append((self._innermost, _along(labels.narrow(dim, 0, count), dim)))

    def met_dimension(self, labels: Tensor, dim: int, shape: Sequence[int]) -> None:
        """Note the positions along a dimension of a shape."""
        first = _along(labels, dim)
        self.counted.append((self._innermost, first))
        self.shapes.append((self._innermost, tuple(shape), dim, first))

    def finish(self, returned: Any) -> None:
        """What the run returned has to stay as it is."""
        self._operator = OUTPUT
        self.running.clear()
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self.rules.rigid(self.value(leaf))

    def keep_outputs(self, module: str) -> None:
        """Let what the parameters of a module produce stay, but not what they read."""
        for atoms in self.labels.atoms:
            if atoms.name.rpartition(".")[0] == module and (atoms.name, atoms.dim) not in self.read:
                self.labels.freeze(atoms.labels(), PROTECTED)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.startswith("__")
        base = name.removesuffix("_") if in_place else name
        known = RULES.get(name) or RULES.get(base)
        if known is None and not is_pointwise(func):
            decomposed = self._decomposed(func, args, kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        before = self._operator
        self._operator = str(func.overloadpacket).removeprefix("aten.")
        result = func(*args, **kwargs)
        call = Call(self, func, args, kwargs, result)
        if known is None and is_pointwise(func):
            known = elementwise
        for tensor, value in zip(call.results(), self._followed(call, known), strict=True):
            self._set(tensor, value, in_place or "out" in kwargs)
        self._operator = before
        return result

    def _followed(self, call: Call, known: Rule | None) -> list[Value]:
        """What is known of the results; where there is no rule, or it does not fit the call, the inputs stay whole."""
        if known is not None:
            # arguments of a kind that the rule was not written for
            with contextlib.suppress(IndexError, RuntimeError, ValueError):
                return known(call)
        if any(self.value(t).fields for t in call.tensors()):
            self.unknown[self._innermost, self._operator] = None
        return unknown(call)

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator as PyTorch writes it with simpler ones, which are followed; else ``NotImplemented``."""
        with self:
            return decompose(func, args, kwargs)

    def _set(self, tensor: Tensor, value: Value, written: bool) -> None:
        if written:
            self._aliases.write(tensor, value, self)
        self._values[tensor] = value
        self._aliases.add(tensor)

    def set_value(self, tensor: Tensor, value: Value) -> None:
        """Replace what is known of a tensor."""
        self._values[tensor] = value


@contextlib.contextmanager
def hooked(root: nn.Module, tracer: LabelTracer) -> Iterator[None]:
    """Tell the tracer which module runs."""
    depth: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        depth.append(len(tracer.running))
        if id(module) in tracer.names:
            tracer.running.append(tracer.names[id(module)])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del tracer.running[depth.pop() if depth else 0 :]

    handles = [
        module_hooks.register_module_forward_pre_hook(before),
        module_hooks.register_module_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Run modules by ordinary operators: no fused attention, no fused recurrent layers, nothing compiled."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    onednn: Any = torch.backends.mkldnn
    enabled = onednn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # by the flag alone: the context manager of PyTorch warns about other flags of other devices
    onednn.enabled = False
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.backends.cudnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        onednn.enabled = enabled


def _along(labels: Tensor, dim: int) -> Tensor:
    """One label for each position along a dimension, the first of those there."""
    return labels.movedim(dim, 0).reshape(labels.shape[dim], -1)[:, 0]


def trace(model: nn.Module, run: Callable[[], Any], root: nn.Module) -> LabelTracer:
    """Run ``run`` once and return what was learnt of the positions of the model's parameters.

    Args:
        model: The model.
        run: Runs a batch through ``root``.
        root: The module that holds the model.
    """
    tracer = LabelTracer(model)
    follow(tracer, run, root)
    return tracer


def follow(tracer: LabelTracer, run: Callable[[], Any], root: nn.Module) -> None:
    """Run ``run`` once and add what is learnt of the positions of the model's parameters.

    Args:
        tracer: What was learnt before.
        run: Runs a batch through ``root``.
        root: The module that holds the model.
    """
    with torch.no_grad(), plain_kernels(), hooked(root, tracer), tracer:
        returned = run()
    with torch.no_grad():
        tracer.finish(returned)
