"""REAP's criterion against values worked out by hand from a router's and an expert's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import lit_prune
from conftest import tiny

pytestmark = pytest.mark.core
SIZES = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": {**SIZES, "num_local_experts": 5, "head_dim": 6},
    "qwen2_moe": {
        **SIZES,
        "num_experts": 5,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 12,
        "norm_topk_prob": False,
    },
}


def reap_config(**options):
    return lit_prune.PruningConfig("reap", 0.1, normalize=None, repair=None, **options)


def calibrated(model, batches, config):
    group_sets = lit_prune.find_group_sets(model)
    statistics = lit_prune.calibrate(model, group_sets, batches, lambda b: model(**b, use_cache=False).loss, config)
    return group_sets, statistics


def importance_of(model, batches, config=None):
    config = config or reap_config()
    group_sets, statistics = calibrated(model, batches, config)
    table, _ = lit_prune.make_plan(model, group_sets, statistics, config)
    rows = torch.as_tensor(table.importance).split(table.sizes.tolist())
    return {s.key: values for s, values in zip(group_sets, rows, strict=True)}


def batches_of(model, padded=False):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        ids = torch.randint(1, model.config.vocab_size, (2, 8), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        if padded:
            mask = torch.ones_like(ids)
            mask[0, 5:] = 0
            batch["attention_mask"] = mask
        found.append(batch)
    return found


@torch.no_grad()
def by_hand(model, batches, layer):
    """The mean over an expert's tokens of router weight times norm of its output, from the weights alone."""
    block = model.get_submodule(f"model.layers.{layer}.mlp")
    seen = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    values = [[] for _ in range(len(block.experts.down_proj))]
    for batch in batches:
        seen.clear()
        model(**batch)
        x = seen[0]
        x = x[batch["attention_mask"].bool()] if "attention_mask" in batch else x.flatten(0, 1)
        probabilities = torch.softmax(x @ block.gate.weight.T, dim=-1)
        for token, line in zip(x, probabilities, strict=True):
            chosen = line.argsort(descending=True)[:2]
            share = line[chosen].sum() if getattr(block.gate, "norm_topk_prob", True) else 1.0
            for j in chosen.tolist():
                gate, up = (block.experts.gate_up_proj[j] @ token).chunk(2)
                output = block.experts.down_proj[j] @ (functional.silu(gate) * up)
                values[j].append(float(line[j] / share * output.norm()))
    handle.remove()
    return torch.tensor([sum(v) / len(v) if v else 0.0 for v in values])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_mean_of_router_weight_times_output_norm(name, padded):
    model = tiny(name, **MODELS[name])
    batches = batches_of(model, padded)
    found = importance_of(model, batches)
    for layer in range(2):
        expected = by_hand(model, batches, layer)
        torch.testing.assert_close(found[f"model.layers.{layer}.mlp", "expert"].float(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_gives_the_same(implementation):
    model = tiny("mixtral", **MODELS["mixtral"])
    expected = by_hand(model, batches_of(model), 0)
    model.set_experts_implementation(implementation)
    found = importance_of(model, batches_of(model))["model.layers.0.mlp", "expert"]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_router_weights_that_multiply_the_inputs():
    model = tiny("llama4_text", num_hidden_layers=2, interleave_moe_layer_step=2, num_local_experts=4, head_dim=8)
    batches = batches_of(model)
    found = importance_of(model, batches)["model.layers.1.feed_forward", "expert"]
    block = model.get_submodule("model.layers.1.feed_forward")
    seen = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in batches:
        model(**batch)
    values = [[] for _ in found]
    for token in torch.cat(seen):
        logits = block.router.weight @ token
        j = int(logits.argmax())
        gate, up = (torch.sigmoid(logits[j]) * token @ block.experts.gate_up_proj[j]).chunk(2)
        values[j].append(float((up * functional.silu(gate) @ block.experts.down_proj[j]).norm()))
    expected = torch.tensor([sum(v) / max(len(v), 1) for v in values])
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-7)


def test_a_channel_counts_with_the_mean_norm_of_what_it_adds():
    model = tiny("qwen2_moe", **MODELS["qwen2_moe"])
    name = "model.layers.1.mlp.shared_expert"
    found = importance_of(model, batches_of(model))[name, "mlp"]
    projection = model.get_submodule(f"{name}.down_proj")
    seen = []
    projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1])))
    for batch in batches_of(model):
        model(**batch)
    outputs = torch.cat(seen)[:, None, :] * projection.weight.detach()
    torch.testing.assert_close(found.float(), outputs.norm(dim=1).mean(dim=0), rtol=1e-4, atol=1e-7)


def test_in_the_table_the_experts_of_a_layer_have_a_mean_score_of_1():
    model = tiny("mixtral", **MODELS["mixtral"])
    config = replace(reap_config(), normalize="default", limits=lit_prune.Limits(min_fraction=0.0))
    group_sets, statistics = calibrated(model, batches_of(model), config)
    table, _ = lit_prune.make_plan(model, group_sets, statistics, config)
    for position, (_, kind) in enumerate(table.keys):
        rows = slice(table.offsets[position], table.offsets[position + 1])
        if kind == "expert":
            assert table.score[rows].mean() == pytest.approx(1)


def test_the_expert_that_adds_least_leaves_and_the_router_is_a_softmax_over_the_others():
    model = tiny("mixtral", **MODELS["mixtral"]).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[3] *= 1e-3
    router = model.model.layers[0].mlp.gate.weight.detach().clone()
    limits = lit_prune.Limits(kinds=["expert"], min_fraction=0.0)
    config = lit_prune.PruningConfig("reap", 0.15, ratio_of="prunable", limits=limits, repair=None, iterations=1)
    _, plan = lit_prune.prune(model, batches_of(model), lambda b: model(**b).loss, config)
    assert [e.kept for e in plan.group_entries if e.kind == "expert"] == [(0, 1, 2, 4)] * 2
    states = torch.randn(6, router.shape[1])
    _, weights, index = model.model.layers[0].mlp.gate(states)
    whole = torch.softmax((states @ router.T).index_fill(1, torch.tensor([3]), -torch.inf), dim=-1)
    top, _ = whole.topk(2)
    torch.testing.assert_close(weights, top / top.sum(dim=-1, keepdim=True))
    assert int(index.max()) == 3
