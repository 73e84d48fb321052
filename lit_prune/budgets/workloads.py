"""What a model is run on to measure what it takes: prefill, decoding of one token, or a training step."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.budgets.budget import DECODE, PREFILL, TRAIN
from lit_prune.calibration.evaluation import evaluation_mode, unobserved
from lit_prune.errors import BudgetError

# a context that gives a function which runs one calibration batch and returns its loss
Example = Callable[[], contextlib.AbstractContextManager[Callable[[], Tensor | None]]]


def takes_tokens(model: nn.Module) -> bool:
    """Whether the model is called with token ids, so that any batch and length can be made up."""
    embeddings = getattr(model, "get_input_embeddings", None)
    return getattr(model, "main_input_name", "") == "input_ids" and callable(embeddings)


def token_ids(model: Any, batch: int, length: int) -> Tensor:
    """Token ids of shape ``(batch, length)``, always the same; the state of random numbers stays as it is."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


class Workload:
    """Runs a model on made-up token ids, or on one batch of the user's where it takes none.

    Args:
        model: The model.
        batch: Sequences.
        length: Tokens of each.
        example: A context that gives a function which runs one calibration batch and returns its loss, for models that take
            no token ids.

    Raises:
        BudgetError: If the model takes no token ids, and there is no example.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, example: Example | None = None) -> None:
        self.model, self.batch, self.length = model, batch, length
        self.tokens = takes_tokens(model)
        if not self.tokens and example is None:
            raise BudgetError(
                f"{type(model).__name__} is not called with token ids, so that no inputs can be made up for budgets of flops"
                " and latency; they need a calibration batch. Use lit_prune.prune or the callback, which have some."
            )
        self._example = example
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if self.tokens and isinstance(most, int) and length > most:
            raise BudgetError(
                f"The budget is for sequences of {length:,} tokens; {type(model).__name__} has {most:,} positions"
                " (max_position_embeddings). Set the budget's length."
            )

    def forward(self, length: int | None = None) -> None:
        """Run one forward pass, all logits and no cache, over sequences of another length if one is given."""
        with self._evaluating():
            if not self.tokens:
                assert self._example is not None
                with self._example() as run:
                    run()
            else:
                ids = token_ids(self.model, self.batch, length or self.length)
                self.model(input_ids=ids, **self._supported(use_cache=False))

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[Callable[[], None]]:
        """A function to be timed, once it is prepared: one step of a phase.

        Raises:
            BudgetError: If the model has no such phase.
        """
        if phase == TRAIN:
            with self._training() as run:
                yield run
        elif not self.tokens:
            if phase == DECODE:
                raise BudgetError(f"{type(self.model).__name__} is not called with token ids, so it decodes none.")
            assert self._example is not None
            with self._example() as run, self._evaluating():
                yield lambda: _without_result(run)
        else:
            with self._evaluating():
                yield self._prefill if phase == PREFILL else self._decoding()

    def cache(self, length: int, batch: int = 1) -> Any:
        """The key/value cache after so many tokens; ``None`` if the model has none."""
        if not self.tokens or "past_key_values" not in inspect.signature(self.model.forward).parameters:
            return None
        with self._evaluating():
            ids = token_ids(self.model, batch, length)
            return getattr(
                self.model(input_ids=ids, **self._supported(use_cache=True, logits_to_keep=1)), "past_key_values", None
            )

    def _ids(self) -> Tensor:
        return token_ids(self.model, self.batch, self.length)

    def _supported(self, **arguments: Any) -> dict[str, Any]:
        known = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in arguments.items() if name in known}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with unobserved(), evaluation_mode(self.model), torch.no_grad():
            yield

    def _prefill(self) -> None:
        self.model(input_ids=self._ids(), **self._supported(use_cache=True, logits_to_keep=1))

    def _decoding(self) -> Callable[[], None]:
        cache = self.cache(self.length, self.batch)
        if cache is None:
            raise BudgetError(f"{type(self.model).__name__} has no key/value cache, so it decodes no single tokens.")
        ids = token_ids(self.model, self.batch, 1)

        def decode() -> None:
            # the cache grows by one token every time, which is little against its length
            self.model(input_ids=ids, past_key_values=cache, use_cache=True)

        return decode

    @contextlib.contextmanager
    def _training(self) -> Iterator[Callable[[], None]]:
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters]
        modes = [(m, m.training) for m in self.model.modules()]
        devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
        run: Callable[[], Tensor | None] | None = None

        def train() -> None:
            if self.tokens:
                ids = self._ids()
                supported = self._supported(labels=ids, use_cache=False)
                output = self.model(input_ids=ids, **supported)
                loss = output.loss if "labels" in supported else next(iter(output.values())).float().mean()
            else:
                assert run is not None
                loss = run()
            assert loss is not None
            loss.backward()
            for parameter in parameters:
                parameter.grad = None

        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        try:
            with contextlib.ExitStack() as around, torch.random.fork_rng(devices), unobserved(), torch.enable_grad():
                if not self.tokens and self._example is not None:
                    run = around.enter_context(self._example())
                for parameter in parameters:
                    parameter.grad = None
                self.model.train()
                yield train
        finally:
            for buffer, values in buffers:
                if buffer.shape == values.shape:
                    buffer.data.copy_(values)
            for module, training in modes:
                module.training = training
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient


def _without_result(run: Callable[[], Tensor | None]) -> None:
    run()
