"""Whole blocks: what is left computes what the dense model does whose blocks are passed over."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from conftest import skipping, tiny, uneven_kept
from lit_prune import (
    BudgetError,
    GroupTable,
    Limits,
    PlanError,
    PruningConfig,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    calibrate,
    find_group_sets,
    get_plan,
    make_plan,
    repair,
)
from lit_prune.groups import BLOCK, count_parameters
from lit_prune.ranking.candidates import masked
from lit_prune.ranking.importance import group_importance
from lit_prune.ranking.registry import get_criterion
from lit_prune.ranking.selection import select

FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gemma3_text": {
        "sliding_window": 4,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {
        "sliding_window": 4,
        "use_sliding_window": True,
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "olmo3": {"sliding_window": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
}


def deep(name: str = "llama", **overrides: object) -> nn.Module:
    return tiny(name, **{"num_hidden_layers": 4, **FAMILIES[name], **overrides})


def without(model: nn.Module, layers: list[int]) -> PruningPlan:
    """The plan that takes whole layers out."""
    group_sets = find_group_sets(model, blocks=True)
    gone = [s.kind == BLOCK and s.layer in layers for s in group_sets]
    return PruningPlan.from_kept(
        group_sets, [[] if g else range(s.size) for g, s in zip(gone, group_sets, strict=True)]
    )


def weakened(model: nn.Module, layer: int) -> nn.Module:
    """The model, one of whose blocks adds little."""
    with torch.no_grad():
        for name, parameter in stack(model)[layer].named_parameters():
            if re.search("o_proj|down_proj|c_proj", name):
                parameter.mul_(0.1)
    return model


def stack(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_a_block_equals_the_dense_one_that_skips_it(name, tokens):
    model = deep(name)
    plan, config = without(model, [0, 2]), model.config
    oracle = skipping(model, plan.removed_blocks)
    leaving = sum(p.numel() for layer in (0, 2) for p in stack(model)[layer].parameters())
    assert sum(s.cost for s in find_group_sets(model, blocks=True) if s.kind == BLOCK and s.layer in (0, 2)) == leaving
    before = count_parameters(model)
    apply_plan(model, plan)
    assert torch.equal(model(tokens).logits, oracle(tokens).logits)
    assert before - count_parameters(model) == leaving
    assert (len(stack(model)), model.config.num_hidden_layers, config.num_hidden_layers) == (2, 2, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert torch.equal(cached, oracle.generate(tokens, use_cache=False, **options))
    assert len(model(tokens, use_cache=True).past_key_values) == 2


def test_only_those_who_ask_find_blocks(tokens):
    model = deep()
    assert not any(s.kind == BLOCK for s in find_group_sets(model))
    sets = find_group_sets(model, blocks=True)
    assert [(s.layer, s.size) for s in sets if s.kind == BLOCK] == [(i, 1) for i in range(4)]


def test_blocks_that_share_weights_cannot_leave():
    model = deep()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[3].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="shared"):
        find_group_sets(model, blocks=True)


def test_two_cuts_compose_to_one(tokens):
    model, other = deep(), deep()
    sets = find_group_sets(model, blocks=True)
    kept = [[] if s.kind == BLOCK and s.layer == 1 else k for s, k in zip(sets, uneven_kept(sets), strict=True)]
    kept = [[0] if s.kind == BLOCK and s.layer != 1 else k for s, k in zip(sets, kept, strict=True)]
    first = PruningPlan.from_kept(sets, kept)
    assert not any("layers.1." in e.name for e in first.entries)
    apply_plan(model, first)
    sets = find_group_sets(model, blocks=True)
    assert [s.size for s in sets if s.kind == "mlp"] == [
        len(k)
        for s, k in zip(find_group_sets(other, blocks=True), kept, strict=True)
        if s.kind == "mlp" and s.layer != 1
    ]
    kept = [[] if s.kind == BLOCK and s.layer == 0 else list(range(s.size))[1:] or [0] for s in sets]
    second = PruningPlan.from_kept(sets, kept)
    apply_plan(model, second)
    composed = get_plan(model)
    assert composed == first.compose(second)
    assert composed.removed_blocks == ("model.layers.0", "model.layers.1")
    assert PruningPlan.from_dict(composed.to_dict()).digest() == composed.digest()
    apply_plan(other, composed)
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == [0, 1]
    # a plan that was made for four blocks does not take another one of two
    with pytest.raises(PlanError, match="has 2 groups, the plan was made for 4"):
        apply_plan(model, without(deep(), [0]))


def test_a_plan_leaves_at_least_one_block():
    model = deep()
    with pytest.raises(PlanError, match="keeps 0 of the 4"):
        apply_plan(model, without(model, [0, 1, 2, 3]))


@pytest.mark.parametrize("momentum", [torch.optim.AdamW, torch.optim.SGD])
def test_the_optimizer_goes_on_with_what_is_left(momentum, tokens, loss_of):
    model = deep()
    oracle = copy.deepcopy(model)
    options = {"lr": 0.01} | ({"momentum": 0.9} if momentum is torch.optim.SGD else {})
    optimizers = [momentum([{"params": list(m.parameters())}], **options) for m in (model, oracle)]

    def step(m, optimizer):
        optimizer.zero_grad()
        loss_of(m)(tokens).backward()
        optimizer.step()

    step(model, optimizers[0])
    step(oracle, optimizers[1])
    gone = set(stack(model)[1].parameters())
    apply_plan(model, without(model, [1]), [optimizers[0]])
    held = {p for group in optimizers[0].param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert not gone & (held | optimizers[0].state.keys())
    oracle.zero_grad(set_to_none=True)
    stack(oracle)[1].register_forward_hook(lambda m, args, output: args[0])
    step(model, optimizers[0])
    step(oracle, optimizers[1])
    expected = oracle.state_dict()
    for name, value in model.state_dict().items():
        now = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + (int(m[1]) > 0)}", name)
        torch.testing.assert_close(value, expected[now], msg=name)


class _Uncopiable:
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


def test_a_failing_removal_leaves_everything_as_it_was(tokens, loss_of):
    model = deep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model)(tokens).backward()
    optimizer.step()
    state, logits = copy.deepcopy(optimizer.state_dict()), model(tokens).logits
    model.config.held = _Uncopiable()
    sets = find_group_sets(model, blocks=True)
    kept = [[] if s.kind == BLOCK and s.layer == 1 else k for s, k in zip(sets, uneven_kept(sets), strict=True)]
    with pytest.raises(RuntimeError, match="no copies"):
        apply_plan(model, PruningPlan.from_kept(sets, kept), [optimizer])
    assert torch.equal(model(tokens).logits, logits)
    assert get_plan(model) is None
    assert (len(stack(model)), model.config.num_hidden_layers) == (4, 4)
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == [0, 1, 2, 3]
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())


def statistics_of(model, criterion, batches, loss_of, **options):
    sets = find_group_sets(model, blocks=True)
    config = PruningConfig(criterion, repair=None, **options)
    collected = calibrate(model, sets, batches, loss_of(model), config)
    criterion = get_criterion(criterion)
    found = group_importance(criterion, dict(model.named_parameters()), sets, collected, normalize=criterion.normalize)
    return sets, found


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_fisher_of_a_block_is_that_of_a_mask_of_what_it_adds(name, batches, loss_of):
    model = deep(name)
    sets, found = statistics_of(model, "fisher", batches, loss_of)
    found = {s.layer: float(i) for s, i in zip(sets, found, strict=True) if s.kind == BLOCK}
    masks = torch.ones(4, requires_grad=True)
    for layer, block in enumerate(stack(model)):

        def hook(module, args, output, layer=layer):
            hidden = output[0] if isinstance(output, tuple) else output
            scaled = args[0] + masks[layer] * (hidden - args[0])
            return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

        block.register_forward_hook(hook)
    expected = torch.zeros(4)
    samples = [sample for batch in batches for sample in batch.split(1)]
    for sample in samples:
        expected += torch.autograd.grad(loss_of(model)(sample), masks)[0].square() / len(samples)
    torch.testing.assert_close(torch.tensor([found[i] for i in range(4)]), expected, rtol=1e-4, atol=0)


def test_fisher_of_blocks_through_checkpointed_activations(batches, loss_of):
    plain = statistics_of(deep(), "fisher", batches, loss_of)[1]
    for reentrant in (False, True):
        model = deep()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model.train()
        for a, b in zip(statistics_of(model, "fisher", batches, loss_of)[1], plain, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("criterion", ["taylor", "second_order", "magnitude", "random"])
def test_a_block_is_as_important_as_what_is_in_it(criterion, batches, loss_of):
    sets, found = statistics_of(deep(), criterion, batches, loss_of)
    for block, total in zip(sets, found, strict=True):
        if block.kind == BLOCK:
            inside = [i for s, i in zip(sets, found, strict=True) if s.block == block.name and s.kind != BLOCK]
            assert len(inside) == 2
            torch.testing.assert_close(total[0], sum(i.sum() for i in inside))


def test_channels_of_experts_count_with_their_experts(batches, loss_of):
    sets, found = statistics_of(deep("mixtral"), "magnitude", batches, loss_of)
    by_key = dict(zip([s.key for s in sets], found, strict=True))
    prefix = "model.layers.1"
    expected = by_key[f"{prefix}.self_attn", "attention"].sum() + by_key[f"{prefix}.mlp", "expert"].sum()
    torch.testing.assert_close(by_key[prefix, BLOCK][0], expected)


def test_a_normalised_criterion_compares_blocks_over_the_model(batches, loss_of):
    model = deep()
    sets, found = statistics_of(model, "wanda", batches, loss_of)
    raw = group_importance(
        get_criterion("wanda"),
        dict(model.named_parameters()),
        sets,
        calibrate(model, sets, batches, loss_of(model), PruningConfig("wanda", repair=None)),
    )
    blocks = [p for p, s in enumerate(sets) if s.kind == BLOCK]
    scores = torch.cat([found[p] / sets[p].cost for p in blocks])
    before = torch.cat([raw[p] / sets[p].cost for p in blocks])
    torch.testing.assert_close(scores, before / before.mean())


def random_table(seed: int, layers: int = 4) -> GroupTable:
    """Attention and MLP groups of some layers, and a block around each."""
    rng = np.random.default_rng(seed)
    keys, sizes, cost, importance = [], [], [], []
    for layer in range(layers):
        groups = {"attention": (5, 30), "mlp": (20, 7)}
        spread = rng.uniform(0.2, 3)
        values = {k: spread * rng.uniform(size=n) * c for k, (n, c) in groups.items()}
        keys.append((f"model.layers.{layer}", BLOCK))
        sizes.append(1)
        cost.append([sum(n * c for n, c in groups.values()) + 11])
        importance.append([rng.uniform(0.1, 1.2) * sum(v.sum() for v in values.values())])
        for kind, (n, c) in groups.items():
            keys.append((f"model.layers.{layer}.{kind}", kind))
            sizes.append(n)
            cost.append([c] * n)
            importance.append(values[kind])
    return GroupTable(
        keys=tuple(keys),
        layers=np.repeat(np.arange(layers), 3),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        importance=np.concatenate(importance),
        cost=np.concatenate(cost).astype(np.int64),
        kept=np.ones(sum(sizes), dtype=bool),
    )


def one_by_one(table: GroupTable, budget: int, floors: dict[str, int]) -> np.ndarray:
    """Selection as a person would do it: look at the rows in the order of their scores and take what fits."""
    kept, blocked, left = np.ones(len(table), dtype=bool), set(), budget
    blocks = [r for r in range(len(table)) if table.kind_of_row[r] == BLOCK]
    may_leave = sorted(blocks, key=lambda r: table.score[r])[: len(blocks) - 1]
    for row in np.argsort(table.score, kind="stable"):
        name, kind = table.keys[table.set_of_row[row]]
        mine = table.set_of_row == table.set_of_row[row]
        if kind == BLOCK:
            inside = np.array([table.keys[s][0].startswith(f"{name}.") for s in table.set_of_row])
            cost = table.cost[row] - table.cost[inside & ~kept].sum()
            if row in may_leave and cost <= left:
                kept[row] = kept[inside] = False
                left -= cost
        elif kept[row] and name not in blocked and kept[mine].sum() > floors[kind]:
            if table.cost[row] <= left:
                kept[row] = False
                left -= table.cost[row]
            else:
                blocked.add(name)
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_selection_with_blocks_is_that_of_one_row_after_the_other(seed):
    table = random_table(seed)
    limits = Limits(min_groups=1, min_fraction=0, kinds=("attention", "mlp", BLOCK))
    for budget in (100, 300, 500, 800):
        table.kept = select(table, budget, limits)
        expected = one_by_one(table, budget, {"attention": 1, "mlp": 1})
        assert table.kept.tolist() == expected.tolist()
        assert table.removed_cost <= budget


def test_limits_of_blocks():
    table = random_table(0)
    blocks = table.kind_of_row == BLOCK
    only = Limits(min_groups=1, min_fraction=0, kinds=(BLOCK,))
    table.kept = select(table, 903, only)
    assert table.kept[blocks].sum() == 1
    assert table.removed_cost == 3 * table.cost[blocks][0]
    inside = table.block_of_row >= 0
    assert (table.kept[inside] == table.kept[table.block_of_row[inside]]).all()
    assert select(table, 602, Limits(min_fraction=0.5, kinds=(BLOCK,)))[blocks].sum() == 2
    with pytest.raises(BudgetError, match="only 602"):
        select(table, 700, Limits(min_fraction=0.5, kinds=(BLOCK,)))
    lowest = int(np.argmin(table.score[blocks]))
    for protect in (lowest, f"layers.{lowest}.mlp"):
        assert select(table, 400, Limits(protect=(protect,), min_fraction=0, kinds=(BLOCK,)))[blocks][lowest]
    # floors of the number of blocks are fractions of what there was before
    assert select(table, 301, Limits(min_fraction=0.5, kinds=(BLOCK,)), {("model.layers", BLOCK): 6})[blocks].sum() == 3


def test_uniform_widths_of_the_blocks_that_stay(loss_of, batches):
    model = weakened(deep(), 2)
    sets = find_group_sets(model, blocks=True)
    limits = Limits(uniform=True, min_fraction=0.5, kinds=("attention", "mlp", BLOCK))
    config = PruningConfig("fisher", 0.3, ratio_of="prunable", repair=None, limits=limits)
    _, plan = make_plan(model, sets, calibrate(model, sets, batches, loss_of(model), config), config)
    assert plan.removed_blocks
    for kind in ("attention", "mlp"):
        widths = {len(e.kept) for e in plan.entries if e.kind == kind}
        assert len(widths) <= 1


@pytest.mark.parametrize(("name", "ratio"), [("llama", 0.35), ("llama", 0.5), ("mixtral", 0.5)])
def test_the_budget_counts_what_leaves_with_a_block_once(name, ratio, batches, loss_of):
    model = weakened(deep(name), 1)
    sets = find_group_sets(model, blocks=True)
    config = PruningConfig(
        "fisher", ratio, repair=None, ratio_of="prunable", limits=Limits(kinds=tuple({s.kind: 0 for s in sets}))
    )
    config.check(model, sets)
    table, plan = make_plan(model, sets, calibrate(model, sets, batches, loss_of(model), config), config)
    budget, before = config.budget_of_parameters(model, sets), count_parameters(model)
    assert plan.removed_blocks
    oracle = copy.deepcopy(model)
    apply_plan(model, plan)
    assert count_parameters(model) == plan.info["parameters_after"]
    assert 0 <= budget - (before - count_parameters(model)) < 0.05 * budget
    if name == "llama":
        assert table.removed_cost == before - count_parameters(model)
    with masked(oracle, sets, plan):
        silenced = oracle(batches[0]).logits
    if name == "llama":
        torch.testing.assert_close(model(batches[0]).logits, silenced)
    assert not torch.allclose(oracle(batches[0]).logits, silenced)


def test_later_cuts_name_blocks_as_they_were_in_the_dense_model(batches, loss_of):
    model = deep()
    apply_plan(model, without(model, [0]))
    sets = find_group_sets(model, blocks=True)
    limits = Limits(kinds=("mlp", BLOCK), protect=(3,))
    config = PruningConfig("magnitude", 0.2, repair=None, ratio_of="prunable", limits=limits)
    table, plan = make_plan(model, sets, None, config)
    assert sorted(set(table.layers.tolist())) == [1, 2, 3]
    assert ("model.layers.3.mlp", "mlp") in table.keys
    assert not any(e.name.startswith("model.layers.2.") for e in plan.group_entries)
    apply_plan(model, plan)
    assert not any(e.name.startswith("model.layers.3.") for e in get_plan(model).group_entries)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_repair_makes_up_for_a_block_that_left(name, loss_of):
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(0, 64, (8, 24), generator=generator) for _ in range(6)]
    model = weakened(deep(name), 1)
    dense, plan = copy.deepcopy(model), without(model, [1])
    sets, config = find_group_sets(model, blocks=True), PruningConfig("magnitude")
    plan, weights = repair(model, sets, plan, None, batches, loss_of(model), config)
    assert weights
    assert not any(f".{layer}." in n for n in weights for layer in (0, 1))

    @torch.no_grad()
    def error(m):
        return sum(float((m(b).logits - dense(b).logits).square().sum()) for b in batches)

    plain, repaired = copy.deepcopy(model), model
    apply_plan(plain, plan)
    apply_plan(repaired, plan, weights=weights)
    assert error(repaired) < 0.9 * error(plain)
