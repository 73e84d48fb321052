"""Layers that are called by keyword are observed, masked, gated and repaired as those that are called by position."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny
from lit_prune import GateOptions, Limits, PruningConfig, UnsupportedModelError, learn_gates, prune
from lit_prune.architectures.layers import after_layer, before_layer, hidden_input
from lit_prune.architectures.tracing.find import trace_groups

pytestmark = pytest.mark.core
CALL = nn.Module.__call__
HIDDEN_LIMITS = Limits(kinds=("attention", "mlp", "hidden"), min_fraction=0)
WAYS = {
    "weights": {"importance": "fisher"},
    "masks": {"importance": "taylor_2nd"},
    "activations": {"importance": "wanda", "repair": "bias"},
    "hidden": {"limits": HIDDEN_LIMITS},
    "rotation": {"limits": HIDDEN_LIMITS, "rotate_hidden": True},
    "polish": {"polish_epochs": 1},
}


def by_keyword(model: nn.Module) -> nn.Module:
    """The model, whose linear layers, norms and experts are called with their inputs by name."""
    for module in model.modules():
        kind = type(module)
        names = list(inspect.signature(kind.forward).parameters)[1:]
        if isinstance(module, nn.Linear) or kind.__name__.endswith(("RMSNorm", "Experts")):

            def call(self: nn.Module, *args: Any, names: list[str] = names) -> Any:
                return CALL(self, **dict(zip(names, args, strict=True)))

            module.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return model


@pytest.mark.parametrize("way", WAYS)
def test_pruning_is_the_same(way, batches, loss_of):
    plans, weights = [], []
    for model in (tiny(), by_keyword(tiny())):
        config = PruningConfig(pruning_ratio=0.2, ratio_of="prunable", iterations=1, **WAYS[way])
        _, plan = prune(model, batches, loss_of(model), config)
        plans.append(plan.entries)
        weights.append(dict(model.named_parameters()))
    assert plans[0] == plans[1]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_gates_are_the_same(batches, loss_of):
    config = PruningConfig(pruning_ratio=0.2, ratio_of="prunable")
    found = [
        torch.cat(learn_gates(model, batches, loss_of(model), config, GateOptions(steps=3)))
        for model in (tiny(), by_keyword(tiny()))
    ]
    assert torch.equal(*found)


def test_experts_are_refitted_to_the_same_tokens(batches):
    """Padding counts for no expert, however the module of experts is called."""
    weights = []
    padded = [
        {"input_ids": b, "attention_mask": torch.ones_like(b).index_fill_(1, torch.arange(7, 10), 0)} for b in batches
    ]
    for model in (tiny("mixtral", num_local_experts=4), by_keyword(tiny("mixtral", num_local_experts=4))):
        config = PruningConfig(pruning_ratio=0.2, ratio_of="prunable", iterations=1, limits=Limits(kinds=("mlp",)))
        prune(model, padded, lambda b, model=model: model(**b, labels=b["input_ids"]).loss, config)
        weights.append(dict(model.named_parameters()))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias) * scale


class Net(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.first, self.second, self.by_name = nn.Linear(8, 16), Scaled(16, 4), by_name

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(input=x) if self.by_name else self.first(x)
        return self.second(scale=2.0, input=x.relu()) if self.by_name else self.second(x.relu(), scale=2.0)


def test_layers_with_a_forward_of_their_own_are_found_alike():
    inputs, found = torch.randn(6, 8), []
    for by_name in (False, True):
        model = Net(by_name)
        groups = trace_groups(model, lambda model=model: model(inputs))
        found.append([(s.key, s.size, len(s.repairable)) for s in groups.group_sets])
    assert found[0] == found[1] and found[0][0][2] == 1


@pytest.mark.parametrize("order", [("scale", "input"), ("input", "scale")])
def test_the_input_is_the_first_tensor_of_the_forward_in_whatever_order_keywords_come(order):
    layer, given = Scaled(3, 3), {"input": torch.ones(2, 3), "scale": torch.tensor(2.0)}
    seen = []
    before_layer(layer, lambda _, x: seen.append(x))
    layer(**{name: given[name] for name in order})
    assert seen[0] is given["input"]


def test_a_hook_gets_the_input_and_may_replace_it():
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    seen = []
    handles = [
        before_layer(layer, lambda _, inputs: 2 * inputs),
        after_layer(layer, lambda _, inputs, output: seen.append((inputs, output))),
    ]
    expected = nn.functional.linear(2 * x, layer.weight, layer.bias)
    for result in (layer(x), layer(input=x)):
        assert torch.equal(result, expected)
    assert all(torch.equal(inputs, 2 * x) and torch.equal(output, expected) for inputs, output in seen)
    with pytest.raises(UnsupportedModelError, match=r"Linear was called with \['int'\] and \[\]; expected a tensor"):
        layer(3)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(input=x), nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(UnsupportedModelError, match=r"block was called with \[\] and \['x'\]; expected hidden states"):
        hidden_input((), {"x": x})
