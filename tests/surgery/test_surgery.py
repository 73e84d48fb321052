"""Surgery against the dense model with zeroed groups, and against hand computed optimizer steps."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import tiny, uneven_kept, zeroed
from lit_prune import PlanError, PruningError, PruningPlan, apply_plan, find_group_sets, get_plan
from lit_prune.surgery.plan_cuts import parameter_cuts

pytestmark = pytest.mark.core

FAMILIES = {
    "llama": {},
    "llama-mha": {"num_key_value_heads": 8},
    "llama-mqa-bias": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 6},
}


def family(name: str, attn: str = "sdpa") -> torch.nn.Module:
    return tiny(name.split("-")[0], attn, **FAMILIES[name])


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_the_zeroed_dense_model(name, attn, tokens):
    model = family(name, attn)
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    oracle = zeroed(model, kept)
    plan = PruningPlan.from_kept(group_sets, kept)
    expected_parameters = sum(p.numel() for p in model.parameters()) - sum(
        s.cost * (s.size - len(k)) for s, k in zip(group_sets, kept, strict=True)
    )
    apply_plan(model, plan)
    torch.testing.assert_close(model(tokens).logits, oracle(tokens).logits, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters
    assert not torch.allclose(oracle(tokens).logits, family(name, attn)(tokens).logits, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_cache_equals_generation_without(name, tokens):
    model = family(name)
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(tokens, use_cache=True, **options)
    without = model.generate(tokens, use_cache=False, **options)
    assert with_cache.shape == (2, 20)
    assert torch.equal(with_cache, without)


def test_module_attributes_follow_and_shared_config_stays(tokens):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    for group_set, keep in zip(group_sets, kept, strict=True):
        module = model.get_submodule(group_set.name)
        if group_set.kind == "attention":
            assert module.q_proj.out_features == module.o_proj.in_features == len(keep) * 2 * module.head_dim
            assert module.k_proj.out_features == module.v_proj.weight.shape[0] == len(keep) * module.head_dim
        else:
            assert module.gate_proj.out_features == module.intermediate_size == len(keep)
    assert model.config.num_key_value_heads == 4
    again = find_group_sets(model)
    assert [s.size for s in again] == [len(k) for k in kept]


def optimizer_of(kind, model):
    groups = [
        {"params": [p for n, p in model.named_parameters() if "self_attn" in n], "lr": 0.02},
        {"params": [p for n, p in model.named_parameters() if "self_attn" not in n]},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, amsgrad=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    return torch.optim.Adafactor(groups, lr=0.01)


def step(model, optimizer, ids):
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_state_is_kept_bit_for_bit_and_the_next_step_is_that_of_the_zeroed_model(kind, tokens):
    model = tiny("qwen2")
    optimizer = optimizer_of(kind, model)
    for _ in range(3):
        step(model, optimizer, tokens)
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    plan = PruningPlan.from_kept(group_sets, kept)
    cuts = parameter_cuts(model, plan, group_sets)

    oracle = zeroed(model, kept)
    oracle_optimizer = optimizer_of(kind, oracle)
    oracle_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}

    apply_plan(model, plan, [optimizer])
    for name, parameter in model.named_parameters():
        for key, value in before[name].items():
            expected = value
            for cut in cuts.get(name, []) if value.dim() else []:
                expected = expected.index_select(cut.dim, cut.kept)
            assert torch.equal(optimizer.state[parameter][key], expected), (name, key)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert len(optimizer.state) == len(list(model.parameters()))

    torch.testing.assert_close(step(model, optimizer, tokens), step(oracle, oracle_optimizer, tokens))
    dense = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        expected = dense[name].detach()
        for cut in cuts.get(name, []):
            expected = expected.index_select(cut.dim, cut.kept)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-4)


def test_adafactor_state_is_cut_along_its_factors(tokens):
    model = tiny("llama")
    optimizer = optimizer_of("adafactor", model)
    step(model, optimizer, tokens)
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    before = optimizer.state[model.model.layers[0].mlp.gate_proj.weight]["row_var"].clone()
    apply_plan(model, PruningPlan.from_kept(group_sets, kept), [optimizer])
    after = optimizer.state[model.model.layers[0].mlp.gate_proj.weight]["row_var"]
    mlp = next(k for s, k in zip(group_sets, kept, strict=True) if s.kind == "mlp" and s.layer == 0)
    assert torch.equal(after, before[mlp])
    step(model, optimizer, tokens)


def snapshot(model, optimizer):
    return (
        {
            n: (id(p), p.detach().clone(), None if p.grad is None else p.grad.clone())
            for n, p in model.named_parameters()
        },
        {
            n: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
            for n, p in model.named_parameters()
        },
        [[id(p) for p in g["params"]] for g in optimizer.param_groups],
    )


def test_a_failure_in_the_middle_leaves_model_and_optimizer_as_they_were(tokens):
    model = tiny("qwen2")
    optimizer = optimizer_of("adamw", model)
    step(model, optimizer, tokens)
    group_sets = find_group_sets(model)
    late = model.get_parameter(group_sets[-2].slices[-1].parameter)
    optimizer.state[late]["odd"] = torch.zeros(7)
    logits = model(tokens).logits
    before = snapshot(model, optimizer)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    with pytest.raises(PruningError, match=r"state 'odd' of .*shape \(7,\)"):
        apply_plan(model, plan, [optimizer])
    after = snapshot(model, optimizer)
    assert before[2] == after[2]
    for name, (identity, value, gradient) in before[0].items():
        assert after[0][name][0] == identity
        assert torch.equal(after[0][name][1], value)
        assert torch.equal(after[0][name][2], gradient)
        for key, state in before[1][name].items():
            assert torch.equal(after[1][name][key], state)
    assert torch.equal(model(tokens).logits, logits)
    assert get_plan(model) is None
    assert model.model.layers[0].mlp.gate_proj.out_features == 24


def test_pruning_twice_composes_into_one_plan(tokens):
    model, once = tiny("llama"), tiny("llama")
    for _ in range(2):
        group_sets = find_group_sets(model)
        apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    apply_plan(once, get_plan(model))
    assert get_plan(once).digest() == get_plan(model).digest()
    assert torch.equal(model(tokens).logits, once(tokens).logits)


def test_a_plan_that_does_not_fit_is_refused_before_anything_changes():
    model = tiny("llama")
    other = tiny("llama", intermediate_size=20)
    group_sets = find_group_sets(other)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    with pytest.raises(PlanError, match="has 24 groups, the plan was made for 20"):
        apply_plan(model, plan)
    assert model.model.layers[0].self_attn.q_proj.out_features == 32


def test_new_weights_of_a_wrong_shape_are_refused():
    model = tiny("llama")
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(PlanError, match=r"shape \(1, 1\); expected \(32, "):
        apply_plan(model, plan, weights={name: torch.zeros(1, 1)})
    assert model.get_parameter(name).shape == (32, 24)
