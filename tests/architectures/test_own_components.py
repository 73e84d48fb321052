"""A kind of component that this package does not know, described from outside by exported names alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

import lit_prune
from lit_prune.architectures import Component, consumed, group_set_of, part_of

pytestmark = pytest.mark.core


class BilinearLayer(nn.Module):
    def __init__(self, features, channels):
        super().__init__()
        self.channels = channels
        self.maps = nn.Parameter(torch.randn(2, channels, features) / features**0.5)
        self.output = nn.Linear(channels, features)

    def forward(self, x):
        first, second = torch.einsum("...f,mcf->m...c", x, self.maps)
        assert first.shape[-1] == self.channels
        return x + self.output(first * second)


class BilinearModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(BilinearLayer(6, 12) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass(frozen=True)
class Bilinear(Component):
    """Products of two maps of the input, whose weights are one parameter of shape (2, channels, features)."""

    path: str
    requires: str | None = None
    optional: bool = False

    def group_set(self, model, name, layer, pruned):
        channels = model.get_parameter(f"{name}.maps").shape[1]
        index = torch.arange(channels).view(channels, 1)
        slices = (
            part_of(model, f"{name}.maps", 1, index, unobservable_input=True),
            consumed(model, name, "output", index),
        )
        return group_set_of(model, name, layer, "bilinear", slices, {"channels": "channels"}, {"channels": 1})


@pytest.fixture
def model():
    lit_prune.register_architecture(
        lit_prune.Architecture(name="bilinear", models=(BilinearModel,), blocks=(Bilinear("layers.*"),))
    )
    return BilinearModel()


def test_it_is_described_right(model):
    lit_prune.verify_architecture(model, lambda m: m(torch.ones(2, 4, 6)))


@pytest.mark.parametrize("importance", ["taylor", "fisher", "flap", "magnitude"])
def test_it_is_pruned_by_every_sort_of_criterion(model, importance):
    """The cut model is the dense one with the removed channels' outputs at zero; its optimizer goes on."""
    dense = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 4, 6, generator=generator), torch.randint(0, 3, (3, 4))) for _ in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(batch):
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    config = lit_prune.PruningConfig(importance, 0.3, repair=None, iterations=1)
    table, plan = lit_prune.prune(model, batches, loss, config, [optimizer])
    assert {kind for _, kind in table.keys} == {"bilinear"} and plan.entries
    with torch.no_grad():
        for entry in plan.entries:
            removed = [n for n in range(entry.size) if n not in entry.kept]
            layer = dense.get_submodule(entry.name)
            layer.output.weight[:, removed] = 0
            assert model.get_submodule(entry.name).channels == len(entry.kept)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(model(x), dense(x))
    loss(batches[0]).backward()
    optimizer.step()
    assert optimizer.state[model.layers[0].maps]["exp_avg"].shape == model.layers[0].maps.shape
