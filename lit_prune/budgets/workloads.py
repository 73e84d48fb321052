"""What a model is run on to measure what it takes: prefill, decoding of one token, or a training step."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.positions import token_positions
from lit_prune.budgets.budget import DECODE, PREFILL, TRAIN
from lit_prune.calibration.evaluation import evaluation_mode, unobserved
from lit_prune.errors import BudgetError

# a context that gives a function which runs one calibration batch and returns its loss
Example = Callable[[], contextlib.AbstractContextManager[Callable[[], Tensor | None]]]


# arguments and outputs that are a cache of earlier tokens: keys and values, or states
_CACHES = ("past_key_values", "cache_params")

_OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


def takes_tokens(model: nn.Module) -> bool:
    """Whether the model is called with token ids, so that any batch and length can be made up."""
    if getattr(model, "main_input_name", "") != "input_ids" or _vocabulary(model) is None:
        return False
    if not _OTHER_INPUTS & {*inspect.signature(model.forward).parameters}:
        return True
    # some read images beside a text if there are any, some compare the two
    try:
        with unobserved(), evaluation_mode(model), torch.no_grad():
            model(input_ids=token_ids(model, 1, 1))
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def token_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids of shape ``(batch, length)``, always the same; the state of random numbers stays as it is.

    The last one ends the sequence, and no other does.
    """
    vocabulary = _vocabulary(model)
    assert vocabulary is not None
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    end = getattr(getattr(model, "config", None), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        # classifiers with a decoder read what is there
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    return ids.to(next(model.parameters()).device)


def _vocabulary(model: Any) -> int | None:
    """The number of tokens of the model's only embedding of inputs, ``None`` if it has none."""
    try:
        found = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        # models of images and texts have two, and no method that gives one
        return None
    return found if isinstance(found, int) else None


class Workload:
    """Runs a model on made-up token ids, or on one batch of the user's where it takes none.

    The encoder and the decoder of a model that has both get ``length`` tokens each.

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
        self._known = inspect.signature(model.forward).parameters

    def check_length(self) -> None:
        """Check that the model has as many positions as the sequences have tokens.

        Raises:
            BudgetError: If it has fewer.
        """
        most = token_positions(self.model, getattr(self.model, "config", None)) if self.tokens else None
        if most is not None and self.length > most:
            raise BudgetError(
                f"The budget is for sequences of {self.length:,} tokens; {type(self.model).__name__} has {most:,} positions"
                " (of max_position_embeddings, those that are no padding). Set the budget's length."
            )

    def forward(self, length: int | None = None) -> None:
        """Run one forward pass, all logits and no cache, over sequences of another length if one is given.

        Raises:
            BudgetError: If the model has too few positions.
        """
        self.check_length()
        with self._evaluating():
            if not self.tokens:
                assert self._example is not None
                with self._example() as run:
                    run()
            else:
                ids = token_ids(self.model, self.batch, length or self.length)
                self.model(**self._inputs(ids), **self._supported(use_cache=False))

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[Callable[[], None]]:
        """A function to be timed, once it is prepared: one step of a phase.

        Raises:
            BudgetError: If the model has no such phase, or too few positions.
        """
        self.check_length()
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

    def cache(self, length: int) -> Any:
        """The cache of one sequence after so many tokens, of keys and values or of states; ``None`` if the model has none."""
        if not self.tokens or self._cache_name is None:
            return None
        with self._evaluating():
            return self._filled(1, length)[0]

    @property
    def _cache_name(self) -> str | None:
        return next((name for name in _CACHES if name in self._known), None)

    def _filled(self, batch: int, length: int) -> tuple[Any, Tensor | None]:
        """The cache after so many tokens, if there is one, and what the encoder gives, if there is one."""
        ids = token_ids(self.model, batch, length)
        output = self.model(**self._inputs(ids), **self._supported(use_cache=True, logits_to_keep=1))
        cache = getattr(output, self._cache_name, None) if self._cache_name is not None else None
        return cache, getattr(output, "encoder_last_hidden_state", None)

    def _ids(self) -> Tensor:
        return token_ids(self.model, self.batch, self.length)

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        pair = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return {"input_ids": ids, **(self._supported(decoder_input_ids=ids) if pair else {})}

    def _supported(self, **arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if name in self._known}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with unobserved(), evaluation_mode(self.model), torch.no_grad():
            yield

    def _prefill(self) -> None:
        self.model(**self._inputs(self._ids()), **self._supported(use_cache=True, logits_to_keep=1))

    def _decoding(self) -> Callable[[], None]:
        name = self._cache_name
        cache, encoded = self._filled(self.batch, self.length)
        if name is None or cache is None:
            raise BudgetError(f"{type(self.model).__name__} has no cache, so it decodes no single tokens.")
        ids = token_ids(self.model, self.batch, 1)
        arguments: dict[str, Any] = {name: cache, "use_cache": True}
        arguments |= (
            {"input_ids": ids} if encoded is None else {"decoder_input_ids": ids, "encoder_outputs": (encoded,)}
        )

        def decode() -> None:
            # the cache grows by one token every time, which is little against its length
            self.model(**arguments)

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
                labels = self._supported(labels=ids) if _predicts_tokens(self.model) else {}
                output = self.model(**self._inputs(ids), **labels, **self._supported(use_cache=False))
                loss = output.loss if labels else next(iter(output.values())).float().mean()
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


def _predicts_tokens(model: Any) -> bool:
    """Whether the labels of a model are token ids, not classes."""
    return model.get_output_embeddings() is not None


def _without_result(run: Callable[[], Tensor | None]) -> None:
    run()
