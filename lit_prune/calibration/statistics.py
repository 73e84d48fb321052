"""The result of a calibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from lit_prune.architectures.features import spread_features
from lit_prune.calibration.activations import ActivationStatistics
from lit_prune.calibration.statistic_registry import InputStatistic, get_statistic
from lit_prune.calibration.terms import Term
from lit_prune.distributed.ranks import Ranks
from lit_prune.groups import Slice

MODES = ("streaming", "elementwise")


GRADIENT_DTYPES = ("float32", "bfloat16")


class _Skipped:
    def __repr__(self) -> str:
        return "SKIPPED"


SKIPPED: Final = _Skipped()


"""What a loss function returns for a batch that is not to count: neither its loss, nor what went through the model."""


@dataclass
class Statistics:
    """What a calibration collected.

    Args:
        batches: Number of calibration batches that counted.
        skipped: Number of calibration batches that had no loss, and did not count.
        elementwise: By statistic and parameter, a tensor of the parameter's shape, a mean over the batches; of a sharded
            parameter only the local shard.
        reduced: By term, group-set key and position of the slice in its set, a float32 tensor of shape ``(groups,)``,
            a mean over the batches; of a sharded parameter only what the local shard adds to it. Terms of whole groups
            (``mask_gradient``, a :class:`GroupStatistic`) are at position 0, and whole in every process.
        activations: By module, the statistics of its inputs.
        loss: Mean calibration loss, if losses were computed.
        unexplained: By group-set key, what share of each group's contribution others cannot make up for, tensors of shape
            ``(groups,)``; see :func:`lit_prune.repair.redundancy.unexplained_shares`. Empty if that was not asked for.
    """

    batches: int = 0
    skipped: int = 0
    elementwise: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reduced: dict[tuple[Term, tuple[str, str], int], Tensor] = field(default_factory=dict)
    activations: dict[str, ActivationStatistics] = field(default_factory=dict)
    loss: float | None = None
    unexplained: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens seen, 0 without activation statistics."""
        return max((a.count for a in self.activations.values()), default=0)

    def reduce_activations(self, ranks: Ranks) -> None:
        """Add up, in place, what several processes observed on their own batches; the counts of tokens may differ."""
        for name in sorted(self.activations):
            activation = self.activations[name]
            activation.count = int(ranks.sum(torch.tensor(activation.count)))
            activation.sums = {key: ranks.sum(value) for key, value in activation.sums.items()}

    def activation_of(self, part: Slice, statistic: str, weight: Tensor) -> Tensor:
        """A statistic of the input features that a slice's parameter multiplies, broadcastable against the parameter.

        Every weight of a convolution's kernel multiplies its input channel, so that all of them get the channel's number.

        A bias or a norm's scale multiplies the constant 1 in every token; for want of better,
        so does a slice whose input cannot be observed.
        """
        known = get_statistic(statistic)
        assert isinstance(known, InputStatistic)
        module = self.activations.get(part.module)
        if not part.observable or part.input_dim is None or module is None:
            return torch.full((), known.of_constant(max(self.tokens, 1)), dtype=torch.float32, device=weight.device)
        values = module.statistic(known).to(device=weight.device, dtype=torch.float32)
        return spread_features(values, weight, part.input_dim)

    def feature_groups(self, part: Slice, weight: Tensor) -> int:
        """How many input features of its module a position of the slice's parameter stands for.

        One, but for a convolution in several groups of channels.
        """
        module = self.activations.get(part.module)
        if not part.observable or part.input_dim is None or module is None:
            return 1
        return max(1, module.features // max(1, weight.shape[part.input_dim]))


def check_gathering(mode: str, gradient_dtype: str) -> None:
    """Refuse an unknown way to gather gradients.

    Raises:
        ValueError: If the mode is none of :data:`MODES`, or the dtype none of :data:`GRADIENT_DTYPES`.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown statistics mode {mode!r}; expected one of {', '.join(MODES)}.")
    if gradient_dtype not in GRADIENT_DTYPES:
        raise ValueError(f"Unknown gradient_dtype {gradient_dtype!r}; expected one of {', '.join(GRADIENT_DTYPES)}.")
