"""Models that a user hands to ``prune`` as they are: compiled, partly frozen, with weights that are read in two directions."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, mse_loss

from lit_prune import CalibrationError, PruningConfig, prune, trace
from lit_prune.architectures.registry import find_group_sets
from lit_prune.plan import PruningPlan
from lit_prune.ranking.candidates import masked


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 6)

    def forward(self, x):
        code = self.second(self.first(x).relu()).relu()
        return linear(linear(code, self.second.weight.T).relu(), self.first.weight.T)


class OnFrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU()).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 12))

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


def data(model):
    torch.manual_seed(0)
    return [torch.randn(16, 12) for _ in range(8)], lambda x: mse_loss(model(x), x)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_masks_of_a_weight_along_both_dimensions_are_undone():
    model = TiedAutoencoder()
    trace(model, *data(model))
    group_sets = find_group_sets(model)
    before = copy.deepcopy(model.state_dict())
    with masked(model, group_sets, PruningPlan.from_kept(group_sets, [range(0, s.size, 2) for s in group_sets])):
        assert not torch.equal(model.second.weight, before["second.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("importance", ["wanda", "auto"])
def test_criteria_of_activations_take_inputs_that_nobody_can_observe_for_ones(importance):
    model = TiedAutoencoder()
    prune(model, *data(model), PruningConfig(importance=importance, pruning_ratio=0.3))
    assert model.first.out_features + model.second.out_features < 14
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("importance", ["fisher", "wanda", "auto"])
def test_a_compiled_model_is_pruned_as_it_is_without_compilation(importance):
    config = PruningConfig(importance=importance, pruning_ratio=0.3)
    sizes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12))
        model = torch.compile(inner, backend="eager") if compiled else inner
        batches, loss = data(model)
        loss(batches[0]).backward()
        _, plan = prune(model, batches, loss, config)
        loss(batches[0]).backward()
        sizes.append({e.key: e.kept for e in plan.group_entries})
    assert sizes[0] == sizes[1]


def test_a_backbone_that_gets_no_gradients_can_be_left_out():
    model = OnFrozenBackbone()
    config = PruningConfig(pruning_ratio=0.2)
    with pytest.raises(CalibrationError, match=r"lit_prune\.trace\(model, batches, loss_fn, protect="):
        prune(model, *data(model), config)
    trace(model, *data(model), protect=["backbone"])
    prune(model, *data(model), config)
    assert model.backbone[0].out_features == 16
    assert model.head[0].out_features < 24
