"""Auxiliary heads, which only training mode runs, follow the layers that they read."""

import copy

import pytest
import torch
from test_constructs import masked
from torch import nn
from torch.nn.functional import cross_entropy

from conftest import unsettled
from lit_prune import PruningConfig, PruningPlan, apply_plan, find_group_sets, load_pruned, prune, save_pruned, trace


class WithAuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.trunk = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU())
        self.head = nn.Linear(12, 5)
        self.auxiliary = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 5))
        self.register_buffer("steps", torch.zeros(3))
        self.average = nn.Parameter(torch.zeros(5), requires_grad=False)

    def forward(self, x):
        features = self.stem(x)
        logits = self.head(self.trunk(features).mean((2, 3)))
        if not self.training:
            return logits
        with torch.no_grad():
            self.steps.add_(1)
            self.average.lerp_(logits.mean(0), 0.1)
        return logits, self.auxiliary(features.mean((2, 3)))


def loss_of(model):
    def loss(batch):
        output = model(batch[0])
        outputs = output if isinstance(output, tuple) else (output,)
        return sum(cross_entropy(logits, batch[1]) for logits in outputs)

    return loss


def batches(size=4):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 8, 8), torch.randint(0, 5, (size,))) for _ in range(3)]


def built():
    torch.manual_seed(0)
    return unsettled(WithAuxiliaryHead())


@pytest.mark.parametrize("importance", ["fisher", "taylor", "wanda", "magnitude", "auto"])
@pytest.mark.parametrize("repair", ["least_squares", "bias"])
def test_the_pruned_model_trains_with_its_auxiliary_head(importance, repair):
    model = built()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    model.train()
    loss_of(model)(batches()[0]).backward()
    optimizer.step()
    config = PruningConfig(importance=importance, pruning_ratio=0.6, repair=repair)
    prune(model, batches(), loss_of(model), config, [optimizer])
    width = model.stem[0].out_channels
    assert width < 8
    assert model.auxiliary[0].in_features == width
    assert optimizer.state[model.auxiliary[0].weight]["momentum_buffer"].shape == (10, width)
    loss_of(model)(batches()[0]).backward()
    optimizer.step()


def test_running_in_training_mode_changes_nothing():
    model = built().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="can be pruned"):
        found = trace(model, batches(), loss_of(model))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # what is within the head has no statistics
    assert {s.name for s in found.group_sets} == {"stem.0", "trunk.0"}


def test_masked_and_cut_compute_the_same_in_both_modes(tmp_path):
    model = built()
    with pytest.warns(UserWarning, match="can be pruned"):
        trace(model, batches(), loss_of(model))
    group_sets = find_group_sets(model)
    kept = [list(range(0, s.size, 2)) for s in group_sets]
    dense = masked(model, group_sets, kept)
    with torch.no_grad():
        dense.auxiliary[0].weight[:, 1::2] = 0
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    images = batches()[0][0]
    for training in (False, True):
        for a, b in zip(model.train(training)(images), dense.train(training)(images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    save_pruned(model, tmp_path / "pruned")
    loaded = built()
    load_pruned(tmp_path / "pruned", model=loaded)
    assert loaded.auxiliary[0].in_features == 4
    torch.testing.assert_close(loaded.train()(images), model.train()(images))


def test_what_cannot_run_in_training_mode_is_said():
    model = built()
    model.auxiliary.insert(1, nn.BatchNorm1d(10))
    with pytest.warns(UserWarning, match="does not run in training mode"):
        trace(model, batches(size=1), loss_of(model))
