"""Finds the groups of any module from one run of it, with no description."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_prune.architectures.caches import without_caches
from lit_prune.architectures.tracing.check import Check
from lit_prune.architectures.tracing.mode import LabelTracer, follow, trace
from lit_prune.architectures.tracing.own_forwards import unlike_their_weights
from lit_prune.architectures.tracing.report import Untraceable, kept_whole, summary
from lit_prune.architectures.tracing.sets import FoundSet, find_sets
from lit_prune.architectures.tracing.trial import training_mode
from lit_prune.arguments import EXPRESSION, sequence_of
from lit_prune.errors import ArgumentValueError, UnsupportedModelError, first_line
from lit_prune.groups import GroupSet, check_weights, count_parameters, count_removed
from lit_prune.torch_internals import move_buffers, tables

_EXPRESSIONS = sequence_of("a list of regular expressions, ['head'] for instance", EXPRESSION)


@dataclass(frozen=True)
class TracedGroups:
    """The groups that one run of a model showed.

    Args:
        group_sets: The group sets, in the order in which the run used them.
        whole: What stays whole, and why.
        prunable: Fraction of the model's parameters that some group holds.
    """

    group_sets: tuple[GroupSet, ...]
    whole: tuple[Untraceable, ...]
    prunable: float


def trace_groups(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    root: nn.Module | None = None,
    protect: Sequence[str] = (),
    check: bool = True,
) -> TracedGroups:
    """Run a model once and return the groups of parameters that can only be removed together.

    The run is followed operator by operator, so the model may be of any class. Parameters, buffers, modes, random numbers
    and integers of the model are as before afterwards. One warning says what stays whole.

    Args:
        model: The model.
        run: Runs one batch through ``root``, as a training step does; its result has to stay of the same size.
        root: The module that holds the model and that ``run`` runs; ``model`` if ``None``.
        protect: Regular expressions that are searched in the names of the model's modules and parameters, as those of
            :class:`lit_prune.Limits` are; what they are found in stays whole, with everything in it.
        check: Whether to compare, set by set if need be, the model with a random part of the groups masked to the model
            without them, and drop the sets for which the outputs differ.

    Returns:
        The groups, and what stays whole.

    Raises:
        UnsupportedModelError: If nothing can be removed; the message says what stays whole, and why.
        TypeError: If ``protect`` is no sequence of texts.
        ValueError: If one in ``protect`` is no regular expression, or is found in no name.
    """
    traced = find_groups(model, run, root=root, protected=protected_parameters(model, protect), check=check)
    message = summary(type(model).__name__, traced.prunable, traced.whole)
    if not traced.group_sets:
        raise UnsupportedModelError(message)
    if traced.whole:
        warnings.warn(message, UserWarning, stacklevel=2)
    return traced


def find_groups(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    root: nn.Module | None = None,
    protected: Collection[str] = (),
    producers_that_stay: Collection[str] = (),
    kind: str | None = None,
    check: bool = True,
) -> TracedGroups:
    """What :func:`trace_groups` returns, without warnings or errors if little or nothing is prunable.

    Args:
        model: The model.
        run: Runs one batch through ``root``.
        root: The module that holds the model; ``model`` if ``None``.
        protected: Names of parameters that stay whole.
        producers_that_stay: Names of modules whose outputs stay; what they read may be removed.
        kind: What all groups are called; by what they are if ``None``.
        check: Whether to drop sets for which masked and cut model differ.
    """
    root = model if root is None else root
    with _as_it_was(root):
        tracer = trace(model, run, root)
        for name in unlike_their_weights(model, run):
            tracer.reads_otherwise(name)
        found, sets, checker = _found(model, tracer, run, protected, producers_that_stay, kind, check)
        if check and sets and (training := _training_run(model, tracer, run, root, sets)) is not None:
            found, sets, checker = _found(
                model, tracer, run, protected, producers_that_stay, kind, check, also=training
            )
    check_weights(model, sets, ties=False)
    return _result(model, tracer, found, sets, checker.failures, protected)


def _found(
    model: nn.Module,
    tracer: LabelTracer,
    run: Callable[[], Any],
    protected: Collection[str],
    producers_that_stay: Collection[str],
    kind: str | None,
    check: bool,
    also: Callable[[], Any] | None = None,
) -> tuple[list[FoundSet], list[GroupSet], Check]:
    for name in producers_that_stay:
        tracer.keep_outputs(name)
    # what is only read in training has no statistics: calibration is in evaluation mode
    found = [f for f in find_sets(model, tracer, protected, kind) if f.group_set.consumers]
    checker = Check(model, run, also)
    return found, checker.passing(found) if check else [checker.unchecked(f) for f in found], checker


def _training_run(
    model: nn.Module, tracer: LabelTracer, run: Callable[[], Any], root: nn.Module, sets: Sequence[GroupSet]
) -> Callable[[], Any] | None:
    """Follow a run in training mode as well if what only that mode uses (auxiliary heads) does not fit the cut model.

    Returns:
        The run in training mode; ``None`` if it was not needed, or is not possible, of which a warning tells.
    """
    used = dict(tracer.first_use)
    left = [name for name, _ in model.named_parameters() if name not in used]
    if not left:
        return None

    def in_training() -> Any:
        with training_mode(root), torch.no_grad():
            return run()

    if Check(model, in_training).runs_without(sets):
        return None
    try:
        follow(tracer, in_training, root)
    # whatever the user's forward raises: a batch norm does on a single sample
    except Exception as error:
        tracer.running.clear()
        warnings.warn(
            f"{left[:3]} ({len(left)} parameters) of {type(model).__name__} are not used in evaluation mode, and the example"
            f" batch does not run in training mode ({first_line(error)}). If they read what is removed they"
            " will not fit: protect what they read, or give larger batches.",
            UserWarning,
            stacklevel=4,
        )
        return None
    finally:
        tracer.first_use = used
    return in_training


def protected_parameters(model: nn.Module, protect: Sequence[str]) -> set[str]:
    """Names of the parameters that some regular expressions mean, by their own names or those of modules around them.

    Args:
        model: The model.
        protect: Regular expressions, searched in the names of modules and parameters.

    Raises:
        TypeError: If ``protect`` is no sequence of texts.
        ValueError: If one is no regular expression, or is found in no name.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    protected: set[str] = set()
    for pattern in _EXPRESSIONS.check("protect", protect):
        fitting = [n for n in (*modules, *parameters) if n and re.search(pattern, n)]
        if not fitting:
            tops = [name for name, _ in model.named_children()]
            raise ArgumentValueError(
                f"protect names {pattern!r}, which fits no module or parameter of {type(model).__name__}. Its top-level"
                f" modules are {tops}."
            )
        protected.update(p for p in parameters for n in fitting if p == n or p.startswith(f"{n}."))
    return protected


def _result(
    model: nn.Module,
    tracer: LabelTracer,
    found: Sequence[FoundSet],
    sets: Sequence[GroupSet],
    failures: dict[tuple[str, str], str],
    protected: Collection[str],
) -> TracedGroups:
    failed = [(f.group_set, failures[f.group_set.key]) for f in found if f.group_set.key in failures]
    whole = kept_whole(model, tracer, sets, failed, protected)
    total = count_parameters(model)
    held = count_removed(model, sets, [torch.arange(s.size) for s in sets])
    return TracedGroups(tuple(sets), whole, held / total if total else 0.0)


@contextlib.contextmanager
def _as_it_was(root: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes, buffers and random numbers as before at the end."""
    modes = [(module, module.training) for module in root.modules()]
    buffers = [(module, name, b, b.detach().clone()) for module in root.modules() for name, b in _buffers(module)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        root.eval()
        with torch.random.fork_rng(devices), without_caches(root):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                move_buffers(module, {name: buffer})
                buffer.copy_(values)


def _buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in tables(module)[1].items():
        if buffer is not None:
            yield name, buffer
