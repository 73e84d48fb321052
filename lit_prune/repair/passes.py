"""Runs a model on the same calibration batches again and again, and looks at what its layers read and give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import feature_dim
from lit_prune.architectures.layers import before_layer, first_tensor
from lit_prune.calibration.evaluation import evaluation_mode, is_observed
from lit_prune.calibration.module_checks import relative_difference, tolerance
from lit_prune.calibration.random_state import random_state, random_state_kept
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.calibration.token_masks import TokenMasks
from lit_prune.errors import UnsupportedModelError
from lit_prune.repair.influence import influence
from lit_prune.repair.products import Products
from lit_prune.repair.reruns import WAY_OUT, rerun

T = TypeVar("T")

Data = Callable[[], contextlib.AbstractContextManager[tuple[Iterable[Any], Callable[[Any], Any]]]]


# values of an input that are kept to tell batches apart by
_SAMPLE = 4096


def sample(values: Tensor) -> Tensor:
    """Some values of a tensor, spread over all of it."""
    return values.detach().flatten()[:: max(1, values.numel() // _SAMPLE)].clone()


class Call:
    """One call of a layer within a pass.

    Args:
        name: Path of the layer.
        module: The layer; one with a forward of its own as that calls it, with the padding that it has there for instance.
        run: Number of the batch, of all that were run.
        batch: Number of the batch, of those that counted.
        number: How many calls of the layer the batch had before.
        given: What it was called with, or what a forward of its own multiplies with its weight.
        output: What it gave; ``None`` before it has run.
        masks: Tells which positions are real.
        is_product: Whether the layer gave the product of these inputs and its weight, plus its bias, by its attributes.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        run: int,
        batch: int,
        number: int,
        given: Sequence[Any],
        output: Any,
        masks: TokenMasks,
        is_product: bool = True,
    ) -> None:
        self.name, self.module, self.is_product = name, module, is_product
        self.run, self.batch, self.number = run, batch, number
        self._given, self._output, self._masks = given, output, masks

    @property
    def inputs(self) -> Tensor:
        """The tensor that the layer was called with, without a graph. It may be changed in place once the hook is over.

        Raises:
            UnsupportedModelError: If it was called with none.
        """
        found = next((a for a in self._given if isinstance(a, Tensor)), None)
        if found is None:
            raise self._unsupported(f"was called with {[type(a).__name__ for a in self._given]}")
        return found.detach()

    @property
    def output(self) -> Tensor:
        """The tensor that the layer gave, likewise.

        Raises:
            UnsupportedModelError: If it gave something else.
        """
        if not isinstance(self._output, Tensor):
            raise self._unsupported(f"gave a {type(self._output).__name__}")
        return self._output.detach()

    def mask(self, hidden: Tensor) -> Tensor | None:
        """The mask of hidden states with features last, see :meth:`TokenMasks.of`."""
        return self._masks.of(hidden)

    def influence(self, rows: Tensor) -> Tensor | None:
        """How much some rows of the output count, shape ``(rows, 1)``; ``None`` where all count alike.

        Tokens have outliers that the model has no use for, see :func:`lit_prune.repair.influence.influence`; positions of
        feature maps differ by what is seen there.
        """
        if feature_dim(self.module) != -1 or self.output.dim() < 3:
            return None
        return influence(self.output, self.mask(self.output), self._masks.batch_dim).reshape(-1, 1)[rows]

    def _unsupported(self, found: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name} ({type(self.module).__name__}) {found}; expected a tensor.")


@dataclass(frozen=True)
class _Run:
    """What the first pass of one batch was like.

    Args:
        skipped: Whether it did not count.
        calls: How often each layer was called that was.
        rewind: Puts random numbers where they were after it.
    """

    skipped: bool
    calls: Mapping[str, int]
    rewind: Callable[[], None]


class _Over(BaseException):
    """Ends a batch whose remaining layers nobody looks at; no error, which a training step might catch."""


class Passes:
    """Runs the same calibration batches in every pass, with the same random numbers.

    Args:
        model: The model.
        data: Gives a context with the batches and a function that runs one of them.
        root: The module that holds the model, if running a batch runs more than the model.
        stops: Whether a batch ends once the layers of a pass were called as often as in the first pass: what comes behind them
            is not run. Random numbers are then as if it had been.
    """

    def __init__(self, model: nn.Module, data: Data, root: nn.Module | None, *, stops: bool = False) -> None:
        self._stops = stops
        self._model = model
        self._root = model if root is None else root
        self._data = data
        self._rewind = random_state()
        # the layer that runs first, and by batch some values of what it reads
        self._first: str | None = None
        self._samples: list[Tensor] = []
        self._runs: int | None = None
        # by batch run, what its first pass was like
        self._known: list[_Run] = []

    def check_batches_by(self, name: str) -> None:
        """Refuse later passes with other batches, by the input of a layer that no change of the model has an effect on."""
        self._first = name

    @torch.no_grad()
    def run(
        self,
        names: Iterable[str],
        take: Callable[[Call], T],
        use: Callable[[Mapping[str, Sequence[T]]], None],
        *,
        within: contextlib.AbstractContextManager[Any] | None = None,
        before: Callable[[Call], Any] | None = None,
        compare: bool = True,
    ) -> int:
        """Run all batches once.

        Args:
            names: Paths of layers.
            take: Called after every call of these layers; what it gives is kept until the batch is over.
            use: Called after every batch that counts with what was taken, by layer and in the order of its calls.
            within: A context to run the batches in.
            before: Called before every call of these layers.
            compare: Whether the batches have to show the layer of :meth:`check_batches_by` what they did before.

        Returns:
            Number of batches that counted.

        Raises:
            UnsupportedModelError: If the batches are not those of the passes before, or one cannot be run again.
        """
        taken: dict[str, list[T]] = {}
        watched = {name: self._model.get_submodule(name) for name in dict.fromkeys(names)}
        masks, products = TokenMasks(self._model, watched), Products(watched)
        count, runs, first = 0, 0, not self._known

        def call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any = None) -> Call:
            read = _read(watched[name], args, kwargs)
            module, given, is_product = products.of_call(name, watched[name], read, output)
            return Call(name, module, runs, count, len(taken.get(name, ())), given, output, masks, is_product)

        def after(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            value = take(call(name, args, kwargs, output))
            taken.setdefault(name, []).append(value)
            if self._stops and self._is_over(runs - 1, taken, watched):
                raise _Over

        def ahead(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            assert before is not None
            before(call(name, args, kwargs))

        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state_kept())
            self._rewind()
            batches, forward = stack.enter_context(self._data())
            stack.enter_context(evaluation_mode(self._root))
            stack.enter_context(within or contextlib.nullcontext())
            stack.enter_context(masks)
            stack.enter_context(products.watched())
            sampler = stack.enter_context(self._sampled(compare))
            stack.enter_context(_hooked(watched, after, None if before is None else ahead))
            for batch in batches:
                masks.start_batch(batch)
                taken.clear()
                sampler.clear()
                runs += 1
                skipped = False
                try:
                    with rerun(f"Calibration batch {runs - 1} ran before, and cannot be run again"):
                        skipped = forward(batch) is SKIPPED
                except _Over:
                    self._known[runs - 1].rewind()
                if first:
                    self._known.append(_Run(skipped, {n: len(v) for n, v in taken.items()}, random_state()))
                if skipped:
                    continue
                self._compare(count, sampler)
                use(taken)
                count += 1
        self._check_number(runs)
        return count

    def _is_over(self, run: int, taken: Mapping[str, Sequence[Any]], watched: Iterable[str]) -> bool:
        """Whether the layers of a pass were called as often as when the batch was run first, and the batch counted then."""
        if run >= len(self._known):
            return False
        known = self._known[run]
        return not known.skipped and all(0 < known.calls.get(name, 0) <= len(taken.get(name, ())) for name in watched)

    def _check_number(self, runs: int) -> None:
        self._runs = runs if self._runs is None else self._runs
        if runs != self._runs:
            raise UnsupportedModelError(
                f"The calibration batches were {self._runs} at first and {runs} now; layers are refitted in several passes over"
                " the same batches. Give a list or a dataloader, not an iterator."
            )

    @contextlib.contextmanager
    def _sampled(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Some values of what the first layer reads, for the batch at hand, if they are wanted."""
        found: list[Tensor] = []
        if self._first is None or not wanted:
            yield found
            return

        def hook(_: nn.Module, inputs: Tensor) -> None:
            if is_observed() and not found:
                found.append(sample(inputs))

        handle = before_layer(self._model.get_submodule(self._first), hook)
        try:
            yield found
        finally:
            handle.remove()

    def _compare(self, number: int, found: Sequence[Tensor]) -> None:
        if not found:
            return
        if number == len(self._samples):
            self._samples.append(found[0])
            return
        known = self._samples[number] if number < len(self._samples) else None
        if known is None or not relative_difference(found[0], known) <= tolerance(known.dtype):
            raise UnsupportedModelError(
                f"Calibration batch {number} is not the same every time that the batches are run (what {self._first} reads"
                " differs), so that layers cannot be refitted one after the other. Give batches in a fixed order and without"
                f" random numbers of their own. {WAY_OUT}"
            )


def _read(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The tensor that a module was called with; all that it was called with if that is none."""
    first = first_tensor(module, args, kwargs)
    return (*args, *kwargs.values()) if first is None else (first,)


@contextlib.contextmanager
def _hooked(
    watched: Mapping[str, nn.Module], after: Callable[..., None], before: Callable[..., None] | None
) -> Iterator[None]:
    """Call ``before`` and ``after`` around every observed call of some layers.

    Args:
        watched: The layers, by path.
        after: Called with path, arguments, keyword arguments and output.
        before: Called with path, arguments and keyword arguments.
    """

    def hook(function: Callable[..., None], name: str, _: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if is_observed():
            with torch.no_grad():
                function(name, args, kwargs, *output)

    with contextlib.ExitStack() as stack:
        for name, module in watched.items():
            if before is not None:
                ahead = partial(hook, before, name)
                stack.callback(module.register_forward_pre_hook(ahead, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(hook, after, name), with_kwargs=True).remove)
        yield


class Replacements:
    """Other values of some parameters of a model, for as long as :meth:`applied` lasts.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # by identity: a parameter may have several names
        self._values: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The replacement of a parameter, to be changed in place; a copy of the parameter to begin with."""
        parameter = self._model.get_parameter(name)
        if id(parameter) not in self._values:
            self._values[id(parameter)] = parameter, parameter.detach().clone()
        return self._values[id(parameter)][1]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters have the replaced values; undone at the end, bit for bit."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for parameter, value in self._values.values():
                    before.append((parameter, parameter.detach().clone()))
                    parameter.copy_(value)
            # an autocast around it would go on with its copies in 16 bits of the values before
            torch.clear_autocast_cache()
            yield
        finally:
            with torch.no_grad():
                for tensor, old in before:
                    tensor.copy_(old)
            torch.clear_autocast_cache()
