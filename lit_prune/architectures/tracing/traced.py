"""A description by tracing: what example inputs show of a model's groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lit_prune._renamed import renamed_fields
from lit_prune.architectures.components import Component
from lit_prune.architectures.tracing.find import find_groups
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet


@renamed_fields(having="requires")
@dataclass(frozen=True)
class Traced(Component):
    """A model of any modules, described by running it; see :func:`~lit_prune.architectures.tracing.find.trace_groups`.

    One group is one output channel (or head, or hidden unit) with everything that is coupled to it: the same channel of all
    layers that are added to each other, of their norms, and the weights that read it. Groups that nothing in the model
    reads are its outputs, and stay.

    Args:
        example_inputs: Gives the positional arguments to run the model with, on the model's device.
        ignored: Names of modules whose output channels stay.
        kind: What the group table calls these groups.
    """

    follows_ties: ClassVar[bool] = True
    example_inputs: Callable[[], Sequence[Any]]
    ignored: tuple[str, ...] = ()
    kind: str = "channel"
    path: str = ""
    requires: str | None = None
    optional: bool = True

    def group_sets(self, model: nn.Module, pruned: Collection[tuple[str, str]]) -> Iterator[GroupSet]:
        """Run the model and describe its groups.

        Raises:
            UnsupportedModelError: If a name in ``ignored`` is that of no module.
        """
        names = dict(model.named_modules())
        for name in self.ignored:
            if name not in names:
                raise UnsupportedModelError(
                    f"Traced(ignored=...) names {name!r}, which {type(model).__name__} does not have; its modules are"
                    f" {list(names)[1:20]}."
                )
        inputs = tuple(self.example_inputs())
        found = find_groups(model, lambda: model(*inputs), kind=self.kind, producers_that_stay=self.ignored)
        yield from found.group_sets

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """The groups whose first module is ``name``.

        Raises:
            UnsupportedModelError: If no groups start there.
        """
        for found in self.group_sets(model, pruned):
            if found.name == name:
                return found
        raise UnsupportedModelError(f"No groups of {type(model).__name__} start at {name!r}.")
