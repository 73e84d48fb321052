"""Learned gates where the best set is known, and the budget that holds at every step."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lit_prune
from conftest import tiny
from lit_prune import GateOptions, Limits, PruningConfig, learn_gates
from lit_prune.calibration.precision import scaled_loss
from lit_prune.errors import ArgumentValueError, CalibrationError, UnsupportedModelError
from lit_prune.gating import GateTraining, first_table
from lit_prune.groups import count_removed

pytestmark = pytest.mark.core
# what each hidden channel computes; the first two can stand in for each other, and so can the third and fourth
STANDING_IN = [(1, 0, 0, 0), (1, 0, 0, 0), (0, 1.3, 0, 0), (0, 1.3, 0, 0), (0, 0, 1.6, 0), (0, 0, 0, 2.5), (1, 1, 1, 1)]


def planted(channels):
    """A network of two linear layers whose output is the sum of its channels, and batches with noise in the targets."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, len(channels), bias=False), torch.nn.Linear(len(channels), 1, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(channels))
        model[1].weight.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 4, generator=generator)
    noise = torch.randn(512, 1, generator=generator)
    y = model(x).detach() + noise
    batches = [(a, b) for a, b in zip(x.split(32), y.split(32), strict=True)]
    return model, batches, lambda b: (model(b[0]) - b[1]).square().mean()


def damage(channels, removed):
    """The loss that removing channels adds, for inputs of unit variance: the squared norm of what they computed."""
    return float(torch.tensor([channels[j] for j in removed]).sum(dim=0).square().sum())


def removed_by(table, plan):
    [entry] = plan.group_entries
    return sorted(set(range(table.sizes[0])) - set(entry.kept))


@pytest.mark.parametrize("count", [2, 3])
def test_gates_find_the_set_that_a_criterion_misjudges(count):
    channels = STANDING_IN
    model, batches, loss = planted(channels)
    config = PruningConfig(
        pruning_ratio=(count + 0.5) / len(channels), repair=None, iterations=1, limits=Limits(min_fraction=0.0)
    )
    first = copy.deepcopy(model)
    table, plan = lit_prune.prune(first, batches, lambda b: (first(b[0]) - b[1]).square().mean(), config)
    by_criterion = damage(channels, removed_by(table, plan))
    importance = learn_gates(model, batches, loss, config, GateOptions(steps=60, reconstruct=False), batches_per_step=4)
    table, plan = lit_prune.prune(model, batches, loss, config, importance=importance)
    by_gates = damage(channels, removed_by(table, plan))
    best = min(damage(channels, s) for s in itertools.combinations(range(len(channels)), count))
    assert by_gates == pytest.approx(best)
    assert by_criterion > 1.05 * best


def test_what_others_make_up_for_leaves_one_of_each_pair():
    """With a repair in the loop: one of a pair of duplicates is free, and the discount of the criterion takes both."""
    channels = [(1, 0, 0, 0), (1, 0, 0, 0), (0, 0.6, 0, 0), (0, 0, 1.6, 0), (0, 0, 0, 2.5)]
    model, batches, loss = planted(channels)
    config = PruningConfig(pruning_ratio=0.5, iterations=1, limits=Limits(min_fraction=0.0))
    first = copy.deepcopy(model)
    table, plan = lit_prune.prune(first, batches, lambda b: (first(b[0]) - b[1]).square().mean(), config)
    assert removed_by(table, plan) == [0, 1]
    options = GateOptions(steps=20, refresh=1)
    importance = learn_gates(model, batches, loss, config, options, batches_per_step=4)
    table, plan = lit_prune.prune(model, batches, loss, config, importance=importance)
    # not 0, which is what a criterion of the weights alone says
    assert "calibration_batches" not in plan.info
    assert removed_by(table, plan) in ([0, 2], [1, 2])
    # what is left of the pair has twice the weight now
    assert sorted(model[1].weight.flatten().tolist())[-1] == pytest.approx(2.0, abs=0.2)


def test_a_gate_whose_gradient_is_noise_stays_where_the_criterion_put_it():
    channels = [(1.0, 0, 0, 0), (0, 1.5, 0, 0), (0, 0, 1.8, 0), (0, 0, 0, 2.2)]
    model, batches, loss = planted(channels)
    config = PruningConfig(pruning_ratio=0.3, repair=None, limits=Limits(min_fraction=0.0))
    seen = []
    importance = learn_gates(
        model, batches, loss, config, GateOptions(steps=30, reconstruct=False), progress=lambda *a: seen.append(a)
    )
    assert max(changed for _, _, changed in seen) == 0
    assert [number for number, _, _ in seen] == list(range(1, 31))
    # and the unit is that of the loss: what removing the first adds is 1
    assert float(importance[0][0]) == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("losses", ["1", "11", "111", "011", "10101", "1101"])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_unit_is_the_trace_of_the_hessian_by_the_gates(losses, scale):
    """Channels that are orthogonal on every batch, of a quadratic loss whose gradient is not 0: the trace is exact."""
    channels = [0.5, 1.0, 1.5, 2.0]
    model, _, _ = planted(torch.diag(torch.tensor(channels)).tolist())
    x = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))
    group_sets = lit_prune.trace(model, [x], lambda b: model(b).mean()).group_sets

    def loss(batch):
        if batch is None:
            return None
        values, target = batch
        return scale * (model(values) - target).square().mean()

    # every batch has another gradient
    data = [(x, model(x).detach() + n * x[:, :1]) if c == "1" else None for n, c in enumerate(losses, 1)]
    config = PruningConfig("magnitude", 0.3, limits=Limits(min_fraction=0.0))
    table = first_table(model, _data([(x, x[:, :1])], loss), config)
    budget = config.budget_of_parameters(model, group_sets)
    training = GateTraining(model, group_sets, table, budget, config, GateOptions(reconstruct=False))
    with scaled_loss(scale):
        training.observe(_data(data, loss), model, None)
    trace = 2 * sum(c**2 for c in channels)
    assert 2 * training.scores.unit * training.scores.prior.sum() == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(multiple_of={"mlp": 4}),
        Limits(uniform=True, min_groups=2),
        Limits(protect=[0]),
        Limits(kinds=("mlp", "block")),
    ],
    ids=["default", "rounded", "uniform", "protected", "blocks"],
)
def test_the_budget_and_the_limits_hold_at_every_step(limits, batches, loss_of):
    model = tiny(intermediate_size=48)
    config = PruningConfig(pruning_ratio=0.25, limits=limits)
    group_sets = lit_prune.find_group_sets(model, blocks=limits.blocks)
    data = _data(batches, loss_of(model))
    table = first_table(model, data, config)
    budget = config.budget_of_parameters(model, group_sets)
    training = GateTraining(
        model, group_sets, table, budget, config, GateOptions(steps=12, reconstruct=not limits.blocks)
    )
    training.observe(data, model, None)
    sets = set()
    with training.gates:
        for step in range(12):
            with training.gates.open():
                loss_of(model)(batches[step % 3]).backward()
            training.accumulate()
            # as if gradients were all over the place
            line = training._sums[0]
            noise = torch.randn(len(line), generator=torch.Generator().manual_seed(step)).double()
            line += 1e3 * noise * line.abs().max()
            assert training.step()
            removed = [(~k).nonzero().flatten() for k in training.scores.kept]
            leaves = count_removed(model, group_sets, _with_blocks(group_sets, removed))
            assert leaves == training.scores.removed
            coarse = 4 if limits.multiple_of else 3 if limits.uniform else 1
            assert budget - coarse * int(table.cost.min()) < leaves <= budget
            floor = limits.floor(table)
            for group_set, kept, least in zip(group_sets, training.scores.kept, floor, strict=True):
                assert int(kept.sum()) >= least
                if limits.multiple_of and group_set.kind == "mlp":
                    assert int(kept.sum()) % 4 == 0
            sets.add(tuple(torch.cat(training.scores.kept).tolist()))
    assert len(sets) > 1


def _data(batches, loss):
    return lambda _: nullcontext((batches, loss))


def _with_blocks(group_sets, removed):
    """What is in a removed block leaves with it."""
    gone = {s.name for s, r in zip(group_sets, removed, strict=True) if s.kind == "block" and len(r)}
    return [torch.arange(s.size) if s.block in gone else r for s, r in zip(group_sets, removed, strict=True)]


def test_the_state_goes_on_bit_for_bit(batches, loss_of):
    model = tiny()
    config = PruningConfig(pruning_ratio=0.2)
    group_sets = lit_prune.find_group_sets(model)
    data = _data(batches, loss_of(model))
    table = first_table(model, data, config)

    def fresh():
        made = GateTraining(
            model,
            group_sets,
            copy.deepcopy(table),
            config.budget_of_parameters(model, group_sets),
            config,
            GateOptions(steps=8, refresh=3),
        )
        return made

    def run(training, steps):
        with training.gates:
            for step in steps:
                with training.gates.open():
                    loss_of(model)(batches[step % 3]).backward()
                training.accumulate()
                training.step()
        return training

    whole = fresh()
    whole.observe(data, model, None)
    run(whole, range(8))
    part = fresh()
    part.observe(data, model, None)
    run(part, range(4))
    resumed = fresh()
    resumed.load_state_dict(part.state_dict())
    resumed.observe(data, model, None, resumed=True)
    run(resumed, range(4, 8))
    for a, b in zip(whole.scores.importance(), resumed.scores.importance(), strict=True):
        assert torch.equal(a, b)


def _plain_network(checkpointed, reentrant=False):
    """Three layers, of which the middle one is computed anew in the backward pass if asked for."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

        def forward(self, x):
            middle = lambda h: torch.relu(self.second(torch.relu(h)))  # noqa: E731
            h = self.first(x)
            return self.third(checkpoint(middle, h, use_reentrant=reentrant) if checkpointed else middle(h))

    torch.manual_seed(0)
    model = Network()
    x, y = torch.randn(24, 4), torch.randn(24, 1)
    return model, list(zip(x.split(8), y.split(8), strict=True)), lambda b: (model(b[0]) - b[1]).square().mean()


@pytest.mark.parametrize("kind", ["layers", "blocks", "divergence", "reentrant", "own code"])
def test_activation_checkpointing_changes_nothing(kind, batches, loss_of):
    found = []
    for checkpointed in (False, True):
        if kind == "own code":
            model, data, loss = _plain_network(checkpointed)
        else:
            model, data = tiny(), batches
            loss = loss_of(model)
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.train()
        limits = Limits(kinds=("mlp", "block")) if kind == "blocks" else Limits()
        options = GateOptions(steps=3, distillation=0.5 * (kind == "divergence"))
        config = PruningConfig("fisher", 0.2, limits=limits)
        found.append(torch.cat(learn_gates(model, data, loss, config, options)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reconstruct": False}, {"distillation": 1.0}], ids=str)
@pytest.mark.parametrize("had", [False, True], ids=["none", "some"])
def test_gradients_and_flags_of_weights_stay(options, had, batches, loss_of):
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained if had else ():
        parameter.grad = torch.full_like(parameter, 3.0)
    learn_gates(model, batches, loss_of(model), PruningConfig("magnitude"), GateOptions(steps=1, **options))
    assert all(p.grad is None if not had else bool((p.grad == 3).all()) for p in trained)
    assert [p for p in model.parameters() if p.requires_grad] == trained
    assert model.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("kind", ["one layer", "reentrant"])
def test_gates_that_no_loss_depends_on_are_refused_by_name(kind, batches):
    if kind == "reentrant":
        model, data, loss = _plain_network(True, reentrant=True)
        name = "first"
    else:
        model, data, name = tiny(), batches, r"model\.layers\.1"
        loss = lambda b: model(b, output_hidden_states=True).hidden_states[1].square().mean()  # noqa: E731
    with pytest.raises(CalibrationError, match=rf"gates of \['{name}.*use_reentrant=False"):
        learn_gates(model, data, loss, PruningConfig("magnitude"), GateOptions(steps=1))


def test_a_set_that_no_batch_of_a_step_ran_has_no_news(batches, loss_of):
    model = tiny()
    config = PruningConfig("magnitude", pruning_ratio=0.2)
    group_sets = lit_prune.find_group_sets(model)
    data = _data(batches, loss_of(model))
    options = GateOptions(steps=4, reconstruct=False)
    budget = config.budget_of_parameters(model, group_sets)
    training = GateTraining(model, group_sets, first_table(model, data, config), budget, config, options)
    training.observe(data, model, None)
    without = [torch.full((s.size,), float(".layers.0" not in s.name)) for s in group_sets]
    gone = torch.cat(without).bool().numpy()
    first = lambda: model(batches[0], output_hidden_states=True).hidden_states[1].square().mean()  # noqa: E731
    with training.gates:
        for count, losses in enumerate(([first], [first, lambda: loss_of(model)(batches[0])]), 1):
            for run in losses:
                with training.gates.open():
                    run().backward()
                training.accumulate()
            assert training.step()
            visits = training.scores.visits.sum(axis=0)
            assert (visits[~gone] == count).all()
            assert (visits[gone] == count - 1).all()


@pytest.mark.parametrize("loss", ["detached", "without gradients"])
def test_a_loss_that_does_not_depend_on_the_gates_is_refused(loss, batches, loss_of):
    model = tiny()
    own = {"detached": lambda b: loss_of(model)(b).detach(), "without gradients": torch.no_grad()(loss_of(model))}[loss]
    with pytest.raises(CalibrationError, match=r"does not depend on the gates of \['model.layers.*use_reentrant=False"):
        learn_gates(model, batches, own, PruningConfig("magnitude"), GateOptions(steps=1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_derivatives_that_are_not_finite_change_nothing(batches, loss_of):
    model = tiny()
    config = PruningConfig(pruning_ratio=0.2)
    group_sets = lit_prune.find_group_sets(model)
    table = first_table(model, _data(batches, loss_of(model)), config)
    training = GateTraining(
        model, group_sets, table, config.budget_of_parameters(model, group_sets), config, GateOptions(reconstruct=False)
    )
    before = training.state_dict()["scores"]
    with training.gates:
        with training.gates.open():
            (loss_of(model)(batches[0]) * np.inf).backward()
        training.accumulate()
    assert not training.step()
    after = training.state_dict()["scores"]
    assert after["steps"] == 0
    assert torch.equal(before["slope"], after["slope"])


def test_bad_input_is_refused_before_any_work(batches, loss_of):
    model = tiny()
    loss = loss_of(model)
    with pytest.raises(ArgumentValueError, match="importance='auto'"):
        learn_gates(model, batches, loss, PruningConfig("auto"))
    with pytest.raises(ArgumentValueError, match="0 or more for every group"):
        learn_gates(model, batches, loss, PruningConfig("flap", repair=None))
    with pytest.raises(lit_prune.BudgetError):
        learn_gates(model, batches, loss, PruningConfig(pruning_ratio=0.95))
    with pytest.raises(ArgumentValueError, match="distillation"):
        GateOptions(distillation=1.5)
    with pytest.raises(UnsupportedModelError, match="cannot be observed"):
        experts = tiny("mixtral", num_local_experts=3, num_experts_per_tok=2)
        learn_gates(experts, batches, loss_of(experts), PruningConfig())
    with pytest.raises(CalibrationError, match="logits"):
        inner = tiny()
        learn_gates(
            inner.model,
            batches,
            lambda b: inner.model(b).last_hidden_state.square().mean(),
            PruningConfig(),
            GateOptions(distillation=0.5, steps=1),
        )
    assert all(p.requires_grad for p in model.parameters())
