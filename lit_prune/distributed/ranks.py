"""What the processes of a distributed run have to agree on while they calibrate on batches of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_prune import errors
from lit_prune.errors import PruningError, RankError


class Ranks:
    """The processes of a run, each with calibration batches of its own; every method is a collective.

    Before anything is exchanged the processes tell each other that they are well, over a group of their own on the CPU. A
    process that met an error within :meth:`together` answers the next such question of the others, wherever they are, and
    all of them raise: none waits for one that does not come.

    Args:
        device: Where the process group's tensors have to be.
        mean_gradients: Whether gradients are local, and have to be averaged over the processes. Not so under FSDP2,
            which does it itself.

    Attributes:
        lost: Whether this process met an error that the others did not answer to.
    """

    # how long a process that failed waits for the others, who may be in a long step, or in a collective of someone else
    patience = timedelta(seconds=120)

    def __init__(self, device: torch.device, *, mean_gradients: bool = True) -> None:
        self.device = device
        self.mean_gradients = mean_gradients
        self.size = dist.get_world_size()
        self.lost = False
        self._status = dist.new_group(backend="gloo")
        # the error that all know of already, or that nobody can be told of
        self._told: BaseException | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, the same on all of them, on the device and in the dtype given."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of every process's tensor, in float32 at least."""
        # summed and divided: gloo has no average
        return self.sum(tensor.to(torch.promote_types(tensor.dtype, torch.float32))) / self.size

    def minimum(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum over the processes."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; plain data."""
        self.agree()
        return self._gathered(value)

    def all(self, flag: bool = True) -> bool:
        """Whether the flag is set on every process.

        Raises:
            PruningError: If another process met an error within :meth:`together`.
        """
        well, flags = self._exchange(well=True, flag=flag)
        if not well:
            self._raise(self._gathered(None), None)
        return flags

    def agree(self) -> None:
        """Wait for the others, and raise if one of them met an error within :meth:`together`.

        Raises:
            PruningError: Naming the process, what it did, and its error.
        """
        self.all()

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Let what is done within fail on all processes if it fails on one, and end at the same time on all.

        Args:
            what: What is done, for the message: "calibration".

        Raises:
            PruningError: On all processes, if an error was raised on some: of the class of their errors if that is one of
                lit_prune's, :class:`RankError` otherwise. If all of them met the same error, that.
        """
        try:
            yield
        except BaseException as error:
            if not self._is_told(error):
                self._tell(error, what)
            raise
        self.agree()

    @contextlib.contextmanager
    def unguarded(self) -> Iterator[None]:
        """Mark what others than lit_prune run with collectives of their own: an error within is raised at once.

        The others are somewhere within as well, and could not answer. The processes enter together.
        """
        self.agree()
        try:
            yield
        except BaseException as error:
            self._told = error
            raise

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        self.agree()
        result = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(result, op=operation)
        return result.to(tensor.device)

    def _exchange(self, *, well: bool, flag: bool, timeout: timedelta | None = None) -> tuple[bool, bool]:
        """Whether all processes are well, and whether all flags are set: one number each, so that any two calls match."""
        values = torch.tensor([well, flag], dtype=torch.int32)
        work = dist.all_reduce(values, op=dist.ReduceOp.MIN, group=self._status, async_op=True)
        assert work is not None
        if timeout is None:
            work.wait()
        else:
            work.wait(timeout)
        return bool(values[0]), bool(values[1])

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._status)
        return values

    def _tell(self, error: BaseException, what: str) -> None:
        """Tell the others of an error, and raise what all raise; return if it is the error itself."""
        entry = (what, type(error).__name__, str(error), isinstance(error, PruningError))
        try:
            self._exchange(well=False, flag=False, timeout=self.patience)
            told = self._gathered(entry)
        except RuntimeError:
            # no answer in time, or a broken connection
            self.lost = True
            told = [entry if rank == dist.get_rank() else None for rank in range(self.size)]
        self._raise(told, error)

    def _raise(self, told: list[Any], error: BaseException | None) -> None:
        failed = {rank: entry for rank, entry in enumerate(told) if entry is not None}
        same = len(failed) == self.size and len(set(failed.values())) == 1
        if error is not None and (same or not isinstance(error, Exception)):
            self._told = error
            return
        lines = "; ".join(
            f"process {rank} of {self.size}, in {what}: {name}: {text}"
            for rank, (what, name, text, _) in failed.items()
        )
        end = "all processes stop"
        if self.lost:
            end = (
                f"the others did not answer within {self.patience.total_seconds():.0f} seconds: they are gone, busy, or wait in"
                " a collective that is not lit_prune's"
            )
        names = {name if ours else "" for _, name, _, ours in failed.values()}
        kind: type[PruningError] = getattr(errors, names.pop(), RankError) if len(names) == 1 else RankError
        self._told = kind(f"{lines} ({end})")
        raise self._told from error

    def _is_told(self, error: BaseException | None) -> bool:
        while error is not None:
            if error is self._told:
                return True
            error = error.__cause__ or error.__context__
        return False


def together(ranks: Ranks | None, what: str) -> contextlib.AbstractContextManager[None]:
    """:meth:`Ranks.together`, or nothing where there is one process."""
    return contextlib.nullcontext() if ranks is None else ranks.together(what)


def unguarded(ranks: Ranks | None) -> contextlib.AbstractContextManager[None]:
    """:meth:`Ranks.unguarded`, or nothing where there is one process."""
    return contextlib.nullcontext() if ranks is None else ranks.unguarded()
