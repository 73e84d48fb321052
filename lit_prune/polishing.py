"""From a repaired model to a polished one: recorded before the first cut what the dense model gives, used after the last."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lit_prune.architectures.adaptations import nothing_to_undo
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet
from lit_prune.repair.dense_outputs import DenseOutputs, record_outputs
from lit_prune.repair.passes import Data
from lit_prune.repair.polish import polish
from lit_prune.surgery.references import suspended_hooks


class Polishing:
    """Trains the layers that a repair refits towards the dense model, see :func:`lit_prune.repair.polish.polish`.

    Args:
        model: The dense model.
        data: Gives a context with the calibration batches and a function that runs one.
        epochs: Number of passes; with 0 nothing is recorded or trained.
        held_back: Whether a batch decides when to stop, by its number from 0.
        root: The module that holds the model, if the function runs more than the model.
        ranks: The processes of a distributed run, each with batches of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        epochs: int,
        held_back: Callable[[int], bool],
        *,
        root: nn.Module | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._data, self._epochs, self._root, self._ranks = model, data, epochs, root, ranks
        self._held_back = held_back
        self._dense: DenseOutputs | None = None

    def record_dense(self) -> None:
        """Record what the model gives, which is still the dense one. One that gives nothing to compare gets a warning."""
        if not self._epochs:
            return
        try:
            with suspended_hooks(self._holder), together(self._ranks, "polishing"):
                self._dense = record_outputs(self._model, self._data, self._root, self._ranks)
        except UnsupportedModelError as error:
            warnings.warn(f"Nothing will be polished: {error}", stacklevel=3)

    def polish(self, group_sets: Sequence[GroupSet]) -> tuple[dict[str, Any], Callable[[], None]]:
        """Polish the model, which is pruned by now. One that cannot be polished gets a warning.

        Args:
            group_sets: The group sets that it has now.

        Returns:
            What the plan says of it: ``"polish"``, the loss of held-back batches before the first and after each pass; and a
            function that undoes it.
        """
        if self._dense is None:
            return {}, nothing_to_undo
        try:
            with suspended_hooks(self._holder), together(self._ranks, "polishing"):
                losses, undo = polish(
                    self._model,
                    group_sets,
                    self._data,
                    self._dense,
                    self._epochs,
                    root=self._root,
                    ranks=self._ranks,
                    held_back=self._held_back,
                )
        except UnsupportedModelError as error:
            warnings.warn(f"Nothing was polished: {error}", stacklevel=3)
            return {}, nothing_to_undo
        return {"polish": [round(value, 6) for value in losses]}, undo

    @property
    def _holder(self) -> nn.Module:
        return self._model if self._root is None else self._root
