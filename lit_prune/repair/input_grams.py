"""Gram matrices of what linear layers read, all at once: for what needs those of many layers again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import before_layer
from lit_prune.calibration.evaluation import evaluation_mode, is_observed
from lit_prune.calibration.token_masks import TokenMasks
from lit_prune.repair.consumer_grams import ConsumerGrams


@torch.no_grad()
def input_grams(
    model: nn.Module,
    features: Mapping[str, int],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    root: nn.Module | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, tuple[Tensor, float]]:
    """Return the Gram matrices of the inputs of some layers over the real tokens of all batches.

    All of them are held at the same time: ``features ** 2`` numbers for each layer. So are the inputs of one batch.

    Args:
        model: The model.
        features: By the names of the layers, whose inputs have their features last, the number of those.
        batches: Calibration batches.
        forward: Runs one batch through the model and returns its loss; a batch without one, which a training step skips, does
            not count.
        root: The module that holds the model, if ``forward`` runs more than the model.
        all_reduce: Sums a tensor over the processes, if there are several.

    Returns:
        By name the matrix, shape ``(features, features)``, and the number of tokens. A layer that no batch went through on
        any process is left out.
    """
    grams = ConsumerGrams()
    # of the batch at hand, which may turn out not to count
    read: list[tuple[str, Tensor, Tensor | None]] = []

    def observe(name: str, masks: TokenMasks) -> Callable[[nn.Module, Tensor], None]:
        def hook(_: nn.Module, inputs: Tensor) -> None:
            if is_observed():
                # the model may change it in place later
                read.append((name, inputs.detach().clone(), masks.of(inputs)))

        return hook

    with evaluation_mode(model if root is None else root), contextlib.ExitStack() as stack:
        masks = stack.enter_context(TokenMasks(model, list(features)))
        for name in features:
            stack.callback(before_layer(model.get_submodule(name), observe(name, masks)).remove)
        for batch in batches:
            masks.start_batch(batch)
            read.clear()
            if isinstance(forward(batch), Tensor):
                for name, inputs, mask in read:
                    grams.add(name, inputs, mask)
        read.clear()
    found = {}
    for name in features:
        # the inputs lie along the last dimension of a matrix of their own number
        like = model.get_parameter(f"{name}.weight").new_empty(0, features[name])
        gram, tokens = grams.take(name, like, 1, all_reduce)
        if count := float(tokens):
            found[name] = gram, count
    return found
