"""A criterion of one's own can be any of ours: each is registered again from outside, by public names alone."""

from __future__ import annotations

import pytest
import torch

import lit_prune
from conftest import tiny
from lit_prune.ranking import registry
from lit_prune.ranking.criteria import fisher, fluctuation, magnitude, output_wanda, second_order, taylor, wanda

AGAIN = {
    "taylor": (lit_prune.Term(taylor, "gradient"),),
    "taylor_2nd": (lit_prune.Term(taylor, "gradient"), lit_prune.Term(second_order, "squared_gradient")),
    "taylor_batch": (lit_prune.Term(taylor, "absolute_gradient"),),
    "second_order": (lit_prune.Term(second_order, "squared_gradient"),),
    "fisher": (lit_prune.Term(fisher, "mask_gradient", per_group=True),),
    "wanda": (lit_prune.Term(wanda, "activation_mean_abs"),),
    "output_wanda": (lit_prune.Term(output_wanda, "activation_l2", consumers_only=True, per_input=True),),
    "flap": (lit_prune.Term(fluctuation, "activation_variance", consumers_only=True, per_input=True),),
    "magnitude": (lit_prune.Term(magnitude),),
    "random": (),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def importance(name):
    model = tiny("llama")
    ids = torch.randint(0, 64, (3, 2, 8), generator=torch.Generator().manual_seed(0))
    config = lit_prune.PruningConfig(name, 0.2, repair=None)
    group_sets = lit_prune.find_group_sets(model)
    loss = lambda batch: model(input_ids=batch, labels=batch).loss  # noqa: E731
    statistics = lit_prune.calibrate(model, group_sets, list(ids), loss, config)
    return lit_prune.make_plan(model, group_sets, statistics, config)[0].importance


def test_every_criterion_is_tried():
    assert set(AGAIN) == set(lit_prune.criteria())


@pytest.mark.parametrize("name", AGAIN)
def test_ours_registered_again_ranks_alike(name):
    normalize = registry.get_criterion(name).normalize
    lit_prune.register_criterion(lit_prune.Criterion("mine", AGAIN[name], normalize))
    torch.testing.assert_close(torch.as_tensor(importance("mine")), torch.as_tensor(importance(name)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="needs a function; found none"):
        lit_prune.register_criterion("mine")
    with pytest.raises(TypeError, match="found a function or statistic beside it"):
        lit_prune.register_criterion(lit_prune.Criterion("mine", ()), taylor)
    with pytest.raises(ValueError, match="Unknown statistic 'x'"):
        lit_prune.register_criterion(lit_prune.Criterion("mine", (lit_prune.Term(taylor, "x"),)))
    with pytest.raises(ValueError, match="There is a criterion named 'taylor' already"):
        lit_prune.register_criterion(lit_prune.Criterion("taylor", ()))
