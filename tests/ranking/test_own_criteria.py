"""Criteria and statistics of one's own, from outside the package, by public names alone; ours can be registered again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lit_prune
from conftest import tiny
from lit_prune.calibration import statistic_registry
from lit_prune.calibration.observers import split_mask_terms
from lit_prune.ranking import registry
from lit_prune.ranking.criteria import fisher, fluctuation, magnitude, output_wanda, reap, second_order, taylor, wanda

pytestmark = pytest.mark.core

AGAIN = {
    "taylor": (lit_prune.Term(taylor, "gradient"),),
    "taylor_2nd": (lit_prune.Term(taylor, "gradient"), lit_prune.Term(second_order, "squared_gradient")),
    "taylor_batch": (lit_prune.Term(taylor, "absolute_gradient"),),
    "second_order": (lit_prune.Term(second_order, "squared_gradient"),),
    "fisher": (lit_prune.Term(fisher, "mask_gradient", per_group=True),),
    "wanda": (lit_prune.Term(wanda, "activation_mean_abs"),),
    "output_wanda": (lit_prune.Term(output_wanda, "activation_l2", consumers_only=True, per_input=True),),
    "flap": (lit_prune.Term(fluctuation, "activation_variance", consumers_only=True, per_input=True),),
    "reap": (
        lit_prune.Term(reap, "routed_output", per_group=True),
        lit_prune.Term(output_wanda, "activation_mean_abs", consumers_only=True, per_input=True),
    ),
    "magnitude": (lit_prune.Term(magnitude),),
    "random": (),
}


def calibration_ids():
    return list(torch.randint(0, 64, (3, 2, 8), generator=torch.Generator().manual_seed(0)))


def importance(name, **options):
    model = tiny("llama")
    config = lit_prune.PruningConfig(name, 0.2, repair=None, **options)
    group_sets = lit_prune.find_group_sets(model)
    loss = lambda batch: model(input_ids=batch, labels=batch).loss  # noqa: E731
    statistics = lit_prune.calibrate(model, group_sets, calibration_ids(), loss, config)
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


# statistics of one's own


class OutputNorms:
    """How large the outputs of a group's first module are, by group: observed by forward hooks."""

    def __init__(self, model, group_sets):
        self.model, self.group_sets = model, group_sets
        self.batch, self.sums, self.batches, self.handles = {}, {}, 0, []

    def __enter__(self):
        for group_set in self.group_sets:
            part = next(s for s in group_set.slices if not s.consumes)
            self.handles.append(self.model.get_submodule(part.module).register_forward_hook(self.hook(group_set, part)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def hook(self, group_set, part):
        def hook(_, args, output):
            norms = output.detach().flatten(0, -2).norm(dim=0)
            self.batch[group_set.key] = part.sum_by_group(norms)

        return hook

    def end_batch(self):
        for key, value in self.batch.items():
            self.sums[key] = self.sums.get(key, 0) + value
        self.batches += 1
        self.batch = {}

    def skip_batch(self):
        self.batch = {}

    def finish(self):
        return {key: value / self.batches for key, value in self.sums.items()}


def cubed(gradient):
    return gradient.abs() ** 3


OWN = {
    "gradient": (
        lit_prune.GradientStatistic("cubed_gradient", cubed),
        lit_prune.Term(lambda weight, value: weight.abs() ** 3 * value, "cubed_gradient"),
    ),
    "input": (
        lit_prune.InputStatistic("input_peak", {"fourth": lambda x: x**4}, lambda sums, count: sums["fourth"] / count),
        lit_prune.Term(
            lambda weight, peak: weight.norm(dim=0) * peak, "input_peak", consumers_only=True, per_input=True
        ),
    ),
    "groups": (
        lit_prune.GroupStatistic("output_norm", OutputNorms),
        lit_prune.Term(lambda norms: norms.square(), "output_norm", per_group=True),
    ),
}


def expected_importance(name):
    """The same by autograd and hooks of this file alone, without a word of the package's calibration."""
    model = tiny("llama")
    group_sets = lit_prune.find_group_sets(model)
    parameters = dict(model.named_parameters())
    inputs, outputs, third = {}, {}, {}

    def note(path):
        def hook(_, args, output):
            inputs.setdefault(path, []).append(args[0].detach().double().flatten(0, -2))
            outputs.setdefault(path, []).append(output.detach().flatten(0, -2).norm(dim=0))

        return hook

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note(path))
    for ids in calibration_ids():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for path, parameter in parameters.items():
            third[path] = third.get(path, 0) + (parameter.detach() * parameter.grad).abs() ** 3 / 3
    result = []
    for group_set in group_sets:
        total = torch.zeros(group_set.size, dtype=torch.float64)
        first = next(s for s in group_set.slices if not s.consumes)
        for part in group_set.slices:
            other = [d for d in range(parameters[part.parameter].dim()) if d != part.dim]
            if name == "gradient":
                line = third[part.parameter].double().sum(dim=other)
            elif name == "input" and part.consumes:
                peak = (torch.cat(inputs[part.module]) ** 4).mean(dim=0)
                line = parameters[part.parameter].detach().double().norm(dim=0) * peak
            elif name == "groups" and part is first:
                mean = torch.stack(outputs[part.module]).mean(dim=0)
                total += mean[part.index].double().sum(dim=1).square()
                continue
            else:
                continue
            total += line[part.index].sum(dim=1)
        result.append(total)
    return torch.cat(result).float()


@pytest.mark.parametrize("mode", ["streaming", "elementwise"])
@pytest.mark.parametrize("name", OWN)
def test_a_statistic_of_ones_own_is_collected(name, mode):
    statistic, term = OWN[name]
    lit_prune.register_statistic(statistic)
    assert statistic.name in lit_prune.statistic_names()
    lit_prune.register_criterion(lit_prune.Criterion("mine", (term,)))
    found = torch.as_tensor(importance("mine", statistics=mode)).float()
    torch.testing.assert_close(found, expected_importance(name), rtol=1e-3, atol=1e-12)


def test_a_function_over_groups_needs_no_term():
    lit_prune.register_statistic(OWN["groups"][0])
    criterion = lit_prune.register_criterion("mine", torch.square, "output_norm")
    assert criterion.terms[0].per_group
    torch.testing.assert_close(torch.as_tensor(importance("mine")).float(), expected_importance("groups"))


def test_constants_have_the_statistics_that_a_feature_of_ones_has():
    """A bias multiplies the constant 1: what a statistic is for it follows from the statistic."""
    for name in lit_prune.statistic_names():
        statistic = statistic_registry.get_statistic(name)
        if isinstance(statistic, lit_prune.InputStatistic):
            ones = {n: f(torch.ones(5, 1)).double().sum(dim=0) for n, f in statistic.sums.items()}
            assert statistic.of_constant(5) == float(statistic.value(ones, 5))


@pytest.mark.parametrize(
    ("statistic", "error", "message"),
    [
        ("gradient", TypeError, "takes a GradientStatistic.*found a str"),
        (lit_prune.GradientStatistic("gradient", None), ValueError, "There is a statistic named 'gradient' already"),
        (
            lit_prune.InputStatistic("mine", {"sum": torch.abs}, lambda sums, count: sums["sum"]),
            ValueError,
            "'mine' has a sum 'sum', and that name stands for another function",
        ),
    ],
)
def test_statistics_that_cannot_be_registered(statistic, error, message):
    with pytest.raises(error, match=message):
        lit_prune.register_statistic(statistic)
    assert "mine" not in lit_prune.statistic_names()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lit_prune.Term(fisher, "mask_gradient"), "statistic 'mask_gradient' is of groups: set per_group=True"),
        (lit_prune.Term(taylor, "gradient", per_group=True), "'gradient' is not of groups: set per_group=False"),
        (lit_prune.Term(fluctuation, "gradient", per_input=True), "takes a statistic of inputs.*found 'gradient'"),
        (lit_prune.Term(magnitude, per_input=True), "takes a statistic of inputs.*found None"),
    ],
)
def test_terms_that_take_their_statistic_for_another_kind(term, message):
    with pytest.raises(ValueError, match=message):
        lit_prune.register_criterion(lit_prune.Criterion("mine", (term,)))


@pytest.mark.parametrize("wrong", ["missing", "short", "infinite"])
def test_an_observer_that_gives_no_number_for_a_group_is_refused(wrong):
    class Wrong(OutputNorms):
        def finish(self):
            found = super().finish()
            key = self.group_sets[1].key
            if wrong == "missing":
                del found[key]
            else:
                found[key] = found[key][1:] if wrong == "short" else found[key] / 0
            return found

    lit_prune.register_statistic(lit_prune.GroupStatistic("output_norm", Wrong))
    lit_prune.register_criterion("mine", torch.square, "output_norm")
    message = "is not finite" if wrong == "infinite" else r"must give a tensor of shape \(groups,\)"
    with pytest.raises(lit_prune.CalibrationError, match=f"'output_norm' {message}"):
        importance("mine")


def test_fisher_is_computed_by_masks_where_inputs_can_be_seen_and_else_from_weights():
    (term,) = registry.get_criterion("fisher").terms
    others = registry.get_criterion("taylor_2nd").terms
    seen = lit_prune.find_group_sets(tiny("llama"))
    hidden = [replace(s, slices=tuple(replace(p, unobservable_input=True) for p in s.slices)) for s in seen]
    assert split_mask_terms([*others, term], seen) == ([term], [*others])
    assert split_mask_terms([*others, term], hidden) == ([], [*others, term])
