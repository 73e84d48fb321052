"""What a training step does to losses and optimizers itself, recorded in place of done while a model is calibrated."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_prune.callbacks.lightning_internals import wrapped_optimizers
from lit_prune.callbacks.write_guard import WriteGuard
from lit_prune.torch_internals import TABLES, has_gradient_hooks, leaf_of, tree_leaves

# a container of optimizers or schedulers has not more of them
_FEW = 100


class RecordedOptimization:
    """Records the losses that a training step would train the model by, and lets it train nothing.

    Within :meth:`active`, ``manual_backward`` and ``loss.backward()`` note their loss and leave graph and gradients of
    parameters alone; steps and ``zero_grad`` of all optimizers, schedulers, toggling and clipping change nothing. A closure
    given to an optimizer's step is called once. Gradients of tensors that are no parameters (inputs, for adversarial
    samples) are computed, as the step goes on with them.

    What counts of several losses is what the optimizers of the model's parameters would have stepped by: a loss counts from
    its backward pass until their ``zero_grad``, unless another optimizer is toggled; and if the model is in its graph.

    Args:
        trainer: The trainer.
        model: The model that is calibrated, inside the LightningModule.
        guard: Told when a graph is complete.
    """

    def __init__(self, trainer: pl.Trainer, model: nn.Module, guard: WriteGuard) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._guard = guard
        self._modules = {id(m) for m in model.modules()}
        own = {id(p) for p in model.parameters()}
        optimizers = _optimizers(trainer)
        owners = [o for o in optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
        self._owners = {id(o) for o in owners or optimizers}
        # by identity, those within others too: the optimizer, and which of the outer ones it belongs to
        self._optimizers = {id(o): (o, id(outer)) for outer in optimizers for o in _within(outer)}
        self._schedulers = _schedulers(trainer)
        self._own = own
        self._parameters = {id(p) for p in self._module.parameters()} | own
        # of the batch at hand
        self._outputs: set[Any] = set()
        self._pending: dict[int, list[Tensor]] = {}
        self._stepped: dict[int, list[Tensor]] = {}
        self._of_others: set[int] = set()
        self._marks: dict[int, int] = {}
        self._toggled: int | None = None
        self.called = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Record within this context, from anew."""
        self.forget()
        self._pending = {key: [] for key in self._owners}
        self._toggled, self.called = None, False
        with contextlib.ExitStack() as stack:

            def replace(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(replaced(owner, name, value))

            replace(self._module, "manual_backward", self._backward)
            replace(self._module, "toggle_optimizer", lambda optimizer: self._toggle(optimizer))
            replace(self._module, "untoggle_optimizer", lambda *_, **__: self._toggle(None))
            for name in ("clip_gradients", "configure_gradient_clipping"):
                replace(self._module, name, nothing)
            wrapped = wrapped_optimizers(self._trainer)
            for optimizer in (*(o for o, _ in self._optimizers.values()), *wrapped):
                for name in _methods(optimizer):
                    replace(optimizer, name, self._replacement(name, optimizer))
            for scheduler in self._schedulers:
                replace(scheduler, "step", nothing)
            replace(torch.autograd, "backward", self._autograd_backward)
            if not self._module.automatic_optimization and torch.is_grad_enabled():
                handle = nn.modules.module.register_module_forward_hook(self._note_output)
                stack.callback(handle.remove)
            yield

    def loss(self) -> Tensor | None:
        """The sum of the losses that count, if there are any; :meth:`WriteGuard.rewind` has made its graph usable."""
        found = {id(loss): loss for losses in self._stepped.values() for loss in losses}
        for key in self._pending.keys() - self._stepped.keys():
            # a model whose optimizer waits with its step: what others have stepped by meanwhile is theirs
            found.update({id(loss): loss for loss in self._pending[key] if id(loss) not in self._of_others})
        losses = [loss for loss in found.values() if not torch.is_grad_enabled() or self._reaches_model(loss)]
        if not losses:
            return None
        self._guard.rewind(max(self._marks[id(loss)] for loss in losses))
        return sum(losses[1:], start=losses[0])

    def forget(self) -> None:
        """Let go of the graphs of the batch."""
        self._outputs, self._pending, self._stepped = set(), {}, {}
        self._of_others, self._marks = set(), {}

    def _backward(self, loss: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        self.called = True
        if gradient is not None:
            loss = (loss * gradient).sum()
        self._marks[id(loss)] = self._guard.mark()
        for key in self._owners if self._toggled is None else self._owners & {self._toggled}:
            self._pending[key].append(loss)
        if loss.requires_grad:
            self._differentiate_inputs(loss)

    def _autograd_backward(self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        gradients = (grad_tensors,) if isinstance(grad_tensors, Tensor) else grad_tensors or (None,) * len(tensors)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            self._backward(tensor, gradient)

    def _differentiate_inputs(self, loss: Tensor) -> None:
        found = [leaf for node in _graph(loss) if (leaf := leaf_of(node)) is not None]
        leaves = [leaf for leaf in found if id(leaf) not in self._parameters and not has_gradient_hooks(leaf)]
        if leaves:
            for leaf, gradient in zip(
                leaves, torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient

    def _note_output(self, module: nn.Module, _: Any, output: Any) -> None:
        if id(module) in self._modules:
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
            self._outputs.update(t.grad_fn for t in leaves)

    def _reaches_model(self, loss: Tensor) -> bool:
        return any(n in self._outputs or id(leaf_of(n)) in self._own for n in _graph(loss))

    def _toggle(self, optimizer: Any) -> None:
        self._toggled = None if optimizer is None else self._key(optimizer)

    def _key(self, optimizer: Any) -> int:
        raw = _raw(optimizer)
        return self._optimizers[id(raw)][1] if id(raw) in self._optimizers else id(raw)

    def _replacement(self, name: str, optimizer: Any) -> Callable[..., Any]:
        key = self._key(optimizer)
        if name == "zero_grad":

            def zero_grad(*_: Any, **__: Any) -> None:
                self._pending.get(key, []).clear()

            return zero_grad
        if "step" not in name:
            return nothing

        def step(*arguments: Any, **named: Any) -> Any:
            closure = next((a for a in (*arguments, *named.values()) if callable(a)), None)
            result = closure() if closure is not None else None
            if key in self._owners:
                self._stepped.setdefault(key, []).extend(self._pending[key])
            else:
                self._of_others.update(id(loss) for losses in self._pending.values() for loss in losses)
            return result

        return step


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object, and put back what was there in the object itself."""
    attributes = vars(owner)
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had:
            attributes[name] = before
        else:
            del attributes[name]


def nothing(*_: Any, **__: Any) -> None:
    """Stand in for a method that would change something."""


def _raw(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _methods(optimizer: Any) -> list[str]:
    """Names of an optimizer's methods that change weights, gradients or its own state."""
    kind = type(_raw(optimizer))
    names = [
        name
        for name in dir(kind)
        if not name.startswith(("_", "register_", "profile_")) and callable(getattr(kind, name))
    ]
    return [name for name in names if "step" in name or name in ("zero_grad", "train", "eval")]


def _optimizers(trainer: pl.Trainer) -> list[Optimizer]:
    """The Trainer's optimizers, and others that the module holds itself."""
    found = [_raw(o) for o in trainer.optimizers]
    held = [_raw(v) for m in trainer.lightning_module.modules() for v in _held(m) if isinstance(v, Optimizer)]
    inner = {id(o) for optimizer in found for o in _within(optimizer)}
    return list({id(o): o for o in (*found, *(o for o in held if id(o) not in inner))}.values())


def _within(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, and those that it wraps."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _within(value)


def _schedulers(trainer: pl.Trainer) -> list[Any]:
    configured = [config.scheduler for config in trainer.lr_scheduler_configs]
    held = [v for m in trainer.lightning_module.modules() for v in _held(m) if isinstance(v, LRScheduler)]
    return list({id(scheduler): scheduler for scheduler in (*configured, *held)}.values())


def _held(module: nn.Module) -> Sequence[Any]:
    """A module's attributes, and what is in lists, tuples and dicts among them."""
    values: list[Any] = []
    for name, value in vars(module).items():
        values.append(value)
        if isinstance(value, (list, tuple, dict)) and len(value) < _FEW and name not in TABLES:
            values += value.values() if isinstance(value, dict) else value
    return values


def _graph(loss: Tensor) -> Iterator[Any]:
    """The nodes of a loss's graph, from the loss on; masks that calibration put there are not followed."""
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        following = [n for n, _ in node.next_functions]
        for other in following[:1] if node.name() == "_MaskedBackward" else following:
            if other not in seen:
                seen.add(other)
                stack.append(other)


def held_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of an optimizer that runs its closure and changes nothing."""

    @functools.wraps(step)
    def held(closure: Callable[[], Any] | None = None, *_: Any, **__: Any) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    return held
