"""Keeps only the group sets for which a masked model and a cut model compute the same on the example batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.tracing.difference import difference, no_longer_finite
from lit_prune.architectures.tracing.integers import Proposal, proposals, with_proposal
from lit_prune.architectures.tracing.mode import plain_kernels
from lit_prune.architectures.tracing.sets import FoundSet
from lit_prune.architectures.tracing.trial import loud_weights, masked, telling_values, without
from lit_prune.errors import first_line
from lit_prune.groups import Attribute, GroupSet
from lit_prune.torch_internals import tree_leaves

_AFTER_A_FAILURE = 3
# what is left of one number may by chance be what another should be; two draws of other fractions tell them apart
_DRAWS = 2


class Check:
    """Compares the masked and the cut model, and settles which integers follow which set.

    Args:
        model: The model.
        run: Runs the example batch.
        also: Another run, which the cut model only has to get through, if there is one.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any], also: Callable[[], Any] | None = None) -> None:
        self._model = model
        self._run = run
        self._also = also
        self._choices: dict[Any, Any] = {}
        self._failed: set[Any] = set()
        self._untouched: list[Tensor] = []
        self._passed: list[GroupSet] | None = None
        self._masked: tuple[tuple[tuple[str, str], ...], list[list[Tensor]]] = (), []
        self.failures: dict[tuple[str, str], str] = {}

    def passing(self, found: Sequence[FoundSet]) -> list[GroupSet]:
        """The sets that pass, with the attributes and adaptations that they need."""
        # heads, their features, and whatever else a module gives another shape
        shaped = [f.group_set for f in found if f.is_heads or set(f.modules) - {s.module for s in f.group_set.slices}]
        if not found:
            return []
        with self._finite_values(shaped):
            accepted = self._accepted(list(found))
            # sets that pass alone may still not pass together
            while accepted and (problem := self.problem([s for s, _ in accepted])) is not None:
                accepted = self._thinned(accepted, problem)
            return self._without_idle_integers(accepted)

    @contextlib.contextmanager
    def _finite_values(self, shaped: Sequence[GroupSet]) -> Iterator[None]:
        """The model with values that tell most, of those with which its outputs are finite where they are with its own.

        Any two models agree where both give no numbers.
        """
        self._untouched = self._outputs()
        telling, loud = (lambda: telling_values(self._model)), (lambda: loud_weights(self._model, shaped))
        for changes in ((telling, loud), (telling,), (loud,), ()):
            with contextlib.ExitStack() as stack:
                for change in changes:
                    stack.enter_context(change())
                if changes and no_longer_finite(self._untouched, self._outputs()):
                    continue
                self._masked, self._passed = ((), []), None
                yield
                return

    def _without_idle_integers(self, accepted: Sequence[tuple[GroupSet, FoundSet]]) -> list[GroupSet]:
        """The sets without the integers that they pass without: those merely equal a number of groups or of features.

        Sets of the same role lose an integer together, so that models of many layers take no longer.
        """
        roles: dict[Any, dict[Any, set[tuple[int, Attribute]]]] = {}
        for number, (group_set, found) in enumerate(accepted):
            role = roles.setdefault(_pattern(self._model, found), {})
            for attribute in group_set.attributes:
                if attribute not in found.sizes:
                    key = type(self._model.get_submodule(attribute.module)), attribute.name
                    role.setdefault(key, set()).add((number, attribute))
        sets = [s for s, _ in accepted]
        for role in roles.values():
            parts = list(role.values())
            # all first: two of which only the ratio counts can go together alone
            for idle in [{use for part in parts for use in part}, *parts] if len(parts) > 1 else parts:
                fewer = [
                    replace(s, attributes=tuple(a for a in s.attributes if (number, a) not in idle))
                    for number, s in enumerate(sets)
                ]
                if any(len(f.attributes) < len(s.attributes) for f, s in zip(fewer, sets, strict=True)):
                    sets = fewer if self.problem(fewer) is None else sets
        return sets

    def _accepted(self, found: list[FoundSet]) -> list[tuple[GroupSet, FoundSet]]:
        """Check all at once; where that fails, one of each pattern by itself, then all again, then halves."""
        sets = [with_proposal(self._model, f, self._preferred(f)) for f in found]
        if not found or self.problem(sets) is None:
            return list(zip(sets, found, strict=True))
        for one in {_pattern(self._model, f): f for f in found}.values():
            self._settle(one)
        return self._halved(found)

    def _halved(self, found: list[FoundSet]) -> list[tuple[GroupSet, FoundSet]]:
        sets = [with_proposal(self._model, f, self._preferred(f)) for f in found]
        if not found or self.problem(sets) is None:
            return list(zip(sets, found, strict=True))
        if len(found) == 1:
            settled = self._settle(found[0])
            return [] if settled is None else [(settled, found[0])]
        middle = len(found) // 2
        return [*self._halved(found[:middle]), *self._halved(found[middle:])]

    def _thinned(self, accepted: list[tuple[GroupSet, FoundSet]], problem: str) -> list[tuple[GroupSet, FoundSet]]:
        """The sets that pass one after the other with those before them."""
        kept: list[tuple[GroupSet, FoundSet]] = []
        for item in accepted:
            if self.problem([s for s, _ in (*kept, item)]) is None:
                kept.append(item)
            else:
                self.failures[item[0].key] = f"with the other sets: {problem}"
        return kept

    def _preferred(self, found: FoundSet) -> Proposal:
        options = proposals(self._model, found)
        chosen = self._choices.get(_pattern(self._model, found))
        return next((o for o in options if o.pattern == chosen), options[0])

    def _settle(self, found: FoundSet) -> GroupSet | None:
        """The set with the first integers with which it passes; ``None`` if it passes with none."""
        first = None
        pattern = _pattern(self._model, found)
        options = list(dict.fromkeys([self._preferred(found), *proposals(self._model, found)]))
        # where nothing helped a set of the same role, little is tried
        for proposal in options[: _AFTER_A_FAILURE if pattern in self._failed else None]:
            candidate = with_proposal(self._model, found, proposal)
            problem = self.problem([candidate])
            if problem is None:
                self._choices[pattern] = proposal.pattern
                self.failures.pop(found.group_set.key, None)
                return candidate
            first = first or problem
        self._failed.add(pattern)
        self.failures[found.group_set.key] = first or ""
        return None

    def unchecked(self, found: FoundSet) -> GroupSet:
        """The set with the integers that are likeliest to follow it."""
        return with_proposal(self._model, found, self._preferred(found))

    def runs_without(self, sets: Sequence[GroupSet]) -> bool:
        """Whether the run gets through if a part of every set is removed."""
        removed = _random_parts(sets)
        try:
            with telling_values(self._model), without(self._model, sets, removed):
                self._outputs()
        # whatever the user's forward raises with other sizes
        except Exception:
            return False
        return True

    def problem(self, sets: Sequence[GroupSet]) -> str | None:
        """How the cut model differs from the masked one if a part of every set is removed; ``None`` if not at all."""
        if self._passed == list(sets):
            return None
        for draw in range(_DRAWS):
            removed = _random_parts(sets, draw)
            expected = self._expected(sets, removed, draw)
            if no_longer_finite(self._untouched, expected):
                return "the masked model gives values that are not finite, so that nothing can be compared"
            try:
                with without(self._model, sets, removed):
                    found = self._outputs()
                    if self._also is not None:
                        with _same_state(self._model):
                            self._also()
            # whatever the user's forward raises with other sizes
            except Exception as error:
                return f"the cut model does not run ({first_line(error)})"
            if (differs := difference(expected, found)) is not None:
                return differs
        self._passed = list(sets)
        return None

    def _expected(self, sets: Sequence[GroupSet], removed: Sequence[Tensor], draw: int) -> list[Tensor]:
        """What the masked model gives, which no integer changes: that of the sets that were last asked for is kept."""
        keys = tuple(s.key for s in sets)
        if self._masked[0] != keys:
            self._masked = keys, []
        if len(self._masked[1]) == draw:
            with masked(self._model, sets, removed):
                self._masked[1].append(self._outputs())
        return self._masked[1][draw]

    def _outputs(self) -> list[Tensor]:
        """All floating-point tensors that the run and the model return."""
        captured: list[Any] = []
        handle = self._model.register_forward_hook(lambda module, args, output: captured.append(output))
        try:
            with _same_state(self._model), torch.no_grad(), plain_kernels():
                captured.append(self._run())
        finally:
            handle.remove()
        tensors = [t for t in tree_leaves(captured) if isinstance(t, Tensor) and t.is_floating_point()]
        return [t.detach().clone() for t in tensors]


def _pattern(model: nn.Module, found: FoundSet) -> tuple[Any, ...]:
    """What sets of the same role in several blocks have in common."""
    owners = tuple(type(model.get_submodule(s.module)).__name__ for s in found.group_set.slices)
    around = tuple(type(model.get_submodule(m)).__name__ for m in found.modules)
    last = tuple(s.parameter.rpartition(".")[0].rpartition(".")[2] for s in found.group_set.slices)
    last = tuple("" if name.isdigit() else name for name in last)
    return found.group_set.kind, owners, around, last


@contextlib.contextmanager
def _same_state(model: nn.Module) -> Iterator[None]:
    """Seed the random numbers, and put them and the buffers back afterwards."""
    buffers = [(b, b.data, b.data.clone()) for b in model.buffers()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        for buffer, data, values in buffers:
            buffer.data = data
            buffer.data.copy_(values)


def _random_parts(sets: Sequence[GroupSet], draw: int = 0) -> list[Tensor]:
    """Some groups of every set, about half, and of each set another fraction, in every draw another one.

    A forward that takes the width of one set for that of another would get through if both lost the same fraction.
    """
    generator = torch.Generator().manual_seed(len(sets) + draw)
    # multiples of the golden ratio, from which neighbours are far apart
    fractions = [0.25 + 0.5 * ((number * (5**0.5 - 1) / 2 + draw / _DRAWS) % 1) for number in range(len(sets))]
    if draw:
        # what a set loses more than another in one draw, it loses less in the next
        fractions.reverse()
    return [
        torch.randperm(s.size, generator=generator)[: max(1, round(s.size * fraction))].sort().values
        for s, fraction in zip(sets, fractions, strict=True)
    ]
