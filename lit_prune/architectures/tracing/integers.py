"""Which integers of a user's own modules have to follow the number of groups: proposals, which the check decides on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from torch import Tensor, nn

from lit_prune.architectures.families.torch_modules import fewer_heads, no_nested_tensors
from lit_prune.architectures.tracing.sets import ATTENTION, FoundSet
from lit_prune.groups import Adaptation, Attribute, GroupSet

ADAPTATIONS: dict[str, Callable[[nn.Module, Tensor], Callable[[], None]]] = {
    "fewer_heads": fewer_heads,
    "no_nested_tensors": no_nested_tensors,
}
"""The adaptations that traced group sets may have, by the names that stand for them in files."""

_ALL_SUBSETS_UP_TO = 4


def adaptation_name(adaptation: Adaptation) -> str:
    """The name in :data:`ADAPTATIONS` of what an adaptation applies."""
    return next(name for name, apply in ADAPTATIONS.items() if apply is adaptation.apply)


def adaptations_of(model: nn.Module, found: GroupSet) -> tuple[Adaptation, ...]:
    """What modules of PyTorch need besides smaller parameters to run with fewer of these groups."""
    adaptations: dict[tuple[str, str], Adaptation] = {}
    for name in dict.fromkeys(s.module for s in found.slices if s.parameter.endswith("in_proj_weight")):
        if not isinstance(model.get_submodule(name), nn.MultiheadAttention):
            continue
        adaptations["fewer_heads", name] = Adaptation(name, fewer_heads)
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if hasattr(model.get_submodule(parent), "use_nested_tensor"):
                adaptations["no_nested_tensors", parent] = Adaptation(parent, no_nested_tensors)
    return tuple(adaptations.values())


def proposals(model: nn.Module, found: FoundSet) -> list[tuple[Attribute, ...]]:
    """Sets of attributes that may have to follow a group set, the likeliest first.

    Args:
        model: The model.
        found: The group set.
    """
    group_set = found.group_set
    counting: list[Attribute] = []
    widths: list[Attribute] = []
    for attribute, value in _equal_integers(model, found):
        (counting if value == group_set.size else widths).append(attribute)
    orders = [(), (*counting, *widths), tuple(counting), tuple(widths)]
    if group_set.kind.startswith(ATTENTION):
        orders = [*orders[1:], ()]
    both = (*counting, *widths)
    if len(both) <= _ALL_SUBSETS_UP_TO:
        orders += [c for n in range(len(both), 0, -1) for c in combinations(both, n)]
    else:
        orders += [(c, *widths) for c in counting] + [(*counting, w) for w in widths]
        orders += [(a,) for a in both] + [tuple(b for b in both if b is not a) for a in both]
    return list(dict.fromkeys(orders))


def _equal_integers(model: nn.Module, found: FoundSet) -> Iterator[tuple[Attribute, int]]:
    """Integers of the modules around a set that equal its number of groups, or of positions in one of its parameters."""
    size = found.group_set.size
    counted = {size, *(s.index.numel() for s in found.group_set.slices)}
    names = [*found.modules, *(s.module for s in found.group_set.slices)]
    for name in dict.fromkeys(names):
        module = model.get_submodule(name)
        if _is_standard(module):
            continue
        for key, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool) and value in counted and value > 1:
                yield Attribute(name, key, value // size), value


def _is_standard(module: nn.Module) -> bool:
    """Whether a module's integers are PyTorch's, which follow its parameters."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)


def attribute_names(attributes: Sequence[Attribute]) -> tuple[str, ...]:
    """The names of attributes without their modules."""
    return tuple(a.name for a in attributes)
