"""Repair of convolutions and of layers that are no chain: against lstsq, dense models and cut ones."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import importlib
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from convolution_cases import KINDS, Chain, TwoReaders, group_set, singles
from torch import nn
from torch.nn import functional

from conftest import tiny, uneven_kept
from lit_prune import PruningPlan, find_group_sets, trace
from lit_prune.calibration.collect import collect_statistics
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Slice
from lit_prune.ranking.candidates import masked
from lit_prune.repair.bias import bias_fold
from lit_prune.repair.module_order import refit_in_order
from lit_prune.repair.passes import Replacements
from lit_prune.repair.patches import count_rows, input_rows, matrix_of, output_rows, weight_of
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import least_squares
from lit_prune.repair.regression import unexplained_share

module_order = importlib.import_module("lit_prune.repair.module_order")


def plan_of(group_sets, kept):
    return PruningPlan.from_kept(group_sets, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_is_its_matrix_times_rows_of_its_input(kind, batched):
    torch.manual_seed(0)
    model = Chain(kind).double()
    layer, (x,) = model.read, model.batches(1)
    with torch.no_grad():
        x = model.produce(x).relu()
        x = x if batched else x[0]
        y = layer(x)
        rows = torch.randperm(count_rows(layer, y))[:7]
        kept = torch.tensor([0, 2, 3, 5])
        for columns in (None, kept):
            taken = x
            if columns is not None:
                gone = [c for c in range(6) if c not in kept]
                taken = x.clone()
                taken.movedim(-1 - len(model.spatial), 0)[gone] = 0
            weight = (
                layer.weight.index_select(1 if matrix_dim(layer) else 0, kept) if columns is not None else layer.weight
            )
            product = input_rows(layer, x, y.shape, rows, columns) @ matrix_of(layer, weight).T
            bias = 0 if layer.bias is None else layer.bias
            torch.testing.assert_close(product + bias, output_rows(layer, layer(taken), rows))
        assert torch.equal(weight_of(layer, matrix_of(layer, layer.weight)), layer.weight)


def matrix_dim(layer):
    return 0 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d) else 1


def lstsq_by_impulses(model, layer, kept, inputs):
    """The weights and bias that fit best, with no formula of a convolution: a column for each weight, by linearity."""
    design, wanted = [], []
    with torch.no_grad():
        for x in inputs:
            wanted.append(layer(x).movedim(-1 - len(model.spatial), -1).reshape(-1, 4))
        one = copy.deepcopy(layer)
        one.bias = None
        shape = one.weight.index_select(matrix_dim(layer), torch.tensor(kept)).shape
        kernel = shape[2:]
        for channel in kept:
            for place in np.ndindex(*kernel):
                one.weight.zero_()
                index = (0, channel) if matrix_dim(layer) == 1 else (channel, 0)
                one.weight[(*index, *place)] = 1.0
                rows = [one(x).movedim(-1 - len(model.spatial), -1).reshape(-1, 4)[:, 0] for x in inputs]
                design.append(torch.cat(rows))
    matrix, y = torch.stack(design, dim=1), torch.cat(wanted)
    if layer.bias is not None:
        matrix = torch.cat([matrix, torch.ones(len(matrix), 1, dtype=matrix.dtype)], dim=1)
    found = np.linalg.lstsq(matrix.numpy(), y.numpy(), rcond=None)[0].T
    weight = found[:, : len(design)].reshape(4, len(kept), *kernel)
    return (weight if matrix_dim(layer) == 1 else weight.swapaxes(0, 1)), found[:, len(design) :].flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_the_refitted_layer_is_the_solution_of_lstsq(kind):
    torch.manual_seed(0)
    model = Chain(kind).double()
    sets, batches, kept = model.group_sets(), model.batches(6), [0, 2, 3, 5]
    with torch.no_grad():
        # wide enough a spread that the fit is well conditioned
        model.produce.weight.normal_()
        inputs = [model.produce(b).relu() for b in batches]
    weight, bias = lstsq_by_impulses(model, model.read, kept, inputs)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = least_squares(model, sets, plan_of(sets, [kept]), batches, model, damping=0.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(found) == {"read.weight", "read.bias"} - ({"read.bias"} if model.read.bias is None else set())
    np.testing.assert_allclose(found["read.weight"].numpy(), weight, rtol=1e-5, atol=1e-7)
    if model.read.bias is not None:
        np.testing.assert_allclose(found["read.bias"].numpy(), bias, rtol=1e-5, atol=1e-7)


class ByHand(nn.Conv2d):
    """Circular padding in forward, of a layer whose attributes say that there is none."""

    def forward(self, x):
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="circular"), self.weight, self.bias, stride=2)


class Same(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight, bias=self.bias, padding="same", dilation=(2, 1))


class Widened(nn.ConvTranspose2d):
    def forward(self, x):
        return functional.conv_transpose2d(x, self.weight, self.bias, 2, 1, 1)


class Rows(nn.Linear):
    def forward(self, x):
        return functional.linear(x.flip(0), self.weight, self.bias)


OWN = {
    "circular": (ByHand(6, 4, 3), nn.Conv2d(6, 4, 3, 2, 1, padding_mode="circular")),
    "same": (Same(6, 4, (2, 3)), nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(2, 1))),
    "transposed": (Widened(6, 4, 4), nn.ConvTranspose2d(6, 4, 4, 2, 1, 1)),
    "linear": (Rows(6, 4), nn.Linear(6, 4)),
}


class Reading(nn.Module):
    """A layer that makes six features, and one that reads them."""

    def __init__(self, read):
        super().__init__()
        self.produce = nn.Linear(3, 6) if isinstance(read, nn.Linear) else nn.Conv2d(3, 6, 3)
        self.read = read

    def forward(self, x):
        return self.read(self.produce(x).relu())


@pytest.mark.parametrize("name", OWN)
def test_a_layer_with_a_forward_of_its_own_is_refitted_as_the_one_that_says_by_attributes_what_it_does(name):
    torch.manual_seed(0)
    found = []
    batches = [torch.randn(50, 3) if name == "linear" else torch.randn(2, 3, 11, 12) for _ in range(3)]
    for layer in OWN[name]:
        torch.manual_seed(1)
        model = Reading(copy.deepcopy(layer)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        plain = batches if name != "linear" or layer is OWN[name][0] else [b.flip(0) for b in batches]
        trace(model, plain, lambda x, m=model: m(x).square().mean())
        sets = find_group_sets(model)
        assert [(s.name, s.size) for s in sets] == [("produce", 6)]
        data = functools.partial(contextlib.nullcontext, (plain, model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(refit_in_order(model, sets, plan_of(sets, [[0, 2, 3]]), data))
    assert set(found[0]) == {"read.weight", "read.bias"}
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


@contextlib.contextmanager
def carried_out(model, sets, plan, weights):
    """The model masked as planned, with new weights where nothing is removed."""
    values = Replacements(model)
    by_key = {s.key: s for s in sets}
    gone = {}
    for entry in plan.entries:
        removed = by_key[entry.key].kept_to_removed(entry.kept)
        for part in by_key[entry.key].slices:
            gone.setdefault(part.parameter, {}).setdefault(part.dim, []).append(part.index[removed].flatten())
    for name, value in weights.items():
        whole = values[name]
        stay = [torch.arange(n) for n in whole.shape]
        for dim, removed in gone.get(name, {}).items():
            stay[dim] = stay[dim][~torch.isin(stay[dim], torch.cat(removed))]
        whole[torch.meshgrid(*stay, indexing="ij")] = value
    with masked(model, sets, plan), values.applied(), masked(model, sets, plan):
        yield


@pytest.mark.parametrize("norm", [False, True])
def test_repair_of_branches_brings_the_pruned_model_nearer_to_the_dense_one(norm):
    torch.manual_seed(0)
    model = TwoReaders(norm)
    model(torch.randn(64, 2, 8, 8))
    model.eval()
    sets, batches = model.group_sets(), [torch.randn(8, 2, 8, 8) for _ in range(6)]
    plan = plan_of(sets, [[0, 2, 3, 5], [1, 2, 4]])
    weights = least_squares(model, sets, plan, batches, model)
    names = {"first.weight", "first.bias", "second.weight", "head.weight", "head.bias"}
    assert set(weights) == names
    assert weights["first.weight"].shape == (3, 4, 3, 3)
    assert weights["first.bias"].shape == (3,)
    assert weights["head.weight"].shape == (3, 3 * 16 + 4)
    with torch.no_grad():
        wanted = torch.cat([model(b) for b in batches])
        errors = []
        for new in ({}, weights):
            with carried_out(model, sets, plan, new):
                errors.append(float((torch.cat([model(b) for b in batches]) - wanted).square().mean()))
    assert errors[1] < 0.3 * errors[0]


def test_a_channel_that_others_make_up_for_costs_nothing():
    torch.manual_seed(0)
    model = TwoReaders().double()
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias"):
            model.get_parameter(name)[3] = model.get_parameter(name)[1]
    model.eval()
    sets, batches = model.group_sets(), [torch.randn(8, 2, 8, 8, dtype=torch.float64) for _ in range(6)]
    plan = plan_of(sets, [[0, 1, 2, 4, 5], list(range(5))])
    weights = least_squares(model, sets, plan, batches, model, damping=0.0)
    with torch.no_grad():
        wanted = model(batches[0])
        with carried_out(model, sets, plan, weights):
            torch.testing.assert_close(model(batches[0]), wanted, rtol=1e-5, atol=1e-7)


class Shared(nn.Module):
    """One convolution that is called twice, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop, self.last = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x).tanh()
        for _ in range(2):
            x = self.loop(x).tanh()
        return self.last(x)


def test_what_is_called_twice_is_fitted_to_both_calls():
    torch.manual_seed(0)
    model = Shared().double()
    every = singles(6)
    parts = [
        Slice("stem.weight", 0, every, 1),
        Slice("stem.bias", 0, every),
        Slice("loop.weight", 0, every, 1),
        Slice("loop.bias", 0, every),
        Slice("loop.weight", 1, every, 1),
        Slice("last.weight", 1, every, 1),
    ]
    sets, batches = [group_set(model, "stem", parts)], [torch.randn(6, 2, 7, dtype=torch.float64) for _ in range(4)]
    kept = [0, 1, 3, 4]
    weights = least_squares(model, sets, plan_of(sets, [kept]), batches, model, damping=0.0)
    with torch.no_grad():
        pairs = []
        small = copy.deepcopy(model.loop)
        small.weight[:, [2, 5]] = 0
        for x in batches:
            x = model.stem(x).tanh()
            pairs.append((x, model.loop(x)))
            again = small(x).tanh()
            pairs.append((again, model.loop(model.loop(x).tanh())))
    windows = torch.cat([functional.pad(x, (1, 1)).unfold(2, 3, 1)[:, kept] for x, _ in pairs])
    patches = windows.movedim(2, 1).flatten(0, 1).flatten(1)
    y = torch.cat([y.movedim(1, -1).flatten(0, 1)[:, kept] for _, y in pairs])
    design = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], dim=1)
    expected = np.linalg.lstsq(design.numpy(), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(weights["loop.weight"].flatten(1).numpy(), expected[:, :-1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(weights["loop.bias"].numpy(), expected[:, -1], rtol=1e-5, atol=1e-7)


def passes_of(model, sets, plan, batches, **options):
    """New weights, and how often the batches were run."""
    runs = []

    def forward(batch):
        runs.append(1)
        return model(batch)

    weights = refit_in_order(
        model, sets, plan, functools.partial(contextlib.nullcontext, (batches, forward)), **options
    )
    return weights, len(runs) / len(batches)


def test_layers_that_read_one_tensor_share_a_pass_and_the_number_of_passes_is_bounded(monkeypatch):
    torch.manual_seed(0)
    model = TwoReaders().eval()
    sets, batches = model.group_sets(), [torch.randn(4, 2, 8, 8) for _ in range(3)]
    plan = plan_of(sets, [[0, 2, 3, 5], [1, 2, 4]])
    # the order, what they gave, the two branches, and the head
    weights, passes = passes_of(model, sets, plan, batches)
    assert passes == 4
    monkeypatch.setattr(module_order, "TARGET_BYTES", 1)
    again, passes = passes_of(model, sets, plan, batches)
    assert passes == 5
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    monkeypatch.setattr(module_order, "STAGES", 1)
    assert passes_of(model, sets, plan, batches)[1] == 3


def test_layers_with_too_many_inputs_keep_their_weights_with_a_warning(monkeypatch):
    torch.manual_seed(0)
    model = TwoReaders().eval()
    sets, batches = model.group_sets(), [torch.randn(4, 2, 8, 8) for _ in range(3)]
    monkeypatch.setattr(module_order, "MOST_INPUTS", 40)
    with pytest.warns(UserWarning, match=r"\['head'\] still read more than 40 inputs"):
        weights = least_squares(model, sets, plan_of(sets, [[0, 2, 3, 5], [1, 2, 4]]), batches, model)
    assert set(weights) == {"first.weight", "first.bias", "second.weight"}


@pytest.mark.parametrize("both", [True, False])
def test_layers_behind_a_reader_that_cannot_be_observed_make_up_for_it(both):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 1), nn.Tanh(), nn.Conv1d(8, 6, 3), nn.Tanh(), nn.Conv1d(6, 3, 1)).double()
    first = [Slice("0.weight", 0, singles(8), 1), Slice("0.bias", 0, singles(8))]
    second = [Slice("2.weight", 0, singles(6), 1), Slice("2.bias", 0, singles(6))]
    sets = [
        group_set(model, "0", [*first, Slice("2.weight", 1, singles(8), 1, True)]),
        group_set(model, "2", [*second, Slice("4.weight", 1, singles(6), 1)], 1),
    ]
    plan = plan_of(sets, [[0, 1, 3, 5, 6, 7], [0, 1, 2, 4] if both else list(range(6))])
    batches = [torch.randn(8, 2, 9, dtype=torch.float64) for _ in range(4)]
    weights = least_squares(model, sets, plan, batches, model)
    assert set(weights) == {"4.weight", "4.bias"}
    with torch.no_grad():
        wanted, errors = [model(b) for b in batches], []
        for new in ({}, weights):
            with carried_out(model, sets, plan, new):
                errors.append(sum(float((model(b) - w).square().mean()) for b, w in zip(batches, wanted, strict=True)))
    assert errors[1] < 0.7 * errors[0]


def test_rows_are_drawn_by_a_seed_and_no_more_than_asked_for(monkeypatch):
    torch.manual_seed(0)
    model = Chain("2d, same").double()
    sets, batches = model.group_sets(), model.batches(4)
    plan = plan_of(sets, [[0, 2, 3, 5]])
    whole, _ = passes_of(model, sets, plan, batches)
    monkeypatch.setattr(module_order, "FEWEST_ROWS", 0)
    monkeypatch.setattr(module_order, "ROWS_PER_INPUT", 3)
    seen = []
    add = module_order.Equations.add

    def counted(self, inputs, outputs, influence):
        seen.append(len(inputs))
        add(self, inputs, outputs, influence)

    monkeypatch.setattr(module_order.Equations, "add", counted)
    some = [passes_of(model, sets, plan, batches, seed=seed)[0]["read.weight"] for seed in (0, 0, 1)]
    # 4 channels and 9 places in the kernel
    assert sum(seen) == 3 * 3 * 36
    assert torch.equal(some[0], some[1])
    assert not torch.equal(some[0], some[2])
    assert not torch.equal(some[0], whole["read.weight"])


def test_random_numbers_in_the_step_are_the_same_in_every_pass_and_go_on_as_before():
    torch.manual_seed(0)
    model = TwoReaders().double().eval()
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias"):
            model.get_parameter(name)[3] = model.get_parameter(name)[1]
    sets = model.group_sets()
    plan = plan_of(sets, [[0, 1, 2, 4, 5], list(range(5))])

    def noisy(batch):
        scale = 1 + random.random() + np.random.rand()
        return model(torch.randn(32, 2, 8, 8, dtype=torch.float64) * scale + batch)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    weights = least_squares(model, sets, plan, [torch.zeros(())] * 6, noisy, damping=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(8, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        with carried_out(model, sets, plan, weights):
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["other batches", "an iterator"])
def test_batches_that_differ_from_pass_to_pass_are_refused_and_the_model_is_as_before(kind):
    torch.manual_seed(0)
    model = TwoReaders().eval()
    sets = model.group_sets()
    plan = plan_of(sets, [[0, 2, 3, 5], [1, 2, 4]])
    generator = torch.Generator().manual_seed(0)

    class Fresh:
        def __iter__(self):
            return (torch.randn(4, 2, 8, 8, generator=generator) for _ in range(3))

    batches = Fresh() if kind == "other batches" else iter([torch.randn(4, 2, 8, 8)] * 3)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    message = "not the same every time" if kind == "other batches" else "were 3 at first and 0 now.*not an iterator"
    with pytest.raises(UnsupportedModelError, match=message):
        least_squares(model, sets, plan, batches, model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_an_error_in_the_middle_puts_the_weights_back():
    torch.manual_seed(0)
    model = TwoReaders().eval()
    sets, batches = model.group_sets(), [torch.randn(4, 2, 8, 8) for _ in range(3)]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    calls = []

    def failing(batch):
        calls.append(batch)
        if len(calls) == 8:
            # the second batch of a pass over the pruned model
            assert not torch.equal(model.first.weight, before["first.weight"])
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        least_squares(model, sets, plan_of(sets, [[0, 2], [1, 2]]), batches, failing)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_padding_does_not_count_in_module_order():
    model = tiny("llama")
    sets = find_group_sets(model)
    plan = plan_of(sets, uneven_kept(sets))
    ids = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    garbage = ids.clone()
    garbage[:, 10:] = 0
    found = []
    for given in (ids, garbage):
        batches = [{"input_ids": given, "attention_mask": mask}]
        data = functools.partial(contextlib.nullcontext, (batches, lambda b: model(**b)))
        found.append(refit_in_order(model, sets, plan, data))
    assert set(found[0]) == {p.parameter for s in sets for p in s.consumers}
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-3, atol=1e-4)


class Experts(nn.Module):
    """Two experts of no known architecture behind a layer whose repair moves tokens from one to the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.router = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 2)
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def forward(self, x):
        x = self.second(self.first(x).relu()).reshape(-1, 8)
        best = self.router(x).argmax(-1)
        for number in range(2):
            rows = (best == number).nonzero().flatten()
            x = x.index_add(0, rows, self.down[number](self.up[number](x[rows]).relu()))
        return x


@pytest.mark.parametrize("most", [None, 24])
def test_experts_that_other_tokens_reach_keep_their_weights(monkeypatch, most):
    """Also where so many tokens reach them that as many are drawn of both."""
    if most is not None:
        monkeypatch.setattr(module_order, "FEWEST_ROWS", most)
        monkeypatch.setattr(module_order, "ROWS_PER_INPUT", 1)
    torch.manual_seed(0)
    model = Experts()
    batches = [torch.randn(4, 32, 8) for _ in range(3)]
    trace(model, batches, lambda b: model(b).square().mean())
    sets = find_group_sets(model)
    plan = plan_of(sets, [range(s.size // 2) for s in sets])
    found = refit_in_order(model, sets, plan, functools.partial(contextlib.nullcontext, (batches, model)))
    assert "second.weight" in found
    assert not any(name.startswith(("up.", "down.")) for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_bias_is_what_the_mean_of_the_removed_channels_gives(kind):
    torch.manual_seed(0)
    model = Chain(kind)
    sets, batches, kept = model.group_sets(), model.batches(), [0, 2, 3, 5]
    plan = plan_of(sets, [kept])
    statistics = collect_statistics(model, sets, batches, model, (), activations=True)
    folded, biases = bias_fold(model, sets, plan, statistics)
    with torch.no_grad():
        x = torch.cat([model.produce(b).relu() for b in batches])
        constant = x.mean(dim=[d for d in range(x.dim()) if d != 1 or not model.spatial], keepdim=True)
        constant = x.movedim(1, -1).flatten(0, -2).mean(0) if model.spatial else x.mean(0)
        constant[kept] = 0
        # an input of that value everywhere, large enough to have positions away from its border
        sizes = [24 if len(model.spatial) == 3 else 40] * len(model.spatial)
        big = constant.view(1, 6, *[1] * len(sizes)).expand(1, 6, *sizes)
        plain = copy.deepcopy(model.read)
        plain.bias = None
        given = plain(big)
    if model.spatial:
        middle = given[(0, slice(None), *[slice(8, 14)] * len(model.spatial))].flatten(1)
        if matrix_dim(model.read) == 1:
            torch.testing.assert_close(middle, middle[:, :1].expand_as(middle), rtol=1e-4, atol=1e-5)
        given = middle.mean(dim=1)[None]
    present = 0 if model.read.bias is None else model.read.bias.detach()
    torch.testing.assert_close(biases["read.bias"], given[0] + present, rtol=1e-4, atol=1e-5)
    assert folded.biases == (("read",) if model.read.bias is None else ())


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_those_of_a_regression_between_channels(kind):
    torch.manual_seed(0)
    model = Chain(kind)
    sets, batches = model.group_sets(), model.batches()
    shares = unexplained_shares(model, sets, batches, model)
    with torch.no_grad():
        x = torch.cat([model.produce(b).relu() for b in batches])
        x = x.movedim(1, -1).flatten(0, -2).double().numpy()
    damping = 0.1 * 6 / len(x) * np.square(x).sum(0).mean()
    stacked = np.concatenate([x, np.sqrt(damping) * np.eye(6)])
    for group, share in enumerate(shares[sets[0].key].tolist()):
        others = np.delete(stacked, group, axis=1)
        rest = stacked[:, group] - others @ np.linalg.lstsq(others, stacked[:, group], rcond=None)[0]
        assert share == pytest.approx(float(np.square(rest).sum() / np.square(stacked[:, group]).sum()), rel=1e-3)


def test_shares_of_groups_with_several_readers_are_weighted_by_what_each_reads():
    torch.manual_seed(0)
    model = TwoReaders().eval()
    with torch.no_grad():
        # nothing is read but by the head, whose mean over positions is all that counts then
        model.first.weight.zero_()
        model.second.weight.zero_()
    sets, batches = model.group_sets(), [torch.randn(16, 2, 8, 8) for _ in range(4)]
    shares = unexplained_shares(model, sets, batches, model)
    with torch.no_grad():
        inputs = []
        model.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for batch in batches:
            model(batch)
    x, weight = torch.cat(inputs), model.head.weight.detach()
    part = sets[0].consumers[-1]
    expected = unexplained_share(x.T @ x, weight, part.index, 0.1 * x.shape[1] / len(x))
    torch.testing.assert_close(shares[sets[0].key], expected, rtol=1e-4, atol=1e-6)


def test_shares_behind_a_large_flatten_need_no_matrix_of_all_its_features(monkeypatch):
    channel_redundancy = importlib.import_module("lit_prune.repair.channel_redundancy")
    monkeypatch.setattr(channel_redundancy, "_MOST_FEATURES", 50)
    torch.manual_seed(0)
    model = TwoReaders().eval()
    sets, batches = model.group_sets(), [torch.randn(16, 2, 8, 8) for _ in range(4)]
    shares = unexplained_shares(model, sets, batches, model)
    inputs = []
    model.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for batch in batches:
        model(batch)
    x = torch.cat(inputs)[:, :80].view(-1, 5, 16).transpose(1, 2).flatten(0, 1)
    expected = unexplained_share(x.T @ x, torch.ones(1, 5), singles(5), 0.1 * 5 / len(x))
    torch.testing.assert_close(shares[sets[1].key], expected, rtol=1e-4, atol=1e-6)


def test_there_are_no_shares_where_a_reader_cannot_be_observed():
    model = TwoReaders().eval()
    sets = model.group_sets()
    slices = [Slice(s.parameter, s.dim, s.index, s.input_dim, s.module == "first") for s in sets[0].slices]
    sets[0] = group_set(model, "stem", slices)
    assert unexplained_shares(model, sets, [torch.randn(2, 2, 8, 8)], model) == {}


class Together:
    """Sums of what threads, in the place of processes, give at the same time."""

    def __init__(self, size):
        self.size, self.barrier, self.given = size, threading.Barrier(size, timeout=60), {}

    def sum(self, rank, tensor):
        self.given[rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.given[r] for r in range(self.size))
        self.barrier.wait()
        return total


@pytest.fixture
def fast_path():
    """Threads share this flag of PyTorch, which processes would have each; they put it back in any order."""
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("fast_path")
@pytest.mark.parametrize("what", ["refit", "shares"])
def test_processes_with_batches_of_their_own_find_what_one_finds_with_all(what):
    torch.manual_seed(0)
    model = TwoReaders().double()
    model(torch.randn(64, 2, 8, 8, dtype=torch.float64))
    model.eval()
    sets, batches = model.group_sets(), [torch.randn(8, 2, 8, 8, dtype=torch.float64) for _ in range(5)]
    plan = plan_of(sets, [[0, 2, 3, 5], [1, 2, 4]])

    def find(one, part, total):
        if what == "shares":
            return unexplained_shares(one, sets, part, one, all_reduce=total)
        return least_squares(one, sets, plan, part, one, all_reduce=total)

    expected = find(model, batches, None)
    parts, together = [batches[:2], batches[2:]], Together(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(find, copy.deepcopy(model), part, functools.partial(together.sum, rank))
            for rank, part in enumerate(parts)
        ]
        found = [job.result() for job in jobs]
    for one in found:
        assert one.keys() == expected.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-8)
