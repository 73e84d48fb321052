"""The processes of a Trainer's run: what one of them meets, all of them raise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_prune.callbacks.packages import is_a
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.errors import RankMismatchError
from lit_prune.plan import PruningPlan

P = ParamSpec("P")
C = TypeVar("C")
T = TypeVar("T")

_RANKS: WeakKeyDictionary[pl.Trainer, tuple[Any, Ranks]] = WeakKeyDictionary()


def ranks_of(trainer: pl.Trainer) -> Ranks | None:
    """The processes of the run, or ``None`` if there is only one; the same object for as long as they are connected."""
    if trainer.world_size == 1:
        return None
    world = torch.distributed.group.WORLD
    if trainer not in _RANKS or _RANKS[trainer][0] is not world:
        sharded = is_a(trainer.strategy, ModelParallelStrategy)
        _RANKS[trainer] = world, Ranks(trainer.strategy.root_device, mean_gradients=not sharded)
    return _RANKS[trainer][1]


def on_all_ranks(
    what: str,
) -> Callable[[Callable[Concatenate[C, pl.Trainer, P], T]], Callable[Concatenate[C, pl.Trainer, P], T]]:
    """Let a callback's hook raise on all processes if it raises on one.

    Args:
        what: What the hook does, for the message.
    """

    def decorated(hook: Callable[Concatenate[C, pl.Trainer, P], T]) -> Callable[Concatenate[C, pl.Trainer, P], T]:
        @functools.wraps(hook)
        def wrapper(callback: C, trainer: pl.Trainer, *args: P.args, **kwargs: P.kwargs) -> T:
            with together(ranks_of(trainer), what):
                return hook(callback, trainer, *args, **kwargs)

        return wrapper

    return decorated


def check_same_on_all_ranks(trainer: pl.Trainer, plan: PruningPlan) -> None:
    """Raise on every process if they computed different plans.

    Raises:
        RankMismatchError: If the digests differ.
    """
    ranks = ranks_of(trainer)
    digests = [plan.digest()] if ranks is None else ranks.gather(plan.digest())
    if len(set(digests)) > 1:
        raise RankMismatchError(
            f"The processes came to different plans: {[d[:12] for d in digests]} by rank. Do they hold the same weights, and"
            " does a criterion of your own depend on the rank? Nothing was pruned."
        )
