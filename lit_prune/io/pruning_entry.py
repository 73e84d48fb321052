"""What the ``config.json`` of a pruned model says of its plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_prune.groups import Attribute, GroupSet
from lit_prune.modeling_pruned import to_ranges
from lit_prune.plan import PruningPlan


def pruning_entry(group_sets: Sequence[GroupSet], plan: PruningPlan) -> dict[str, Any]:
    """The entry ``pruning`` of a config: what was cut, for code that knows nothing of lit_prune.

    Args:
        group_sets: The group sets of the dense model.
        plan: The plan.
    """
    by_key = {s.key: s for s in group_sets}
    groups = []
    for entry in plan.entries:
        group_set = by_key.get(entry.key)
        places: dict[str, dict[int, int]] = {}
        for part in () if group_set is None else group_set.slices:
            along = places.setdefault(part.parameter, {})
            along[part.dim] = along.get(part.dim, 0) + part.index.shape[1]
        parameters = {
            name: next([d, w] for d, w in along.items()) if len(along) == 1 else [[d, w] for d, w in along.items()]
            for name, along in places.items()
        }
        attributes = () if group_set is None else group_set.attributes
        groups.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "layer": entry.layer,
                "size": entry.size,
                "kept": to_ranges(entry.kept),
                "parameters": parameters,
                "attributes": {f"{a.module}.{a.name}": _attribute_rule(a) for a in attributes},
            }
        )
    info = json.loads(json.dumps(dict(plan.info)))
    turned = {"rotated": True} if plan.rotated else {}
    return {"digest": plan.digest(), "groups": groups, "biases": list(plan.biases), "info": info, **turned}


def _attribute_rule(attribute: Attribute) -> int | list[int]:
    """How ``config.json`` says what an attribute becomes; see :func:`lit_prune.modeling_pruned.attribute_value`."""
    if attribute.fixed == 0 and attribute.divisor == 1:
        return attribute.per_group
    return [attribute.per_group, attribute.fixed, attribute.divisor]
