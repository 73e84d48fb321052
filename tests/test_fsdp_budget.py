"""The 70B recipe, in shape on the meta device, and the figures of docs/fsdp.md."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune import Limits, PruningPlan, apply_plan, find_group_sets
from lit_prune.groups import count_parameters
from lit_prune.ranking.selection import parameter_budget, select
from lit_prune.ranking.table import GroupTable

ROOT = Path(__file__).resolve().parent.parent


def test_the_70b_model_is_cut_in_shape_and_the_budget_is_what_the_page_says():
    recipe = yaml.safe_load((ROOT / "configs" / "llama3_70b_fsdp.yaml").read_text())
    ranks = recipe["trainer"]["strategy"]["init_args"]["data_parallel_size"]
    assert ranks == recipe["trainer"]["devices"] * recipe["trainer"]["num_nodes"]
    pruning = recipe["pruning"]
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    total = count_parameters(model)
    block = count_parameters(model.model.layers[0])
    ends = count_parameters(model.model.embed_tokens) + count_parameters(model.lm_head)
    group_sets = find_group_sets(model)
    generator = torch.Generator().manual_seed(0)
    table = GroupTable.build(group_sets, [torch.rand(s.size, generator=generator) * s.cost for s in group_sets])
    limits = Limits(multiple_of={"mlp": pruning["mlp_multiple_of"]})
    table.kept = select(table, parameter_budget(pruning["pruning_ratio"], "all", total, 0), limits, {})
    plan = PruningPlan.from_kept(group_sets, [k.tolist() for k in table.kept_groups()])
    apply_plan(model, plan)
    left = count_parameters(model)
    assert left == total - table.removed_cost
    assert abs(left / total - 0.8) < 1e-3
    for layer in model.model.layers:
        assert layer.mlp.up_proj.out_features % 128 == 0
        assert layer.self_attn.q_proj.weight.shape[0] == 8 * layer.self_attn.k_proj.weight.shape[0]

    assert sum(s.size * len(s.slices) for s in group_sets) == 80 * (8 * 4 + 28672 * 3)
    page = (ROOT / "docs" / "fsdp.md").read_text()
    for count in (total, block, ends, left):
        assert f"{count:,}" in page, count
    weights = 2 * total / ranks
    tokens = pruning["calibration_batches"] * recipe["data"]["block_size"]
    for size in (
        weights,
        2 * weights,
        4 * weights,
        3 * 2 * block,
        2 * 2 * ends,
        80 * 2048 * 8192 * 2,
        2 * 2048 * 128256 * 4,
        80 * (8 * 4 + 28672 * 3) * 4,
        80 * (6 * 8192 + 28672) * 3 * 8,
        8 * total,
        2 * 2 * block,
        5 * tokens * 8192 * 2,
        28 * 28672**2,
        20 * 8192 * 28672,
        3 * weights,
        8 * left / ranks,
    ):
        assert f"{size / 1e9:.2f}" in page, size / 1e9
