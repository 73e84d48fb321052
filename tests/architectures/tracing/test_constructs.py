"""What is found by tracing is right: a dense model with masked groups computes what the cut model does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from constructs import CONSTRUCTS, KeptBias
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from conftest import unsettled
from lit_prune import (
    Architecture,
    PruningConfig,
    PruningPlan,
    Traced,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    prune,
    register_architecture,
    trace,
)
from lit_prune.architectures.tracing import trace_groups


def masked(model, group_sets, kept):
    """A dense copy in which nothing reads the removed groups."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group_set, keep in zip(group_sets, kept, strict=True):
            removed = sorted(set(range(group_set.size)) - set(keep))
            assert group_set.consumers
            for part in group_set.consumers:
                parameters[part.parameter].index_fill_(part.dim, part.index[removed].flatten(), 0.0)
    return model


def tensors(output):
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def built(construct):
    torch.manual_seed(0)
    model, inputs = construct.build(), construct.inputs()
    model(*inputs)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return unsettled(model), inputs


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_the_cut_model_computes_what_the_masked_one_does(name):
    construct = CONSTRUCTS[name]
    model, inputs = built(construct)

    class Described(type(model)):
        pass

    model.__class__ = Described
    register_architecture(Architecture(f"construct {name}", (Described,), (Traced(lambda: inputs),)))
    group_sets = find_group_sets(model)
    assert tuple(s.size for s in group_sets) == construct.sizes
    generator = torch.Generator().manual_seed(1)
    kept = []
    for number, group_set in enumerate(group_sets):
        order = torch.randperm(group_set.size, generator=generator)
        # not the same fraction of all: a width that is taken for another's would fit by chance
        count = 1 + (group_set.size // 3 + number) % max(1, group_set.size - 1)
        kept.append(sorted(order[:count].tolist()))
    expected = tensors(masked(model, group_sets, kept)(*inputs))
    dense = tensors(model(*inputs))
    parameters = sum(p.numel() for p in model.parameters())
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    assert sum(p.numel() for p in model.parameters()) < parameters
    for found, wanted, before in zip(tensors(model(*inputs)), expected, dense, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        # the groups mattered
        assert not torch.allclose(wanted, before, atol=1e-4) or wanted.numel() == 0
    # and it trains
    sum(t.sum() for t in tensors(model.train()(*inputs)) if t.requires_grad).backward()


@pytest.mark.filterwarnings("ignore:.*parameters of KeptBias can be pruned")
@pytest.mark.parametrize("importance", ["auto", "taylor", "wanda"])
def test_what_evaluation_keeps_of_the_dense_model_is_not_used_afterwards(importance):
    torch.manual_seed(0)
    model = unsettled(KeptBias()).eval()
    batches = [torch.randn(4, 5, 12) for _ in range(3)]
    model(batches[0])
    assert model.gathered
    prune(model, batches, lambda x: model(x).square().mean(), PruningConfig(importance, 0.3))
    assert model.num_heads == len(model.biases) < 4
    outputs = model(batches[0])
    # training mode uses no cache
    torch.testing.assert_close(outputs, model.train()(batches[0]))


def test_what_is_not_understood_stays_whole_and_is_named():
    @torch.library.custom_op("lit_prune_tests::odd", mutates_args=())
    def odd(x: Tensor) -> Tensor:
        return x.flip(1).cumsum(1)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(odd(self.first(x))).relu())

    model, x = Odd(), torch.randn(2, 6)
    with pytest.warns(UserWarning, match=r"of the parameters of Odd can be pruned") as caught:
        found = trace_groups(model, lambda: model(x))
    assert [(s.name, s.size) for s in found.group_sets] == [("second", 10)]
    (named,) = [w for w in found.whole if w.operator.endswith("odd")]
    assert named.module == "first" and "not understood" in named.reason
    assert named.parameters == 6 * 8 + 8
    assert "first" in str(caught[0].message) and "odd" in str(caught[0].message)


def test_a_set_for_which_cut_and_masked_differ_is_dropped_loudly():
    class Counts(nn.Module):
        """Divides by a number that does not follow."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.c(self.b(hidden / hidden.shape[-1]).relu())

    model, x = Counts(), torch.randn(2, 6)
    with pytest.warns(UserWarning, match=r"'a'.*failed the check: masked and cut outputs differ"):
        found = trace_groups(model, lambda: model(x))
    assert [s.name for s in found.group_sets] == ["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(trace_groups(model, lambda: model(x), check=False).group_sets) == 2


class ScaledByShare(nn.Module):
    """As torchvision's Swin: the scale of the logits is worked out from the number of heads and the width of the input."""

    def __init__(self, features):
        super().__init__()
        self.num_heads, self.features = 4, features
        self.qkv, self.out, self.up, self.down = (nn.Linear(a, b) for a, b in ((16, 48), (16, 16), (16, 24), (24, 16)))

    def forward(self, x):
        b, n, c = x.shape
        heads = 1 if self.features else self.num_heads
        q, k, v = self.qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        # of queries that lost features, PyTorch's own scale is another one, too
        scale = None if self.features else (c // self.num_heads) ** -0.5
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.down(self.up(x + self.out(mixed.transpose(1, 2).flatten(2))).relu())


@pytest.mark.parametrize("features", [True, False])
def test_a_scale_that_changes_with_the_heads_shows_in_a_model_whose_logits_are_all_but_zero(features):
    torch.manual_seed(0)
    model, x = ScaledByShare(features).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        model.qkv.weight.mul_(0.01)
    with pytest.warns(UserWarning, match="failed the check"):
        found = trace_groups(model, lambda: model(x))
    assert [s.name for s in found.group_sets] == ["up"]


@pytest.mark.parametrize("width", [4, 8, 12])
def test_a_forward_that_takes_the_width_of_one_set_for_that_of_another_is_right_where_they_differ(width):
    class Confuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, width), nn.Linear(6, width)
            self.c, self.d = nn.Linear(width, 3), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.a(x).relu(), self.b(x).relu()
            return self.c(one.reshape(len(x), other.shape[-1])) + self.d(other)

    torch.manual_seed(0)
    model, x = Confuses(), torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group_sets = trace(model, [x], lambda one: model(one).sum()).group_sets
    kept = [range(s.size - 1 - number) for number, s in enumerate(group_sets)]
    expected = masked(model, group_sets, kept)(x)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), r"AssertionError: in forward: raise error"),
        (StopIteration(), r"StopIteration: in forward: raise error"),
        (ValueError("\n\nwidth\nof 8"), r"ValueError: width\)"),
        (KeyError("width"), r"KeyError: 'width'"),
    ],
    ids=["no message", "stop", "lines", "key"],
)
def test_whatever_a_model_raises_at_another_width_is_said(error, said):
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            if hidden.shape[-1] != 8:
                raise error
            return self.c(self.b(hidden).relu())

    model, x = Insists(), torch.randn(2, 6)
    with pytest.warns(UserWarning, match=rf"'a'.*failed the check: the cut model does not run \({said}"):
        found = trace_groups(model, lambda: model(x))
    assert [s.name for s in found.group_sets] == ["b"]


def test_residual_branches_that_start_at_zero_do_not_hide_a_wrong_cut():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
            self.gamma = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.c(x + self.gamma * self.b(hidden * hidden.shape[-1]))

    model, x = Branch(), torch.randn(2, 6)
    with pytest.raises(UnsupportedModelError, match=r"'a', 'b'.*failed the check"):
        trace_groups(model, lambda: model(x))
    assert not model.gamma.any()


def test_heads_that_were_reshaped_to_the_inputs_width_are_copied_exported_and_cut_again():
    model, inputs = built(CONSTRUCTS["attention to the input's width"])

    class Narrowed(type(model)):
        pass

    model.__class__ = Narrowed
    register_architecture(Architecture("narrowed", (Narrowed,), (Traced(lambda: inputs),)))
    for kept in ([0, 2, 3], [0, 1]):
        group_sets = find_group_sets(model)
        expected = masked(model, group_sets, [kept])(*inputs)
        apply_plan(model, PruningPlan.from_kept(group_sets, [kept]))
        torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(*inputs), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(model, inputs, strict=False).module()(*inputs)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
