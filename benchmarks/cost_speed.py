"""Speed of pruned models over that of the dense one: prefill, decoding and a training step."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from common import (
    build,
    interleaved,
    loss_of,
    make_batches,
    markdown,
    ratio,
    spread,
    verdict,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, prune
from lit_prune.groups import count_parameters
from lit_prune.ranking.selection import Limits

RATIOS = (0.1, 0.2, 0.3, 0.5)


MULTIPLES = (1, 16, 64)


def speed(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the 100M model pruned by a ratio, beside the dense one: prefill, decoding, a training step."""
    share = float(key.rstrip("%")) / 100
    dense = build("100M", options)
    group_sets = find_group_sets(dense)
    data = make_batches(options, 1, 256)
    config = PruningConfig(importance="second_order", pruning_ratio=share, repair=None)
    collected = calibrate(dense, group_sets, data, loss_of(dense), config)
    models = {"dense": dense}
    for multiple in MULTIPLES:
        limits = Limits(multiple_of={"mlp": multiple}, min_fraction=0.05)
        config = PruningConfig(importance="second_order", pruning_ratio=share, repair=None, limits=limits)
        _, plan = make_plan(dense, group_sets, collected, config)
        model = build("100M", options)
        apply_plan(model, plan)
        models[f"multiples of {multiple}"] = model
    return speeds(models, options)


def depth(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """As ``speed``, of a deep and narrow model that loses widths or whole blocks."""
    share = float(key.rstrip("%")) / 100
    models = {"dense": build("135M", options)}
    data = make_batches(options, 1, 256)
    for name, kinds in {"widths": ("attention", "mlp"), "whole blocks": ("block",)}.items():
        model = build("135M", options)
        config = PruningConfig(pruning_ratio=share, repair=None, iterations=1, limits=Limits(kinds=kinds))
        prune(model, data, loss_of(model), config)
        models[name] = model
    return speeds(models, options)


def speeds(models: Mapping[str, nn.Module], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each model, and how much more than ``dense`` that is."""
    prompt = make_batches(options, 1, 512, 256)[0]
    flops = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=prompt, use_cache=False)
        flops[name] = counter.get_total_flops()
    tasks = {"prefill": (prefill, 512), "decode": (decode, 24), "train": (train_step, 512)}
    result: dict[str, Any] = {
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "flops": flops,
        "ideal": {name: flops["dense"] / value for name, value in flops.items()},
    }
    for task, (function, tokens) in tasks.items():
        cases = {name: functools.partial(function, model, prompt, tokens) for name, model in models.items()}
        seconds = interleaved(cases, options, options.repeats + 2)
        result[task] = {
            name: {
                "tokens_per_second": tokens / statistics.median(values),
                **ratio(seconds["dense"], values),
            }
            for name, values in seconds.items()
        }
    return result


@torch.inference_mode()
def prefill(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    del tokens
    model(input_ids=prompt, use_cache=False)


@torch.inference_mode()
def decode(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    """Greedy decoding with a cache after a short prompt; the prompt's forward is a small part of the time."""
    output = model(input_ids=prompt[:1, :32], use_cache=True)
    for _ in range(tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def train_step(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    del tokens
    loss_of(model)(prompt).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-1e-6)
                parameter.grad = None


def report_speed(rows: Mapping[str, Any]) -> str:
    text = (
        "## Speed of the pruned model\n\n100M; ratio of all parameters, embeddings included. Ideal: FLOPs of the dense model"
        " over the pruned one's, in prefill. Achieved: speed-up over ideal. Prefill 2 x 256 tokens, decoding one"
        " sequence with a cache, training 2 x 256 tokens.\n\n"
    )
    return text + speed_table(rows)


def report_depth(rows: Mapping[str, Any]) -> str:
    text = (
        "## Widths or whole blocks\n\nThe same on SmolLM2's shape, 30 narrow layers: widths or whole blocks leave."
        " What either costs in quality is in [quality.md](quality.md).\n\n"
    )
    return text + speed_table(rows)


def speed_table(rows: Mapping[str, Any]) -> str:
    table = []
    for share, row in rows.items():
        for name in (n for n in row["prefill"] if n != "dense"):
            ideal = row["ideal"][name]
            achieved = row["prefill"][name]["ratio"] / ideal
            table.append(
                (
                    f"{share}, {name}",
                    f"{ideal:.3f}",
                    spread(row["prefill"][name], 2),
                    f"{achieved:.3f}",
                    verdict(achieved, 0.9, least=True),
                    spread(row["decode"][name], 2),
                    spread(row["train"][name], 2),
                )
            )
    dense = next(iter(rows.values()))
    rates = ", ".join(
        f"{task} {dense[task]['dense']['tokens_per_second']:.0f}" for task in ("prefill", "decode", "train")
    )
    head = ("pruned by", "ideal", "prefill, speed-up", "achieved", "target", "decode, speed-up", "train, speed-up")
    return markdown(head, table) + f"\nDense, tokens per second: {rates}.\n"
