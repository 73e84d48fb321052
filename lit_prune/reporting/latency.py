"""Latency and peak memory of models side by side, on a machine that is never quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lit_prune.groups import count_bytes

REPEATS = 7
# tokens that are generated one after the other
DECODED = 16


def _nothing() -> None:
    pass


@torch.inference_mode()
def generation_costs(
    models: Mapping[str, Any],
    input_ids: Tensor,
    *,
    repeats: int = REPEATS,
    decoded: int = DECODED,
    done: Callable[[], object] = _nothing,
) -> dict[str, dict[str, float]]:
    """Time of reading a prompt and of every token generated after it, and peak memory; the models take turns.

    Args:
        models: Causal language models by name. They are put in eval mode and back.
        input_ids: The prompt, token ids of shape ``(batch, tokens)``.
        repeats: Measurements of each model, after one that warms up.
        decoded: Tokens that are generated, one after the other; what they are does not matter.
        done: Called after every measurement.

    Returns:
        By name: ``"prefill_ms"`` and ``"decode_ms"`` (of a token), medians, each with a ``"..._spread"``, the half of the
        distance between the quartiles; ``"tokens_per_second"`` of reading the prompt; and, in megabytes, ``"peak_memory"`` of
        the weights, the cache and what is computed.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"prefill_ms": [], "decode_ms": []} for name in models}

    def run(model: Any) -> tuple[float, float]:
        start = _now(input_ids)
        output = model(input_ids=input_ids, use_cache=True)
        read = _now(input_ids)
        for _ in range(decoded):
            output = model(input_ids=input_ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
        return 1e3 * (read - start), 1e3 * (_now(input_ids) - read) / decoded

    with _evaluating(models):
        for repeat in range(repeats + 1):
            for name, model in models.items():
                found = run(model)
                if repeat:
                    for kind, value in zip(times[name], found, strict=True):
                        times[name][kind].append(value)
                done()
        peaks = {name: _peak(model, input_ids.device, partial(run, model)) for name, model in models.items()}
    result = {}
    for name, by_kind in times.items():
        result[name] = _summary(by_kind)
        result[name]["tokens_per_second"] = 1e3 * input_ids.numel() / result[name]["prefill_ms"]
        result[name]["peak_memory"] = peaks[name] / 1e6
    return result


@torch.inference_mode()
def run_costs(
    models: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Tensor]],
    *,
    repeats: int = REPEATS,
    done: Callable[[], object] = _nothing,
) -> dict[str, dict[str, float]]:
    """Time and peak memory of a forward pass, as :func:`generation_costs` measures them; the time is ``"forward_ms"``.

    Args:
        models: Models by name. They are put in eval mode and back.
        inputs: The keyword arguments that each is called with.
        repeats: Measurements of each model, after one that warms up.
        done: Called after every measurement.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"forward_ms": []} for name in models}
    with _evaluating(models):
        for repeat in range(repeats + 1):
            for name, model in models.items():
                some = next(iter(inputs[name].values()))
                start = _now(some)
                model(**inputs[name])
                if repeat:
                    times[name]["forward_ms"].append(1e3 * (_now(some) - start))
                done()
        peaks = {
            name: _peak(model, next(iter(inputs[name].values())).device, partial(model, **inputs[name]))
            for name, model in models.items()
        }
    return {name: {**_summary(by_kind), "peak_memory": peaks[name] / 1e6} for name, by_kind in times.items()}


def _summary(times: Mapping[str, list[float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found |= {kind: middle, f"{kind}_spread": (high - low) / 2}
    return found


class _evaluating:
    """The models in eval mode, and back at the end."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._modes = [(model, model.training) for model in models.values()]

    def __enter__(self) -> None:
        for model, _ in self._modes:
            model.eval()

    def __exit__(self, *_: object) -> None:
        for model, mode in self._modes:
            model.train(mode)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _peak(model: nn.Module, device: torch.device, run: Callable[[], object]) -> float:
    """Bytes of the weights and of the most that a run allocates beside them at a time."""
    weights = count_bytes(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in sorted((e for e in recorded.events() if e.name == "[memory]"), key=lambda e: e.time_range.start):
        held += event.cpu_memory_usage
        most = max(most, held)
    return weights + most
