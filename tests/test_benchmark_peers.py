"""The peers that benchmarks/quality.py implements: exact where nothing is removed, optimal where the paper says so."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune.groups import count_parameters

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from intervals import paired_interval, perplexity_ratio
from peers_modegpt import modegpt
from peers_slicegpt import slicegpt
from peers_uniform import minitron, osscar
from peers_walk import covariance, damped, inputs_of


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def batches():
    return list(torch.randint(0, 128, (64, 32), generator=torch.Generator().manual_seed(1)).split(8))


WAYS = {
    "slicegpt": lambda m, b, n: slicegpt(m, b, n, tied=True),
    "modegpt": lambda m, b, n: modegpt(m, b, n, temperature=None),
    "modegpt, allocated": lambda m, b, n: modegpt(m, b, n, temperature=0.1),
    "osscar": lambda m, b, n: osscar(m, b, n, heads_up=True),
    "minitron": lambda m, b, n: minitron(m, b, n, heads_up=False),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_is_stored_is_what_was_asked_for(model, batches, way):
    wanted = int(0.8 * count_parameters(model))
    dense = copy.deepcopy(model.state_dict())
    pruned = WAYS[way](model, batches, wanted)
    # one feature of the hidden size, or one channel a layer, is more than a hundredth of so small a model
    assert abs(pruned.stored_parameters - wanted) < 0.02 * count_parameters(model)
    assert not torch.allclose(pruned(batches[0]).logits, model(batches[0]).logits, atol=1e-3)
    assert all(torch.equal(dense[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("way", ["slicegpt", "modegpt"])
@torch.no_grad()
def test_nothing_removed_changes_nothing(model, batches, way):
    same = WAYS[way](model, batches, 10**9 if way == "slicegpt" else count_parameters(model))
    torch.testing.assert_close(same(batches[0]).logits, model(batches[0]).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_osscar_ends_at_the_least_squares_solution_of_what_it_kept(model, batches):
    """Of the first attention output, whose inputs no removal changed."""
    pruned = osscar(model, batches, int(0.8 * count_parameters(model)), heads_up=True)
    linear = model.model.layers[0].self_attn.o_proj
    read = inputs_of(linear, lambda: [model.model(input_ids=b, use_cache=False) for b in batches])
    gram = damped(covariance(read))
    found = pruned.model.layers[0].self_attn.o_proj.weight.double()
    kept = (found != 0).any(0)
    assert 0 < (~kept).sum() < len(kept)
    best = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ linear.weight.double().T)
    torch.testing.assert_close(found[:, kept], best.T, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_modegpt_approximates_value_and_output_as_well_as_any_low_rank(model, batches):
    """The error of the product in the metric of the inputs is the sum of the squared singular values left out (Eckart-Young)."""
    pruned = WAYS["modegpt"](model, batches, int(0.8 * count_parameters(model)))
    dense, small = model.model.layers[0], pruned.model.layers[0]
    normed = [dense.input_layernorm(model.model.embed_tokens(b)) for b in batches]
    gram = damped(covariance(normed), 1e-6)
    root = torch.linalg.cholesky(gram).T

    def product(layer, head):
        value = layer.self_attn.v_proj.weight.double()[head * 8 : head * 8 + 8]
        output = layer.self_attn.o_proj.weight.double()[:, head * 16 : head * 16 + 16]
        return torch.cat([value.T @ output[:, i * 8 : i * 8 + 8].T for i in range(2)], 1)

    for head in range(4):
        whole, low = root @ product(dense, head), root @ product(small, head)
        rank = int((small.self_attn.v_proj.weight[head * 8 : head * 8 + 8] != 0).any(1).sum())
        assert 0 < rank < 8
        left_out = torch.linalg.svdvals(whole)[rank:].square().sum()
        torch.testing.assert_close((whole - low).square().sum(), left_out, rtol=1e-4, atol=1e-8)


def test_intervals_hold_the_difference_as_often_as_they_say_and_shrink_with_more_units():
    generator = torch.Generator().manual_seed(0)
    held, widths = 0, []
    for _ in range(40):
        shared = torch.randn(100, generator=generator)
        first = shared + 0.1 + 0.5 * torch.randn(100, generator=generator)
        middle, low, high = paired_interval(first.tolist(), shared.tolist())
        assert low < middle < high
        held += low < 0.1 < high
        widths.append(high - low)
    assert held >= 34
    more = torch.randn(2500, generator=generator)
    _, low, high = paired_interval((more + 0.5 * torch.randn(2500, generator=generator)).tolist(), more.tolist())
    assert high - low == pytest.approx(sum(widths) / len(widths) / 5, rel=0.2)
    ratio, low, high = perplexity_ratio([2.0, 3.0], [2.0 - 0.1, 3.0 - 0.1])
    assert low == pytest.approx(ratio) == pytest.approx(high) == pytest.approx(1.1051709)
