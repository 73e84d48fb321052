"""What stays whole in a traced model, and why, in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lit_prune.architectures.tracing.mode import LabelTracer
from lit_prune.groups import GroupSet

_LINES = 8
_CHECK = "check"


@dataclass(frozen=True)
class Untraceable:
    """A part of a model that stays whole.

    Args:
        module: Qualified name of the module that stays whole.
        operator: The ATen operator that ties its positions together, ``"check"`` if a set failed the comparison of masked
            and cut outputs, or the empty string.
        reason: Why it stays whole.
        parameters: Number of its parameters that no group holds.
    """

    module: str
    operator: str
    reason: str
    parameters: int


def kept_whole(
    model: nn.Module,
    tracer: LabelTracer,
    sets: Sequence[GroupSet],
    failed: Sequence[tuple[GroupSet, str]],
    protected: Collection[str],
) -> tuple[Untraceable, ...]:
    """The parts of a model that no group holds any of, the largest first.

    Args:
        model: The model.
        tracer: What was learnt of a run.
        sets: The group sets.
        failed: The group sets that failed the check, with what was found.
        protected: Names of the parameters that were to stay whole.
    """
    held = {s.parameter for found in sets for s in found.slices}
    reasons = _reasons(tracer)
    failures = {s.parameter: (found, why) for found, why in failed for s in found.slices}
    whole: dict[tuple[str, str, str], int] = {}
    for name, parameter in model.named_parameters():
        if name in held or name in protected:
            continue
        module = name.rpartition(".")[0]
        operator, reason = reasons.get(name, ("", "nothing that was run uses it, or nothing reads what it produces"))
        if name in failures:
            found, why = failures[name]
            operator = _CHECK
            reason = f"the {found.size} groups of {found.name!r} ({found.kind}) failed the check: {why}"
        elif name not in tracer.first_use:
            operator, reason = "", "the example batch did not use it"
        key = (module, operator, reason)
        whole[key] = whole.get(key, 0) + parameter.numel()
    entries = [Untraceable(m, o, r, n) for (m, o, r), n in whole.items()]
    return tuple(sorted(entries, key=lambda e: -e.parameters))


def _reasons(tracer: LabelTracer) -> dict[str, tuple[str, str]]:
    """By parameter, the operator because of which its positions stay, and words for it."""
    classes = tracer.labels.classes()
    by_class: dict[int, int] = {}
    for roots, reason in tracer.labels.frozen():
        for root in roots.tolist():
            by_class.setdefault(root, reason)
    for labels, reason in tracer.collapsed:
        by_class.setdefault(int(classes[labels]), reason)
    found: dict[str, tuple[str, str]] = {}
    for atoms in tracer.labels.atoms:
        own = np.unique(classes[atoms.start : atoms.start + atoms.size])
        number = next((by_class[r] for r in own.tolist() if r in by_class), None)
        if number is not None and number >= 0 and atoms.name not in found:
            module, operator = tracer.reasons[number]
            where = f" in {module!r}" if module else ""
            unknown = (module, operator) in tracer.unknown
            word = "is not understood" if unknown else "mixes or indexes its positions"
            found[atoms.name] = operator, f"{operator}{where} {word}"
    return found


def summary(model: str, prunable: float, whole: Sequence[Untraceable]) -> str:
    """One message that says what share of a model is prunable, and what stays whole.

    Args:
        model: Name of the model's class.
        prunable: Fraction of its parameters that some group holds.
        whole: What stays whole.
    """
    lines = [f"{prunable:.1%} of the parameters of {model} can be pruned."]
    by_operator: dict[str, list[Untraceable]] = {}
    for entry in whole:
        by_operator.setdefault(entry.operator if entry.operator != _CHECK else entry.reason, []).append(entry)
    ordered = sorted(by_operator.values(), key=lambda entries: -sum(e.parameters for e in entries))
    if ordered:
        lines.append("These parts stay whole:")
    for entries in ordered[:_LINES]:
        reason = entries[0].reason
        names = ", ".join(repr(e.module) if e.module else "the model itself" for e in entries[:3])
        more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
        lines.append(f"  {names}{more} ({sum(e.parameters for e in entries)} parameters): {reason}")
    if len(ordered) > _LINES:
        rest = sum(e.parameters for entries in ordered[_LINES:] for e in entries)
        lines.append(f"  and {len(ordered) - _LINES} more reasons ({rest} parameters)")
    return "\n".join(lines)
