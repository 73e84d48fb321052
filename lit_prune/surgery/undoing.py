"""Putting back what a cut changed: all of it, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lit_prune.torch_internals import tables

Step = Callable[[], None]


def undo_all(steps: Sequence[Step]) -> None:
    """Carry out all steps, the last one first, also if some of them fail, and raise the first error at the end.

    A step that an interrupt (Ctrl-C) ends is carried out once more, so steps have to bear being done twice.

    Args:
        steps: Functions that each undo one change, in the order of the changes.
    """
    first: BaseException | None = None
    for step in reversed(steps):
        try:
            try:
                step()
            except KeyboardInterrupt as interrupt:
                first = first or interrupt
                step()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def module_state(model: nn.Module) -> Step:
    """Return a function that gives every module in a model the class, attributes and submodules that it has now.

    Parameters and buffers are not looked at. This is for an error within a cut, between a change and the note of how to undo
    it; later on, attributes may have changed for reasons that have nothing to do with the cut.

    Args:
        model: The model, before it is changed.
    """
    before = [(m, type(m), dict(vars(m)), dict(tables(m)[2])) for m in model.modules()]

    def restore() -> None:
        for module, kind, attributes, children in before:
            if type(module) is not kind:
                module.__class__ = kind
            _refill(vars(module), attributes)
            _refill(tables(module)[2], children)

    return restore


def _refill(mapping: dict[str, Any], items: dict[str, Any]) -> None:
    same = list(mapping) == list(items) and all(mapping[key] is value for key, value in items.items())
    if not same:
        mapping.clear()
        mapping.update(items)
