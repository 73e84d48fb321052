"""The 70B recipe, in shape on the meta device, and the figures of docs/fsdp.md against the program that counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from common import SHAPES
from fsdp_budget import budget, counted, recipe, table, totals
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune import Limits, PruningPlan, apply_plan, find_group_sets
from lit_prune.groups import count_parameters
from lit_prune.ranking.selection import parameter_budget, select
from lit_prune.ranking.table import GroupTable
from lit_prune.repair.regression import ridge, unexplained_share

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
    ends = total - 80 * block
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

    page = (ROOT / "docs" / "fsdp.md").read_text()
    for count in (total, block, ends, left):
        assert f"{count:,}" in page, count
    assert f"{8 * left / ranks / 1e9:.2f} GB of state" in page
    saved = json.loads((ROOT / "docs" / "fsdp_budget.json").read_text())
    numbers = saved["bytes"]
    assert (numbers["parameters"], numbers["block"], numbers["fsdp_ends"]) == (total, block, 2 * (total - 80 * block))
    assert numbers["weights"] == 2 * total // ranks


def test_the_page_shows_what_the_program_wrote_and_the_recipe_fits_one_card():
    page = (ROOT / "docs" / "fsdp.md").read_text()
    saved = json.loads((ROOT / "docs" / "fsdp_budget.json").read_text())
    read = recipe()
    assert [saved[k] for k in ("ranks", "tokens", "batches")] == [read[k] for k in ("ranks", "tokens", "batches")]
    assert table(saved) in page
    worked_out = ("weights", "gradients", "moments", "fsdp_blocks", "fsdp_ends", "block_whole", "refitted", "surgery")
    for name in (*worked_out, "surgery_moments"):
        assert f"{saved['bytes'][name] / 1e9:.2f}" in page, name
    # the allocator's fragments, libraries and the CUDA context need the rest
    assert all(middle < 70e9 for _, _, middle in totals(saved["bytes"]).values())


def test_a_solve_of_the_widest_consumer_takes_what_the_page_says():
    width, outputs = 28672, 8192
    gram, cross = (torch.zeros(n, width, device="meta") for n in (width, outputs))
    weight = torch.zeros(outputs, width, dtype=torch.bfloat16, device="meta")
    solving = counted(lambda: ridge(gram, cross, weight, 0.1))
    # the factor in float64, the solution in float32, and some hundred outputs at a time
    assert 8 * width**2 < solving < 8 * width**2 + 4 * outputs * width + 1e9
    assert f"{(4 + 8) * width**2 / 1e9:.2f} GB" in (ROOT / "docs" / "fsdp.md").read_text()
    measuring = counted(lambda: unexplained_share(gram, weight, torch.arange(width)[:, None], 0.1))
    assert measuring < 10.7 * width**2


@pytest.mark.slow
def test_the_program_counts_what_the_page_says():
    saved = json.loads((ROOT / "docs" / "fsdp_budget.json").read_text())
    for name, value in budget(**recipe())["bytes"].items():
        assert value == pytest.approx(saved["bytes"][name], rel=0.02), name


def test_a_small_shape_runs_through_every_phase_of_the_program(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", (64, 96, 4, 4, 2, 128))
    read = {**recipe(), "tokens": 16, "batches": 2}
    found = budget("small", **read)
    assert set(found["bytes"]) == set(json.loads((ROOT / "docs" / "fsdp_budget.json").read_text())["bytes"])
    assert all(value > 0 for value in found["bytes"].values())
