"""Runs decoder layers again one after the other, with what they were called with in calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import is_convolution
from lit_prune.architectures.layers import after_layer
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.errors import PlanError, UnsupportedModelError
from lit_prune.groups import BLOCK, HIDDEN, GroupSet
from lit_prune.repair.calls import BlockCall
from lit_prune.repair.experts import StopForward
from lit_prune.repair.hidden_states import HiddenStates
from lit_prune.repair.reruns import rerun
from lit_prune.repair.streams import _states, _Stream

# how much of what its consumers add may be missing from the output of a block that counts as a sum
_MISSING = 1e-2


def is_chain(model: nn.Module, group_sets: Sequence[GroupSet]) -> bool:
    """Whether all groups but hidden channels are in blocks that are described, and none is read by a convolution.

    Whether the blocks follow each other shows when they run.
    """
    return all(
        s.block and not any(is_convolution(model.get_submodule(p.module)) for p in s.repairable)
        for s in group_sets
        if s.kind not in (BLOCK, HIDDEN)
    )


def _replayed(name: str) -> contextlib.AbstractContextManager[None]:
    """Turn an error in a block that is run on its own into one that says so."""
    return rerun(f"{name} cannot be run on its own with what it was called with in the model")


@contextlib.contextmanager
def _runs_when_cut(name: str) -> Iterator[None]:
    """Refuse a plan under which a block, which ran on its own before, does not run any more.

    Raises:
        PlanError: If it does not.
    """
    try:
        yield
    except UnsupportedModelError as error:
        raise PlanError(
            f"{name} runs on its own as it is, but not once it is cut as planned: {error.__cause__ or error}. Does its forward"
            " take sizes from an attribute that its description does not name, or from the width of its input?"
        ) from error


def _run(block: nn.Module, inputs: HiddenStates, stream: _Stream, name: str) -> HiddenStates:
    with _replayed(name):
        outputs = (_states(call.run(block, x), name) for x, call in zip(inputs, stream.calls[name], strict=True))
        return HiddenStates(stream.storage, outputs)


def _at_positions(features: Tensor, positions: torch.Size) -> Tensor:
    """Features with the dimensions of the positions, which some blocks flatten; as rows where they are of some positions only."""
    if features.shape[:-1].numel() != positions.numel():
        return features.reshape(-1, features.shape[-1])
    return features.reshape(*positions, features.shape[-1])


def _trace(
    block: nn.Module, paths: Sequence[str], x: Tensor, call: BlockCall, name: str, until: str | None = None
) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
    """Run a block; give its output, and the input and output of some projections in it, in the order of their calls.

    With ``until`` the forward ends behind that projection, and there is no output.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_: nn.Module, inputs: Tensor, output: Tensor) -> None:
            # some blocks add in place to what a projection gives
            found[path] = (_at_positions(inputs, x.shape[:-1]), _at_positions(output, x.shape[:-1]).clone())
            if path == until:
                raise StopForward

        return after

    handles = [after_layer(block.get_submodule(path), hook(path)) for path in paths]
    try:
        with _replayed(name):
            return _states(call.run(block, x), name), found
    except StopForward:
        return None, found
    finally:
        for handle in handles:
            handle.remove()


def _dense_pass(
    block: nn.Module, paths: Sequence[str], inputs: HiddenStates, stream: _Stream, name: str
) -> tuple[HiddenStates, list[dict[str, Tensor]]]:
    """What the dense block and its consumers give for every batch, the latter as the stream's storage holds it."""
    outputs = HiddenStates(stream.storage)
    wanted = []
    for x, call in zip(inputs, stream.calls[name], strict=True):
        output, traced = _trace(block, paths, x, call, name)
        assert output is not None
        if len(outputs) == 0:
            stream.check_replay(name, output)
        outputs.append(output)
        wanted.append({path: stream.storage.put(produced) for path, (_, produced) in traced.items()})
    return outputs, wanted


def _adds_up(x: Tensor, consumed: Mapping[str, Tensor], output: Tensor) -> bool:
    """Whether a block gives its input plus what its consumers give, so that a later one can make up for an error.

    What is missing, beyond what the block's own precision rounds off, is compared by norm with what the consumers give.
    Consumers that give something else than hidden states (the time steps of a state-space model) are not among them.
    """
    wide = accumulation_dtype(output.dtype)
    given = [value.to(wide) for value in consumed.values() if value.shape == x.shape]
    if not given:
        return False
    added = sum(given[1:], start=given[0])
    size = sum((value.abs() for value in given), start=x.to(wide).abs())
    eps = max(torch.finfo(output.dtype).eps, torch.finfo(x.dtype).eps)
    rounding = (len(given) + 1) / 2 * eps * size
    missing = ((output.to(wide) - x.to(wide) - added).abs() - rounding).clamp_min(0)
    return bool(missing.norm() <= _MISSING * added.norm())
