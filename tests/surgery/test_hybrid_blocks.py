"""Whole blocks of hybrids: one that counts the tokens of the cache stays, or nothing could be generated."""

from __future__ import annotations

import pytest
import torch
from architecture_cases import CASES, Case, output_of

from conftest import skipping, tiny
from lit_prune import GroupTable, Limits, PlanError, PruningPlan, apply_plan, find_group_sets
from lit_prune.groups import BLOCK
from lit_prune.ranking.selection import select

HYBRIDS = ("Qwen3.5", "Nemotron-H", "Granite 4 hybrid", "LFM2", "LFM3", "OLMo Hybrid", "Kimi Linear", "Bailing hybrid")


def case_of(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_keeps_its_most_important_block_with_attention(name):
    case = case_of(name)
    model = case.build()
    sets = find_group_sets(model, blocks=True)
    counting = [s for s in sets if s.counts_tokens]
    importance = [torch.full((s.size,), 0.1 * s.layer if s.counts_tokens else 10.0) for s in sets]
    table = GroupTable.build(sets, importance)
    budget = sum(s.cost for s in sets if s.kind == BLOCK) - counting[-1].cost
    table.kept = select(table, budget, Limits(kinds=(BLOCK,), min_fraction=0))
    plan = PruningPlan.from_kept(sets, table.kept_groups())
    assert [list(e.kept) for e in plan.blocks] == [[counting[-1].layer]]
    oracle = skipping(case.build(), plan.removed_blocks)
    apply_plan(model, plan)
    batch = case.batch(0)
    with torch.no_grad():
        torch.testing.assert_close(output_of(model, batch), output_of(oracle, batch))
    ids = batch["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, oracle.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_plan_that_takes_all_blocks_with_attention_is_refused_before_any_work(name):
    case = case_of(name)
    model = case.build()
    sets = find_group_sets(model, blocks=True)
    plan = PruningPlan.from_kept(sets, [[] if s.counts_tokens else range(s.size) for s in sets])
    before = output_of(model, case.batch(0))
    with pytest.raises(PlanError, match=r"keeps the blocks \[.*\] of .*, and none of \[.*\]: .*how many tokens"):
        apply_plan(model, plan)
    assert torch.equal(output_of(model, case.batch(0)), before)


@pytest.mark.parametrize("name", ["llama", "mamba2", "gemma3_text"])
def test_where_all_blocks_are_alike_any_may_leave(name):
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    more = {"mamba2": {"state_size": 5, "expand": 2, "chunk_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}}
    model = tiny(name, "eager", num_hidden_layers=3, **more.get(name, kinds if name == "gemma3_text" else {}))
    assert not any(s.counts_tokens for s in find_group_sets(model, blocks=True))
