"""Finding the model and its groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny
from lit_prune import (
    MLP,
    Architecture,
    Attention,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    find_model,
    register_architecture,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("kv_heads", "share"), [(8, 1), (4, 2), (2, 4)])
def test_attention_groups_of_every_kind_are_read_from_the_shapes(kv_heads, share):
    model = tiny("llama", num_key_value_heads=kv_heads, head_dim=6)
    attention = [s for s in find_group_sets(model) if s.kind == "attention"]
    assert [s.size for s in attention] == [kv_heads] * 3
    assert [s.layer for s in attention] == [0, 1, 2]
    query, key, value, output = attention[0].slices
    assert query.index[0].tolist() == list(range(share * 6))
    assert key.index[0].tolist() == value.index[0].tolist() == list(range(6))
    assert output.dim == 1 and output.consumes and not query.consumes
    assert attention[0].cost == 32 * 6 * (2 * share + 2)


def test_with_one_key_value_head_the_groups_are_the_query_heads():
    model = tiny("llama", num_key_value_heads=1, head_dim=6, attention_bias=True)
    heads = [s for s in find_group_sets(model) if s.kind == "query_head"]
    assert [s.size for s in heads] == [8] * 3
    assert [p.parameter.split(".")[-2] for p in heads[0].slices] == ["q_proj", "q_proj", "o_proj"]
    assert heads[0].cost == 6 * (32 + 1 + 32) and heads[0].minimum == 1
    assert {(a.name, a.per_group) for a in heads[0].attributes} == {("num_key_value_groups", 1)}


def test_a_model_that_was_cut_to_one_key_value_head_keeps_its_groups(tokens):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    kept = [[2] if s.kind == "attention" else list(range(s.size)) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    again = find_group_sets(model)
    assert [(s.kind, s.size, s.cost) for s in again] == [
        (s.kind, len(k), s.cost) for s, k in zip(group_sets, kept, strict=True)
    ]


def test_costs_and_biases_add_up_to_the_parameters_of_the_layers():
    model = tiny("qwen2")
    total = sum(s.cost * s.size for s in find_group_sets(model))
    layers = sum(p.numel() for n, p in model.named_parameters() if "layers" in n)
    outside = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and "norm" in n)
    assert total == layers - outside


def test_the_model_is_found_wherever_it_is():
    model = tiny("llama")
    holder = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Sequential(model)])})
    assert find_model(holder) == ("b.0.0", model)
    assert find_model(model) == ("", model)
    assert find_model(holder, "b.0") == ("b.0.0", model)
    assert [s.key for s in find_group_sets(holder)] == [s.key for s in find_group_sets(model)]
    with pytest.raises(UnsupportedModelError, match=r"No module at 'c'.*\['a', 'b'\]"):
        find_model(holder, "c")


def test_none_or_several_models_are_an_error_that_lists_what_was_looked_at():
    with pytest.raises(UnsupportedModelError, match=r"0: Linear, 1: ReLU.*register_architecture"):
        find_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(UnsupportedModelError, match=r"2 supported models .*'0' \(LlamaForCausalLM\), '1'"):
        find_model(nn.ModuleList([tiny("llama"), tiny("llama")]))


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.head_size = 4
        self.n_head = 2
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(8, 8, bias=bias) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)


class Own(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(bias), Block(bias)])


def test_a_users_own_class_is_described_as_data():
    register_architecture(
        Architecture(
            "own",
            ("Own",),
            (
                Attention(
                    "blocks.*", "wq", "wk", "wv", "wo", head_dim="head_size", attributes={"n_head": "query_heads"}
                ),
                MLP("blocks.*", ("up",), "down"),
            ),
        )
    )
    sets = find_group_sets(Own())
    assert [(s.name, s.kind, s.size) for s in sets[:2]] == [("blocks.0", "attention", 2), ("blocks.0", "mlp", 12)]
    assert sets[0].attributes[0].name == "n_head" and sets[0].attributes[0].per_group == 1
    assert len(sets[0].slices) == 7 and len(sets[1].slices) == 3


def test_what_does_not_fit_the_description_is_named():
    model = tiny("llama")
    model.model.layers[1].self_attn.head_dim = 5
    with pytest.raises(UnsupportedModelError, match=r"layers.1.self_attn .*head_dim 5, q_proj has 32"):
        find_group_sets(model)
    del model.model.layers[1].self_attn.head_dim
    with pytest.raises(UnsupportedModelError, match="attribute 'head_dim'; found None"):
        find_group_sets(model)
    model = tiny("llama")
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(
        UnsupportedModelError, match=r"projection 'up_proj'; it has \['gate_proj', 'down_proj', 'act_fn'\]"
    ):
        find_group_sets(model)
    model = tiny("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match=r"no module is at 'layers.\*.self_attn'"):
        find_group_sets(model)


def test_quantised_adapted_and_tied_weights_are_refused():
    model = tiny("llama")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"q_proj.weight' holds quantised weights \(torch.int8\)"):
        find_group_sets(model)
    model = tiny("llama")
    model.model.layers[0].self_attn.q_proj = nn.Sequential(projection)
    with pytest.raises(UnsupportedModelError, match=r"is a Sequential; expected nn\.Linear"):
        find_group_sets(model)
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="same parameter"):
        find_group_sets(model)


def test_a_lora_adapter_must_be_merged_first():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedModelError, match=r"q_proj .*merge_and_unload"):
        find_group_sets(model)
    assert len(find_group_sets(model.merge_and_unload())) == 6
