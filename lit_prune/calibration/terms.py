"""A term of a criterion: a function of a weight and a statistic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lit_prune.groups import BLOCK, GroupSet, Slice


@dataclass(frozen=True)
class Term:
    """One summand of a criterion.

    Args:
        function: Maps a parameter, and the statistic if there is one, to the importance of each element.
        statistic: Name of the statistic that ``function`` takes as its second argument, one of
            :func:`lit_prune.calibration.statistic_registry.statistic_names`, or ``None``.
        consumers_only: Whether only the slices that read the groups count (``o_proj``, ``down_proj``).
        per_group: Whether ``function`` takes the statistic alone, which is of groups: ``mask_gradient``, or a
            :class:`~lit_prune.calibration.statistic_registry.GroupStatistic`.
        per_input: Whether ``function`` takes a consumer's weight as ``(out_features, in_features)`` and gives one number
            an input feature, in place of one an element.
        of_product: The same function for a single batch's gradient (or the mean gradient, if that is the statistic), given
            the product of weight and gradient, which it may change in place, element by element. Calibration then works through
            a parameter in small pieces.
    """

    function: Callable[..., Tensor]
    statistic: str | None = None
    consumers_only: bool = False
    per_input: bool = False
    per_group: bool = False
    of_product: Callable[[Tensor], Tensor] | None = None

    def applies(self, group_set: GroupSet, part: Slice) -> bool:
        """Whether the term counts this slice of a group set; whole blocks are scored by the sets in them."""
        if group_set.kind == BLOCK or part.only_in_training:
            return False
        if self.per_group:
            return any(part is s for s in group_set.masked)
        return part.consumes or not self.consumers_only
