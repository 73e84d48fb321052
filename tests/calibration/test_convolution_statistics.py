"""Statistics of convolutions: their input channels, and derivatives by masks of them, against autograd and closed forms."""

from __future__ import annotations

import pytest
import torch
from convolution_cases import KINDS, Chain, TwoReaders, group_set, singles
from torch import nn
from torch.nn import functional

from lit_prune.calibration.collect import collect_statistics
from lit_prune.groups import Slice
from lit_prune.ranking.importance import group_importance
from lit_prune.ranking.registry import criteria, get_criterion


def importance(name, model, group_sets, batches, loss):
    criterion = get_criterion(name)
    statistics = collect_statistics(model, group_sets, batches, loss, criterion.terms)
    return group_importance(criterion, dict(model.named_parameters()), group_sets, statistics, normalize=None)


def channels_last(x):
    """Rows of channels."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_criteria_of_activations_are_those_of_the_channels_over_batch_and_positions(kind):
    torch.manual_seed(0)
    model = Chain(kind)
    batches, group_sets = model.batches(), model.group_sets()
    (part,) = group_sets[0].consumers
    with torch.no_grad():
        x = torch.cat([channels_last(model.produce(b).relu()) for b in batches]).double()
        given = torch.cat([channels_last(b) for b in batches]).double()
    weight = model.read.weight.detach().double().movedim(part.dim, 0).flatten(1)
    produced = model.produce.weight.detach().double().flatten(1)
    expected = {
        "output_wanda": weight.norm(dim=1) * x.norm(dim=0),
        "flap": weight.square().sum(dim=1) * x.var(dim=0, unbiased=False),
        "wanda": weight.abs().sum(dim=1) * x.abs().mean(dim=0)
        + (produced.abs() * given.abs().mean(dim=0)).sum(dim=1)
        + model.produce.bias.detach().double().abs(),
    }
    for name, value in expected.items():
        (found,) = importance(name, model, group_sets, batches, lambda b: model(b).square().mean())
        torch.testing.assert_close(found, value.float(), rtol=1e-4, atol=1e-6)


def test_channels_without_a_batch_dimension_and_channels_last_in_memory_count_alike():
    torch.manual_seed(0)
    model = Chain("2d, same")
    (batch,) = model.batches(1, 4)
    group_sets = model.group_sets()
    ways = [[batch], [batch.to(memory_format=torch.channels_last)], list(batch)]
    found = [importance("output_wanda", model, group_sets, w, lambda b: model(b).mean())[0] for w in ways]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def grouped_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6, padding=1))
    # a position of the second layer's weight stands for a channel in each of its two groups
    pairs = torch.stack([torch.arange(4), torch.arange(4) + 4], dim=1)
    parts = [Slice("0.weight", 0, pairs, 1), Slice("0.bias", 0, pairs), Slice("1.weight", 1, singles(4), 1)]
    # depthwise: the channels that it gives, which are those that it reads
    deep = [Slice("2.weight", 0, singles(6), 1), Slice("2.bias", 0, singles(6))]
    return model, group_set(model, "0", parts), group_set(model, "2", deep)


def test_a_position_of_a_grouped_convolution_is_a_channel_in_each_of_its_groups():
    model, pairs, deep = grouped_model()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    with torch.no_grad():
        x = torch.cat([channels_last(model[0](b)) for b in batches]).double()
        y = torch.cat([channels_last(model[1](model[0](b))) for b in batches]).double()
    weight = model[1].weight.detach().double()
    rows = (weight[:3].movedim(1, 0).flatten(1), weight[3:].movedim(1, 0).flatten(1))
    expected = sum(w.norm(dim=1) * x[:, 4 * n : 4 * n + 4].norm(dim=0) for n, w in enumerate(rows))
    (found,) = importance("output_wanda", model, [pairs], batches, lambda b: model(b).mean())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    (found,) = importance("wanda", model, [deep], batches, lambda b: model(b).mean())
    own = model[2].weight.detach().double().abs().flatten(1).sum(dim=1)
    expected = own * y.abs().mean(dim=0) + model[2].bias.detach().abs()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_fisher_of_a_grouped_convolution_is_that_of_a_mask_on_both_channels():
    model, pairs, _ = grouped_model()
    images = torch.randn(4, 3, 6, 6)
    mask = torch.ones(4, 4, requires_grad=True)
    model[2](model[1](model[0](images) * mask.repeat(1, 2)[:, :, None, None])).square().mean().backward()
    (found,) = importance("fisher", model, [pairs], [images], lambda b: model(b).square().mean())
    torch.testing.assert_close(found, (mask.grad * 4).square().mean(dim=0), rtol=1e-4, atol=1e-9)


def masked_forward(model, x, stem, middle):
    """The forward of TwoReaders with a mask wherever a group is read."""
    scale = stem[:, :, None, None]
    x = model.norm(model.stem(x)).relu()
    y = model.norm2(model.first(x * scale) + model.second(x * scale)).relu()
    flat = (y * middle[:, :, None, None]).flatten(1)
    return model.head(torch.cat([flat, (x.mean(dim=(2, 3))) * stem], dim=1))


@pytest.mark.parametrize("norm", [False, True])
def test_fisher_is_the_mean_square_of_each_images_derivative_by_a_mask_in_all_places(norm):
    torch.manual_seed(0)
    model = TwoReaders(norm).eval()
    batches = [(torch.randn(5, 2, 8, 8), torch.randint(0, 3, (5,))) for _ in range(3)]

    def loss(batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    expected = [torch.zeros(6), torch.zeros(5)]
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            masks = [torch.ones(1, 6, requires_grad=True), torch.ones(1, 5, requires_grad=True)]
            functional.cross_entropy(masked_forward(model, image[None], *masks), label[None]).backward()
            for total, mask in zip(expected, masks, strict=True):
                total += mask.grad[0].square() / 15
    model.zero_grad()
    flags = []
    weights = list(model.parameters())

    def watched(batch):
        flags.extend(p.requires_grad for p in weights)
        return loss(batch)

    found = importance("fisher", model, model.group_sets(), batches, watched)
    # by masks: no weight has a gradient
    assert not any(flags)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-9)


def test_where_a_reader_cannot_be_observed_fisher_takes_the_gradients_of_the_weights():
    torch.manual_seed(0)
    model = TwoReaders()
    sets = model.group_sets()
    slices = tuple(Slice(s.parameter, s.dim, s.index, s.input_dim, s.module == "first") for s in sets[0].slices)
    sets[0] = group_set(model, "stem", list(slices))
    model.eval()
    images, labels = torch.randn(5, 2, 8, 8), torch.randint(0, 3, (5,))
    masks = [torch.ones(1, 6, requires_grad=True), torch.ones(1, 5, requires_grad=True)]
    functional.cross_entropy(masked_forward(model, images, *(m.expand(5, -1) for m in masks)), labels).backward()
    model.zero_grad()
    found = importance("fisher", model, sets, [(images, labels)], lambda b: functional.cross_entropy(model(b[0]), b[1]))
    for value, mask in zip(found, masks, strict=True):
        torch.testing.assert_close(value, mask.grad[0].square(), rtol=1e-3, atol=1e-9)


def test_a_linear_model_on_rows_of_samples_has_a_sample_in_every_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    parts = [Slice("0.weight", 0, singles(6), 1), Slice("0.bias", 0, singles(6)), Slice("2.weight", 1, singles(6), 1)]
    rows = torch.randn(7, 3)
    expected = torch.zeros(6)
    for row in rows:
        mask = torch.ones(6, requires_grad=True)
        model[2](model[1](model[0](row)) * mask).square().mean().backward()
        expected += mask.grad.square() / 7
    model.zero_grad()
    (found,) = importance("fisher", model, [group_set(model, "0", parts)], [rows], lambda b: model(b).square().mean())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", [c for c in criteria() if c != "random"])
def test_every_criterion_scores_convolutions_and_what_is_zero_least(name):
    torch.manual_seed(0)
    model = TwoReaders().eval()
    with torch.no_grad():
        for part in model.group_sets()[0].slices:
            model.get_parameter(part.parameter).index_fill_(part.dim, part.index[2], 0.0)
    batches = [torch.randn(4, 2, 8, 8) for _ in range(2)]
    found = importance(name, model, model.group_sets(), batches, lambda b: model(b).logsumexp(dim=1).mean())
    assert all(bool(value.isfinite().all()) for value in found)
    assert int(found[0].argmin()) == 2
    assert float(found[0][2]) == 0 < float(found[0].max())
