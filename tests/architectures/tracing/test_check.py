"""The check of traced groups: which integers follow a set, and that values which are not finite, or chance, prove nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_constructs import masked
from torch import nn
from torch.nn import functional

from conftest import unsettled
from lit_prune import PruningPlan, apply_plan, trace


def cut(model, inputs, kept_of):
    """The group sets of a model, what it gives while masked, and what it gives once it is cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group_sets = trace(model, [inputs], lambda x: model(x).square().sum()).group_sets
    kept = [kept_of(s) for s in group_sets]
    expected = masked(copy.deepcopy(model), group_sets, kept)(inputs)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return group_sets, expected, model(inputs)


def all_but_one(group_set):
    return list(range(group_set.size - 1))


class Heads(nn.Module):
    """Attention by the number of heads, the width of all of them, or the width of one, with other integers beside it."""

    def __init__(self, by, others, width=32, heads=4):
        super().__init__()
        self.by, self.n_head, self.width, self.head_dim = by, heads, width, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        for name, value in others.items():
            setattr(self, name, value)

    def forward(self, x):
        length = x.shape[1]
        heads, each = {"heads": (self.n_head, -1), "both": (self.n_head, self.head_dim)}.get(
            self.by, (-1, self.head_dim)
        )
        q, k, v = (f(x).view(len(x), length, heads, each).transpose(1, 2) for f in (self.q, self.k, self.v))
        positions = torch.arange(length)
        near = (positions[:, None] - positions[None]).abs() < getattr(self, "window", length)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = mixed.reshape(len(x), length, self.width) if self.by == "width" else mixed
        return self.o(mixed[:, : getattr(self, "max_tokens", length)])


class Residual(nn.Module):
    """Attention layers around which the width stays."""

    def __init__(self, by, others, layers=1):
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(layers))
        self.layers = nn.ModuleList(Heads(by, others) for _ in range(layers))

    def forward(self, x):
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.last(x)


OTHERS = {"num_classes": 4, "vocab": 32, "layer_idx": 4, "max_tokens": 32, "block_size": 32}
FOLLOWS = {"heads": {"n_head"}, "both": {"n_head"}, "width": {"width"}, "inferred": set()}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("others", [OTHERS, {"window": 4}, {"max_tokens": 32}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("by", FOLLOWS)
def test_integers_that_merely_equal_the_heads_or_the_width_stay(by, others, layers):
    torch.manual_seed(0)
    model = unsettled(Residual(by, others, layers)).eval()
    # a window of 4 makes no difference to three tokens
    group_sets, expected, found = cut(model, torch.randn(2, 3, 6), all_but_one)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [s.kind for s in group_sets] == ["attention"] * layers
    for group_set, layer in zip(group_sets, model.layers, strict=True):
        assert {a.name for a in group_set.attributes} == FOLLOWS[by]
        assert layer.n_head == (3 if by in ("heads", "both") else 4)
        assert {name: getattr(layer, name) for name in others} == others


@pytest.mark.parametrize("others", [("steps",), ("steps", "depth"), ("scale_factor", "steps", "depth")], ids="-".join)
@pytest.mark.parametrize("name", ["c", "width"])
def test_integers_that_merely_equal_the_channels_stay(name, others):
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            for other in (name, *others):
                setattr(self, other, 8)
            self.fc, self.conv, self.out = nn.Linear(5, 8 * 16), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

        def forward(self, z):
            hidden = self.fc(z).view(-1, getattr(self, name), 4, 4)
            for _ in range(min(self.steps, 2)):
                hidden = hidden.tanh()
            return self.out(self.conv(hidden).relu())

    torch.manual_seed(0)
    model = Generator()
    group_sets, expected, found = cut(model, torch.randn(4, 5), all_but_one)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [a.name for s in group_sets for a in s.attributes] == [name]
    assert getattr(model, name) == 7 and all(getattr(model, other) == 8 for other in others)


class OwnNorm(nn.Module):
    """A batch norm by hand; ``shape`` is that of its statistics, ``start`` what the variance comes from."""

    def __init__(self, shape, variance):
        super().__init__()
        self.variance = variance
        start = {"sqrt": 1.0, "log": 1.0, "negative": -1.0, "zero": 0.0}[variance]
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.full(shape, start))

    def forward(self, x):
        if self.variance == "log":
            return (x - self.mean) * (2 + torch.log(self.var))
        return (x - self.mean) / torch.sqrt((-self.var if self.variance == "negative" else self.var) + 1e-5)


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("variance", ["sqrt", "log", "negative", "zero"])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1)], ids=str)
def test_values_that_are_not_finite_hide_no_wrong_cut(shape, variance, divides):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), OwnNorm(shape, variance)
            self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x):
            hidden = self.second(self.norm(self.first(x)).relu()).relu()
            # a number that does not follow
            hidden = hidden / hidden.shape[1] ** 0.5 if divides else hidden
            return self.last(hidden.mean((2, 3)))

    torch.manual_seed(0)
    group_sets, expected, found = cut(Net(), torch.randn(4, 3, 8, 8), all_but_one)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert [s.name for s in group_sets] == (["first"] if divides else ["first", "second"])


def test_what_is_not_finite_once_it_is_masked_counts_as_not_checked():
    class Scaled(nn.Module):
        """Divides by the smallest length of the columns of a weight."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 3)

        def forward(self, x):
            hidden = self.b(self.a(x).relu())
            with torch.no_grad():
                shortest = self.b.weight.detach().norm(dim=0).min().item()
            return self.c((hidden * (1.0 if shortest else float("nan"))).relu())

    torch.manual_seed(0)
    group_sets, expected, found = cut(Scaled(), torch.randn(2, 6), all_but_one)
    assert [s.name for s in group_sets] == ["b"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept_inputs", [2, 5, 7])
@pytest.mark.parametrize("kept_heads", [[0, 1, 3], [1, 2], [3]], ids=str)
@pytest.mark.parametrize("width", [None, 8, 10], ids=["one weight", "same", "own width"])
def test_attention_of_torch_loses_heads_and_inputs_by_themselves(width, kept_heads, kept_inputs):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.other = nn.Linear(6, 8), nn.Linear(6, width or 8)
            self.attention = nn.MultiheadAttention(8, 4, kdim=width, vdim=width, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            hidden, other = self.read(x), self.other(x)
            mixed, _ = self.attention(hidden, other, other)
            return self.last(hidden + mixed)

    torch.manual_seed(0)
    model = unsettled(Attends()).eval().double()
    inputs = torch.randn(2, 7, 6, dtype=torch.float64)
    kept = {"attention": kept_heads, "read": list(range(kept_inputs))}
    group_sets, expected, found = cut(model, inputs, lambda s: kept.get(s.name, list(range(s.size))))
    assert {"attention", "read"} <= {s.name for s in group_sets}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.attention.num_heads == len(kept_heads) and model.attention.kept_heads == kept_heads
