"""What torch-pruning does with the constructs of tests/architectures/tracing/constructs.py, on which our tracing is tested.

Each model is pruned by half by group magnitude, with the layers that make its outputs ignored, and the heads of fused
projections named, as torch-pruning's examples do. Prints one line a construct: the parameters before and after, and whether it
still runs.

Run: PYTHONPATH=tests:tests/architectures/tracing python benchmarks/constructs_peer.py
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from typing import Any

import torch
import torch_pruning
from constructs import CONSTRUCTS
from test_constructs import built, tensors
from torch import nn

from lit_prune.architectures.tracing import trace_groups


def main() -> None:
    """Prune every construct, and count the outcomes."""
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    for name, construct in CONSTRUCTS.items():
        model, inputs = built(construct)
        before = sum(p.numel() for p in model.parameters())
        outcome = pruned(model, inputs)
        after = sum(p.numel() for p in model.parameters())
        if outcome == "runs" and after == before:
            outcome = "removes nothing"
        outcomes[outcome.partition(":")[0]] += 1
        print(f"{name}: {before} -> {after} parameters, {outcome}")
    print(dict(outcomes))


def pruned(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Prune a model by half, and say how that went."""
    shapes = [t.shape for t in tensors(model(*inputs))]
    found = trace_groups(model, lambda: model(*inputs))
    outputs = {entry.module for entry in found.whole if entry.operator == "the model's output"}
    fused = [m for m in model.modules() if hasattr(m, "qkv")]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pruner = torch_pruning.pruner.MagnitudePruner(
                model,
                inputs,
                importance=torch_pruning.importance.GroupMagnitudeImportance(),
                pruning_ratio=0.5,
                ignored_layers=[model.get_submodule(name) for name in outputs if name],
                num_heads={m.qkv: m.num_heads for m in fused},
                prune_num_heads=True,
                head_pruning_ratio=0.5,
                output_transform=tensors,
            )
            pruner.step()
    except Exception as error:
        return f"raises: {type(error).__name__}: {str(error)[:80]}"
    for module in fused:
        module.num_heads, module.inner = pruner.num_heads[module.qkv], module.qkv.out_features // 3
    try:
        with torch.no_grad():
            after = [t.shape for t in tensors(model(*inputs))]
    except Exception as error:
        return f"does not run afterwards: {type(error).__name__}: {str(error)[:80]}"
    return "runs" if after == shapes else "returns other shapes"


if __name__ == "__main__":
    main()
