"""Groups of a module that no description covers, found by running one batch, and kept beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from lit_prune.architectures.registry import has_groups
from lit_prune.architectures.tracing import TracedGroups, trace_groups
from lit_prune.arguments import BATCHES
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.module_state import module_state_kept
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.errors import CalibrationError, RankMismatchError, UnsupportedModelError
from lit_prune.group_data import keep_group_sets, kept_group_sets
from lit_prune.groups import GroupSet
from lit_prune.plan import get_plan
from lit_prune.surgery.kept_groups import packed
from lit_prune.surgery.references import suspended_hooks
from lit_prune.torch_internals import uncompiled

# batches to look at until one is not skipped
ATTEMPTS = 8


def trace(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Any],
    *,
    protect: Sequence[str] = (),
    root: nn.Module | None = None,
) -> TracedGroups:
    """Find the groups of any module by running one batch, and say what cannot be pruned and why.

    :func:`lit_prune.prune` and the callback do this themselves where no description covers the module. Called before, it shows
    what they will find. The groups are kept beside a module that is dense and that no description covers, so that
    :func:`lit_prune.find_group_sets` and everything else use them from then on, with what ``protect`` left out.

    Args:
        model: The module; it is not changed.
        batches: Batches, the first of which that ``loss_fn`` does not skip is run.
        loss_fn: Runs one batch through the model; what it returns is only compared.
        protect: Regular expressions that are searched in the names of modules and parameters, as those of
            :class:`lit_prune.Limits`; what they are found in stays whole, with everything in it (``"head"``,
            ``r"blocks\\.0\\."``).
        root: The module that holds the model, if ``loss_fn`` runs more than the model.

    Returns:
        The group sets, the operators that were not understood, each with its module and reason, and the fraction of the
        model's parameters that belongs to groups.

    Raises:
        CalibrationError: If there is no batch.
        UnsupportedModelError: If nothing in the model can be pruned.

    Example::

        found = lit_prune.trace(model, batches, lambda batch: loss(model(batch[0]), batch[1]))
        print(f"{found.prunable:.0%}", *found.whole, sep="\\n")
    """
    batches = BATCHES.check("batches", batches)
    model = uncompiled(model)
    check_traceable(model)
    with torch.compiler.set_stance("force_eager"):
        found = trace_groups(model, _run_of_one_batch(model, batches, loss_fn, root), root=root, protect=protect)
    if get_plan(model) is None and (not has_groups(model) or kept_group_sets(model) is not None):
        keep_group_sets(model, found.group_sets)
    return found


def find_or_trace(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Any],
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
    protect: Sequence[str] = (),
) -> tuple[GroupSet, ...] | None:
    """The groups of a module by running it, to be kept beside it; ``None`` if they are known already.

    Args:
        model: The module.
        batches: Batches, the first of which that ``loss_fn`` does not skip is run.
        loss_fn: Runs one batch through the model.
        root: The module that holds the model, if ``loss_fn`` runs more than the model.
        ranks: The processes of a distributed run, all of which call this.
        protect: Regular expressions for names of modules whose parameters stay whole.

    Raises:
        CalibrationError: If there is no batch.
        RankMismatchError: If the processes found other groups.
        UnsupportedModelError: If nothing in the model can be pruned.
    """
    if has_groups(model):
        return None
    check_traceable(model)
    with together(ranks, "finding the groups"):
        run = _run_of_one_batch(model, batches, loss_fn, root)
        found = trace_groups(model, run, root=root, protect=protect)
    if ranks is not None:
        digests = ranks.gather(packed(model, found.group_sets).digest())
        if len(set(digests)) > 1:
            raise RankMismatchError(
                f"The processes found different groups in {type(model).__name__}: {[d[:12] for d in digests]} by rank. Their"
                " first batches take different ways through the model. Give the same batches to all of them"
                " (calibration_dataloader), or describe the model with lit_prune.register_architecture."
            )
    return found.group_sets


def check_traceable(model: nn.Module, *, blocks: bool = False) -> None:
    """Refuse, before anything is run, a module in which nothing can be pruned.

    Args:
        model: The module.
        blocks: Whether whole blocks are to leave.

    Raises:
        UnsupportedModelError: With what was found, and what to do first.
    """
    what = type(model).__name__
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise UnsupportedModelError(
            f"{lazy[0]!r} has no values yet: run the lazy modules of {what} once before pruning."
        )
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{what} is compiled by torch.jit, so its modules cannot follow smaller weights. Prune the module that it was"
            " made from, and compile the pruned one."
        )
    if shards.any_sharded(model.parameters()) is not None:
        raise UnsupportedModelError(
            f"{what} has no description, and its parameters are sharded by FSDP2: groups are found by running"
            " the module, which needs whole parameters. Use DDP or one device, or describe the model with"
            " lit_prune.register_architecture."
        )
    unfit = {name: p for name, p in weights.items() if not p.is_floating_point() or p.element_size() < 2}
    if unfit and len(unfit) == len(weights):
        name, parameter = next(iter(unfit.items()))
        raise UnsupportedModelError(
            f"All weights of {what} are quantised ({name!r} is {parameter.dtype}). Pruning needs float32, bfloat16 or float16"
            " weights: prune the model first, and quantise it afterwards."
        )
    if not weights:
        raise UnsupportedModelError(
            f"{what} has no weights of two or more dimensions as parameters; found"
            f" {[name for name, _ in model.named_parameters()][:5]}. Quantised layers hold none: build the model in"
            " float32, bfloat16 or float16."
        )
    for name, parameter in weights.items():
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name!r} has no values in memory. Load the whole model before pruning.")
    if blocks:
        raise UnsupportedModelError(
            f"kinds names 'block', and {what} has no description that says what its blocks are. Leave it out, or describe the"
            " model with lit_prune.register_architecture."
        )


def _run_of_one_batch(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[Any], Any], root: nn.Module | None
) -> Callable[[], Any]:
    """A function that runs the first batch which is not skipped, the same one every time.

    Raises:
        CalibrationError: If there is none.
    """
    whole = model if root is None else root

    def run(batch: Any) -> Any:
        # a counter, a queue or a hidden state that is carried along would make every run another one
        with suspended_hooks(whole), module_state_kept(whole):
            return loss_fn(batch)

    seen = 0
    for batch in islice(batches, ATTEMPTS):
        seen += 1
        with evaluation_mode(whole), torch.no_grad():
            skipped = run(batch) is SKIPPED
        if not skipped:
            return lambda: run(batch)
    raise CalibrationError(
        f"The groups of {type(model).__name__} are found by running a batch, and"
        + (" there is none." if not seen else f" training_step skipped each of the first {seen}.")
    )
