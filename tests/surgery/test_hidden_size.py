"""Cutting channels of the hidden states, alone and with heads and MLP channels."""

from __future__ import annotations

import copy

import pytest
import torch
from hidden_cases import MODELS, hidden_plan, inputs, logits, masked_by_hand, some

from conftest import tiny, uneven_kept, zeroed
from lit_prune import UnsupportedModelError, apply_plan, find_group_sets, get_plan
from lit_prune.groups import HIDDEN, count_parameters, count_removed
from lit_prune.surgery.apply import cut

every_model = pytest.mark.parametrize("name", MODELS)


def assert_close(found, expected, precision=1e-5):
    torch.testing.assert_close(found, expected, rtol=precision, atol=precision * float(expected.abs().max()))


@every_model
def test_equals_the_masked_dense_model(name):
    dense = MODELS[name]()
    kept = some(32, 21)
    model = copy.deepcopy(dense)
    apply_plan(model, hidden_plan(model, kept))
    oracle = masked_by_hand(dense, kept)
    for seed in (0, 1):
        assert_close(logits(model, seed), logits(oracle, seed))
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-2 * float(logits(dense).abs().max())
    assert (model.config.hidden_size, dense.config.hidden_size) == (21, 32)


@every_model
def test_two_kinds_of_cut_in_one_matrix(name):
    dense = MODELS[name]()
    others = uneven_kept(find_group_sets(dense))
    kept = some(32, 19)
    if name == "olmo2":
        # a norm over all heads counts those that stay, which zeros do not say
        others = [
            list(range(s.size)) if s.kind == "attention" else o
            for s, o in zip(find_group_sets(dense), others, strict=False)
        ]
    model = copy.deepcopy(dense)
    plan = hidden_plan(model, kept, others)
    sets = find_group_sets(model, hidden=True)
    removed = [s.kept_to_removed(k) for s, k in zip(sets, [kept, *others], strict=False)]
    apply_plan(model, plan)
    assert_close(logits(model), logits(masked_by_hand(zeroed(dense, others), kept)))
    # what leaves with a channel and with a head is counted once
    assert count_parameters(dense) - count_removed(dense, sets, removed) == count_parameters(model)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_undone_bit_for_bit(name):
    dense = MODELS[name]()
    model = copy.deepcopy(dense)
    undo = cut(model, hidden_plan(model, some(32, 16), uneven_kept(find_group_sets(model))))
    undo()
    assert get_plan(model) is None
    assert model.config.hidden_size == 32
    for (key, a), (_, b) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(logits(model), logits(dense))


def test_a_second_cut_composes():
    dense = MODELS["qwen3"]()
    model = copy.deepcopy(dense)
    first, second = some(32, 24), some(24, 16, seed=5)
    apply_plan(model, hidden_plan(model, first))
    apply_plan(model, hidden_plan(model, second))
    at_once = copy.deepcopy(dense)
    apply_plan(at_once, get_plan(model))
    kept = [first[i] for i in second]
    assert next(e.kept for e in get_plan(model).entries if e.kind == HIDDEN) == tuple(kept)
    assert torch.equal(logits(model), logits(at_once))
    assert_close(logits(model), logits(masked_by_hand(dense, kept)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "vit"])
def test_moments_of_adam_follow(name):
    """The cut model goes on training as the dense one whose removed parameters are held at zero."""
    model = MODELS[name]().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs(model)).logits.square().mean().backward()
    optimizer.step()
    kept = some(32, 17)
    others = uneven_kept(find_group_sets(model))
    parameters = dict(model.named_parameters())
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in parameters.items()}
    sets = find_group_sets(model, hidden=True)
    removed = [s.kept_to_removed(k) for s, k in zip(sets, [kept, *others], strict=False)]
    stays = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
    for group_set, groups in zip(sets, removed, strict=False):
        for part in group_set.slices:
            stays[part.parameter].index_fill_(part.dim, part.index[groups].flatten(), False)
    apply_plan(model, hidden_plan(model, kept, others), [optimizer])
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].shape == parameter.shape
            assert torch.equal(state[moment].flatten(), before[key][moment][stays[key]]), key
    optimizer.zero_grad()
    model(**inputs(model)).logits.square().mean().backward()
    optimizer.step()


def test_what_is_not_described_is_refused():
    for name in ("opt", "mixtral"):
        with pytest.raises(UnsupportedModelError, match="hidden"):
            find_group_sets(tiny(name), hidden=True)
    with pytest.raises(UnsupportedModelError, match="without weights"):
        find_group_sets(tiny("olmo"), hidden=True)
    model = tiny("llama")
    model.model.layers[0].register_parameter("gate", torch.nn.Parameter(torch.ones(32)))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.gate"):
        find_group_sets(model, hidden=True)
