"""Which norms and layers read and write the hidden states, and in which order, found by running a block or the model once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_prune.architectures.layers import after_layer, hidden_output
from lit_prune.calibration.evaluation import is_observed
from lit_prune.groups import Slice
from lit_prune.repair.calls import BlockCall


@dataclass
class Unit:
    """Layers that are refitted together.

    Args:
        paths: The layers, relative to the block: all that read one tensor of hidden states, one that reads heads or channels,
            or a norm alone whose output no layer reads.
        parts: Of each layer the slice that reads its input; of a norm alone none.
        norm: The norm that gives what they read, if any.
        reads: Whether they read hidden states.
    """

    paths: list[str]
    parts: list[Slice]
    norm: str | None
    reads: bool


def units(
    block: nn.Module,
    x: Tensor,
    call: BlockCall,
    readers: Mapping[str, Slice],
    consumers: Mapping[str, Slice],
    norms: Sequence[str],
) -> list[Unit]:
    """Return what is to be refitted in a block, in the order of the calls.

    Args:
        block: The block.
        x: Hidden states that it is called with.
        call: What it is called with besides.
        readers: The slices that read hidden states, by the path of their layer in the block.
        consumers: Those that read heads and channels.
        norms: Paths of the norms over hidden channels.
    """
    found: list[Unit] = []
    # what was read stays in memory, so that no address comes twice
    held: list[tuple[Tensor, Unit]] = []
    given: list[tuple[Tensor, str]] = []

    def after(path: str, inputs: Tensor, output: Tensor) -> None:
        if path in norms:
            given.append((output, path))
            found.append(Unit([path], [], path, False))
        elif path in consumers:
            found.append(Unit([path], [consumers[path]], None, False))
        elif (unit := next((u for t, u in held if same_values(t, inputs)), None)) is not None:
            unit.paths.append(path)
            unit.parts.append(readers[path])
        else:
            norm = next((n for t, n in given if same_values(t, inputs)), None)
            # its scale is fitted with the layers that read it
            found[:] = [u for u in found if u.parts or u.norm != norm]
            found.append(Unit([path], [readers[path]], norm, True))
            held.append((inputs, found[-1]))

    with _watched({p: block.get_submodule(p) for p in (*norms, *readers, *consumers)}, after):
        call.run(block, x)
    return found


def called_before(model: nn.Module, names: Sequence[str], first: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Return which of some modules are called before another one is, when a batch is run."""
    called: list[str] = []
    begun: list[bool] = []
    handle = first.register_forward_pre_hook(lambda *_: begun.append(True))
    try:
        with _watched(
            {n: model.get_submodule(n) for n in names}, lambda path, *_: None if begun else called.append(path)
        ):
            run()
    finally:
        handle.remove()
    return list(dict.fromkeys(called))


def read_behind(
    model: nn.Module, last: nn.Module, norms: Sequence[str], readers: Sequence[str], run: Callable[[], Any]
) -> tuple[str, list[str]] | None:
    """Return the norm that is called with what the last block gives, and the layers that read all of what it gives.

    Args:
        model: The model.
        last: Its last block.
        norms: Names of the norms that may be it.
        readers: Names of the layers that may read it.
        run: Runs a batch.

    Returns:
        Names of the norm and the layers; ``None`` if no norm is.
    """
    end: list[Tensor] = []
    given: list[tuple[Tensor, str]] = []
    found: list[str] = []

    def after(path: str, inputs: Tensor, output: Any) -> None:
        if not path:
            end[:] = [hidden_output(output)]
        elif path in norms:
            if end and same_values(end[0], inputs):
                given.append((output, path))
        elif any(same_values(t, inputs) for t, _ in given):
            found.append(path)

    with _watched({"": last, **{n: model.get_submodule(n) for n in (*norms, *readers)}}, after):
        run()
    return (given[-1][1], list(dict.fromkeys(found))) if given else None


def norms_and_readers(
    model: nn.Module, norms: Sequence[str], readers: Sequence[str], run: Callable[[], Any]
) -> dict[str, list[str]]:
    """Return, for every norm that runs, the layers that read what it gives.

    Args:
        model: The model.
        norms: Names of norms.
        readers: Names of the layers that may read them.
        run: Runs a batch.
    """
    given: list[tuple[Tensor, str]] = []
    found: dict[str, list[str]] = {}

    def after(path: str, inputs: Tensor, output: Tensor) -> None:
        if path in norms:
            given.append((output, path))
            found.setdefault(path, [])
            return
        norm = next((n for t, n in given if same_memory(t, inputs)), None)
        if norm is not None and path not in found[norm]:
            found[norm].append(path)

    with _watched({n: model.get_submodule(n) for n in (*norms, *readers)}, after):
        run()
    return found


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of one piece of memory: a head may read the last position alone."""
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same memory, whatever their shapes."""
    return first.data_ptr() == second.data_ptr() and first.numel() == second.numel()


@contextlib.contextmanager
def _watched(modules: Mapping[str, nn.Module], after: Callable[..., Any]) -> Iterator[None]:
    """Call ``after`` with path, input and output behind every observed call of some modules."""

    def hook(path: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: Tensor, output: Any) -> None:
            if is_observed():
                after(path, inputs, output)

        return look

    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(after_layer(module, hook(path)).remove)
        yield
