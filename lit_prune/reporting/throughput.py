"""Measuring models side by side on a machine that is never quiet."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.inference_mode()
def tokens_per_second(models: Mapping[str, nn.Module], input_ids: Tensor, repeats: int = 7) -> dict[str, list[float]]:
    """Throughput of a forward pass, the models taking turns so that all of them meet the same disturbances.

    Args:
        models: The models by name; each is called with ``input_ids``. They are put in eval mode and back.
        input_ids: Token ids of shape ``(batch, tokens)``.
        repeats: Measurements for each model, after one that warms up.

    Returns:
        By name, ``repeats`` measurements in tokens per second.
    """
    result: dict[str, list[float]] = {name: [] for name in models}
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        for repeat in range(repeats + 1):
            for name, model in models.items():
                _synchronize(input_ids)
                start = time.perf_counter()
                model(input_ids=input_ids)
                _synchronize(input_ids)
                if repeat:
                    result[name].append(input_ids.numel() / (time.perf_counter() - start))
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return result


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
