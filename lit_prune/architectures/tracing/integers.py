"""Which integers of a user's own modules have to follow the number of groups: proposals, which the check decides on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import Tensor, nn

from lit_prune.architectures.families.torch_modules import fewer_heads, no_nested_tensors, other_inputs
from lit_prune.architectures.fitting_shapes import fitting_channels, fitting_shapes
from lit_prune.architectures.tracing.sets import FoundSet, elements_of, is_standard, numbers_of
from lit_prune.groups import Adaptation, Attribute, GroupSet

ADAPTATIONS: dict[str, Callable[[nn.Module, Tensor], Callable[[], None]]] = {
    "fewer_heads": fewer_heads,
    "other_inputs": other_inputs,
    "no_nested_tensors": no_nested_tensors,
    "fitting_shapes": fitting_shapes,
    "fitting_channels": fitting_channels,
}
"""The adaptations that traced group sets may have, by the names that stand for them in files."""

_QUERY_WEIGHTS = ("in_proj_weight", "q_proj_weight")
_ALL_SUBSETS_UP_TO = 4
_LIKELIEST = 4


def adaptation_name(adaptation: Adaptation) -> str:
    """The name in :data:`ADAPTATIONS` of what an adaptation applies."""
    return next(name for name, apply in ADAPTATIONS.items() if apply is adaptation.apply)


@dataclass(frozen=True)
class Proposal:
    """What may have to follow a group set.

    Args:
        attributes: Integers of modules.
        reshaping: Names of modules that need an adaptation to reshape to other sizes.
        by: Name of that adaptation.
    """

    attributes: tuple[Attribute, ...]
    reshaping: tuple[str, ...] = ()
    by: str = "fitting_shapes"

    @property
    def pattern(self) -> tuple[tuple[str, ...], str]:
        """What proposals for sets of the same role in several blocks have in common."""
        names = tuple(f"{a.name}, shared" if a.shared else a.name for a in self.attributes)
        return names, self.by if self.reshaping else ""


def with_proposal(model: nn.Module, found: FoundSet, proposal: Proposal) -> GroupSet:
    """The group set with what is proposed, and with what modules of PyTorch need."""
    adaptations = (
        *_adaptations_of(model, found.group_set),
        *(Adaptation(name, ADAPTATIONS[proposal.by]) for name in proposal.reshaping),
    )
    return replace(found.group_set, attributes=(*found.sizes, *proposal.attributes), adaptations=adaptations)


def _adaptations_of(model: nn.Module, found: GroupSet) -> tuple[Adaptation, ...]:
    """What modules of PyTorch need besides smaller parameters to run with fewer of these groups."""
    adaptations: dict[tuple[str, str], Adaptation] = {}
    queries = [s for s in found.slices if s.parameter.endswith(_QUERY_WEIGHTS)]
    for name in dict.fromkeys(s.module for s in queries):
        module = model.get_submodule(name)
        if not isinstance(module, nn.MultiheadAttention):
            continue
        # of the channels that it reads, the indices are none of heads
        of_heads = found.size == module.num_heads and any(s.dim == 0 for s in queries if s.module == name)
        apply = fewer_heads if of_heads else other_inputs
        adaptations[apply.__name__, name] = Adaptation(name, apply)
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if hasattr(model.get_submodule(parent), "use_nested_tensor"):
                adaptations["no_nested_tensors", parent] = Adaptation(parent, no_nested_tensors)
    return tuple(adaptations.values())


def proposals(model: nn.Module, found: FoundSet) -> list[Proposal]:
    """What may have to follow a group set, the likeliest first.

    Args:
        model: The model.
        found: The group set.
    """
    group_set = found.group_set
    counting: list[Attribute] = []
    widths: list[Attribute] = []
    multiples: list[Attribute] = []
    positions = {s.index.numel() for s in group_set.slices}
    own = [*found.modules, *(s.module for s in group_set.slices)]
    for attribute, value in _integers(model, found, own):
        if value == group_set.size:
            counting.append(attribute)
        elif value in positions:
            widths.append(attribute)
        else:
            multiples.append(attribute)
    orders: list[tuple[Attribute, ...]] = [(), (*counting, *widths), tuple(counting), tuple(widths)]
    if found.is_heads:
        orders = [*orders[1:], ()]
    both = (*counting, *widths)
    if len(both) <= _ALL_SUBSETS_UP_TO:
        orders += [c for n in range(len(both), 0, -1) for c in combinations(both, n)]
    else:
        orders += [(c, *widths) for c in counting] + [(*counting, w) for w in widths]
        orders += [(a,) for a in both] + [tuple(b for b in both if b is not a) for a in both]
    if found.is_heads:
        # query heads, of which every group has several
        several = [c for n in (1, 2) for c in combinations(multiples, n)]
        bases = dict.fromkeys([tuple(counting), both, *((c,) for c in counting), ()])
        orders += [(*base, *c) for c in several for base in bases]
    # sizes of what the modules around create, the first state of a recurrent layer, or reshape before it meets these groups
    around: dict[str, list[Attribute]] = {}
    for attribute, value in _integers(model, found, _around(found)):
        if value == group_set.size:
            around.setdefault(attribute.module, []).append(attribute)
    orders += [(a,) for of_one in around.values() for a in of_one] + [tuple(a for o in around.values() for a in o)]
    beside = [(*base, *of_one) for of_one in around.values() for base in dict.fromkeys([both, tuple(counting)])]
    orders += [*map(tuple, around.values()), *beside]
    early = _with_others(model, found)
    if found.shapes:
        early += [(*order, *found.shapes) for order in dict.fromkeys([*orders[:_LIKELIEST], *early, *beside])]
    orders = list(dict.fromkeys([*orders[:_LIKELIEST], *early, *orders[_LIKELIEST:]]))
    reshaping = tuple(m for m in found.modules if not is_standard(model.get_submodule(m)))
    fitting = [Proposal(o, reshaping) for o in (*orders[:_LIKELIEST], *early, *beside)] if reshaping else []
    shaping = tuple(m for m in found.modules if m in reshaping or isinstance(model.get_submodule(m), nn.Unflatten))
    channels = [Proposal((), shaping, "fitting_channels")] if shaping and not found.is_heads else []
    return [*map(Proposal, orders), *fitting, *channels]


def _with_others(model: nn.Module, found: FoundSet) -> list[tuple[Attribute, ...]]:
    """The integers in shapes and slices that count these groups, if one counts more than these: all, and those of one name."""
    known = {(a.module, a.name) for a in found.sizes}
    counted = tuple(a for a in found.counted if (a.module, a.name) not in known)
    values = {name: dict(elements_of(model.get_submodule(name))) for name in {a.module for a in counted}}
    if not any(values[a.module][a.name] > a.per_group * found.group_set.size for a in counted):
        return []
    names = dict.fromkeys(a.name for a in counted)
    return list(dict.fromkeys([counted, *(tuple(a for a in counted if a.name == name) for name in names)]))


def _around(found: FoundSet) -> list[str]:
    """Names of the modules that hold those of a set, the innermost first."""
    parts = [s.module.split(".") for s in found.group_set.slices if s.module]
    paths = {".".join(p[:n]): n for p in parts for n in range(len(p))}
    own = {*found.modules, *(s.module for s in found.group_set.slices)}
    return sorted(paths.keys() - own, key=lambda path: (-paths[path], path))


def _integers(model: nn.Module, found: FoundSet, names: Sequence[str]) -> Iterator[tuple[Attribute, int]]:
    """Integers of some modules that may count a set's groups, several things in each, or positions of a parameter."""
    size = found.group_set.size
    positions = {s.index.numel() for s in found.group_set.slices}
    known = {(a.module, a.name) for a in found.sizes}
    for name in dict.fromkeys(names):
        module = model.get_submodule(name)
        for key, value in numbers_of(module):
            several = value % size == 0 and any(p % value == 0 for p in positions)
            if (name, key) not in known and (value in positions or several):
                yield Attribute(name, key, value // size), value
