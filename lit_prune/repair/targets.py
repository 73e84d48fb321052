"""What the consumers of a decoder layer should give so that the hidden states behind it come near to those of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.repair.hidden_states import HiddenStates
from lit_prune.repair.recording import CallOutputs
from lit_prune.repair.replay import _adds_up, _dense_pass, _run, _trace
from lit_prune.repair.streams import _Stream


@dataclass
class Targets:
    """What the consumers of one layer give in the dense model.

    Args:
        order: Their paths within the layer, in the order of their calls.
        dense: By call, the hidden states that the layer reads in the dense model.
        wanted: By call, what they give there, by path.
        residual: Whether the layer gives its input plus what they give.
    """

    order: list[str]
    dense: HiddenStates
    wanted: list[dict[str, Tensor]]
    residual: bool

    def of(self, number: int, path: str, pruned: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return what a consumer should give, in float32 or more.

        In a layer that adds up, the error of the residual stream before the consumer is part of it.

        Args:
            number: Number of the call.
            path: Path of the consumer.
            pruned: The hidden states that the layer reads in the model as pruned and repaired so far.
            given: What the consumers before it give there, by path.
        """
        dense = self.dense[number]
        wanted = {p: t.to(dense.device, non_blocking=True) for p, t in self.wanted[number].items()}
        wide = accumulation_dtype(given[path].dtype)
        target = wanted[path].to(wide)
        if self.residual and target.shape == dense.shape:
            target = target + (dense.to(wide) - pruned.to(wide))
            for before in self.order[: self.order.index(path)]:
                if given[before].shape == dense.shape:
                    target = target + (wanted[before].to(wide) - given[before].to(wide))
        if path == self.order[-1]:
            # nothing asks for this call again
            self.wanted[number].clear()
        return target


def _targets(
    block: nn.Module,
    paths: Sequence[str],
    dense: HiddenStates,
    stream: _Stream,
    name: str,
    recorded: Sequence[CallOutputs] | None,
) -> tuple[HiddenStates, Targets]:
    """What a dense block gives for every call, and what its consumers give."""
    if recorded is None:
        following, wanted = _dense_pass(block, paths, dense, stream, name)
    else:
        _check_first(block, dense, stream, name)
        following = HiddenStates(stream.storage, map(_given, recorded))
        wanted = [{p: stream.storage.put(t) for p, t in call.consumers.items()} for call in recorded]
    first = dense[0]
    consumed = {p: t.to(first.device) for p, t in wanted[0].items()}
    return following, Targets(list(wanted[0]), dense, wanted, _adds_up(first, consumed, following[0]))


def _following(
    block: nn.Module, dense: HiddenStates, stream: _Stream, name: str, recorded: Sequence[CallOutputs] | None
) -> HiddenStates:
    """What a dense block gives for every call."""
    if recorded is not None:
        _check_first(block, dense, stream, name)
        return HiddenStates(stream.storage, map(_given, recorded))
    following = _run(block, dense, stream, name)
    stream.check_replay(name, following[0])
    return following


def _given(call: CallOutputs) -> Tensor:
    assert call.output is not None
    return call.output


def _check_first(block: nn.Module, dense: HiddenStates, stream: _Stream, name: str) -> None:
    """Run a block on the first call alone, to see that it gives what it gave in the model."""
    output, _ = _trace(block, (), dense[0], stream.calls[name][0], name)
    assert output is not None
    stream.check_replay(name, output)
