"""The result of a calibration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import spread_features
from lit_prune.arguments import PATH
from lit_prune.calibration.activations import ActivationStatistics, observed_modules
from lit_prune.calibration.statistic_registry import InputStatistic, get_statistic
from lit_prune.calibration.statistics_file import check_model, described, read, term_label, write
from lit_prune.calibration.terms import Term
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import CalibrationError, PruningError
from lit_prune.groups import GroupSet, Slice

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

    def save(self, path: str | os.PathLike[str], model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
        """Write a safetensors file, whole or not at all, from which plans for any ratio can be made later.

        Args:
            path: The file.
            model: The model that was calibrated.
            group_sets: Its group sets.

        Raises:
            PruningError: If it cannot be written.
            UnsupportedModelError: If the model is sharded.
        """
        tensors: dict[str, Tensor] = {}
        fields: dict[str, Any] = {name: [] for name in ("elementwise", "reduced", "activations", "unexplained")}

        def add(kind: str, key: list[Any], **values: Tensor) -> None:
            number = len(fields[kind])
            fields[kind].append(key)
            tensors.update({f"{kind}.{number}{name and '.'}{name}": value for name, value in values.items()})

        for statistic, by_parameter in self.elementwise.items():
            for parameter, value in by_parameter.items():
                add("elementwise", [statistic, parameter], **{"": value})
        for (term, key, position), value in self.reduced.items():
            add("reduced", [term_label(term), *key, position], **{"": value})
        for module, activation in self.activations.items():
            add("activations", [module, activation.count, sorted(activation.sums)], **activation.sums)
        for key, value in self.unexplained.items():
            add("unexplained", list(key), **{"": value})
        counts = {"batches": self.batches, "skipped": self.skipped, "loss": self.loss}
        write(PATH.check("path", path), tensors, {"model": described(model, group_sets), **counts, **fields})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        terms: Iterable[Term],
    ) -> Statistics:
        """Read what :meth:`save` wrote, on the device of the model.

        Args:
            path: The file.
            model: The model, with the weights that it was calibrated with.
            group_sets: Its group sets.
            terms: The terms that are needed, :attr:`PruningConfig.terms` for instance.

        Raises:
            CalibrationError: If the statistics of a term are not in the file.
            FileNotFoundError: If there is no file.
            PlanError: If the file is of another model, or of other weights of it.
            PruningError: If it is damaged, or holds something else.
        """
        path = PATH.check("path", path)
        tensors, found = read(path)
        check_model(path, found.get("model"), model, group_sets)
        device = next(model.parameters()).device
        terms = list(terms)
        try:
            statistics = _loaded(found, {name: tensor.to(device) for name, tensor in tensors.items()}, terms)
        except (KeyError, TypeError, ValueError) as error:
            raise PruningError(f"{path} is damaged: {error!r} is missing or malformed. Calibrate again.") from error
        lacking = [term_label(term) for term in terms if _lacks(statistics, term, group_sets)]
        if lacking:
            raise CalibrationError(
                f"{path} holds nothing for {lacking[0]!r}, which the importance needs. Calibrate with the importance that the"
                " plan is to be made with."
            )
        return statistics

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


def _loaded(found: dict[str, Any], tensors: dict[str, Tensor], terms: Sequence[Term]) -> Statistics:
    by_label = {term_label(term): term for term in terms}
    statistics = Statistics(found["batches"], found["skipped"], loss=found["loss"])
    for number, (statistic, parameter) in enumerate(found["elementwise"]):
        statistics.elementwise.setdefault(statistic, {})[parameter] = tensors[f"elementwise.{number}"]
    for number, (label, name, kind, position) in enumerate(found["reduced"]):
        if label in by_label:
            statistics.reduced[by_label[label], (name, kind), position] = tensors[f"reduced.{number}"]
    for number, (module, count, sums) in enumerate(found["activations"]):
        values = {name: tensors[f"activations.{number}.{name}"] for name in sums}
        statistics.activations[module] = ActivationStatistics(count, values)
    for number, (name, kind) in enumerate(found["unexplained"]):
        statistics.unexplained[name, kind] = tensors[f"unexplained.{number}"]
    return statistics


def _lacks(statistics: Statistics, term: Term, group_sets: Sequence[GroupSet]) -> bool:
    """Whether nothing was collected for a term."""
    if term.statistic is None:
        return False
    known = get_statistic(term.statistic)
    if isinstance(known, InputStatistic):
        if not statistics.activations:
            return bool(observed_modules(group_sets))
        return not all(known.sums.keys() <= a.sums.keys() for a in statistics.activations.values())
    return term.statistic not in statistics.elementwise and all(key[0] != term for key in statistics.reduced)


def check_gathering(mode: str, gradient_dtype: str) -> None:
    """Refuse an unknown way to gather gradients.

    Raises:
        ValueError: If the mode is none of :data:`MODES`, or the dtype none of :data:`GRADIENT_DTYPES`.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown statistics mode {mode!r}; expected one of {', '.join(MODES)}.")
    if gradient_dtype not in GRADIENT_DTYPES:
        raise ValueError(f"Unknown gradient_dtype {gradient_dtype!r}; expected one of {', '.join(GRADIENT_DTYPES)}.")
