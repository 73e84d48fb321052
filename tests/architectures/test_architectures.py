"""What the conformance suite does not reach: refusals, special parts, caches and masks of adapted modules, undoing."""

from __future__ import annotations

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from architecture_cases import CASES, causal_batch, hugging, loss_of, output_of, random_ids
from own_models import MyGPT, MyResNet, TextClassifier
from torch import nn
from torch.utils.data import DataLoader
from transformers import StaticCache

from conftest import tiny, uneven_kept, unsettled, zeroed
from lit_prune import (
    MLP,
    Architecture,
    Attention,
    BudgetError,
    GroupTable,
    Limits,
    MultiheadAttention,
    PruningConfig,
    PruningError,
    PruningPlan,
    Traced,
    UnsupportedModelError,
    apply_plan,
    calibrate,
    find_group_sets,
    find_model,
    get_plan,
    make_plan,
    register_architecture,
    repair,
    verify_architecture,
)
from lit_prune.callbacks import StructuredPruning
from lit_prune.io.huggingface import load_pruned, save_pruned
from lit_prune.ranking.selection import select

CASE = {case.name: case for case in CASES}


def emptied(model, layers=(0,), kinds=("attention", "mlp")):
    group_sets = find_group_sets(model)
    chosen = [s.layer in layers and s.kind in kinds and not s.minimum for s in group_sets]
    kept = [[] if gone else list(range(s.size)) for s, gone in zip(group_sets, chosen, strict=True)]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


# what is refused, and by which name


def test_an_unknown_class_says_where_detection_stopped():
    model = hugging("rwkv")("eager")
    with pytest.raises(
        UnsupportedModelError,
        match=r"stopped at 'rwkv\.blocks\.0' \(RwkvBlock, one of 3\).*attention: RwkvSelfAttention",
    ):
        find_group_sets(model)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 4}, "ALiBi and heads that share"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("gpt_bigcode", {"n_head": 4, "multi_query": False}, "multi_query=False"),
    ],
)
def test_options_that_no_description_covers_are_refused(model_type, options, message):
    with pytest.raises(UnsupportedModelError, match=message):
        find_group_sets(hugging(model_type, **options)("eager"))


@pytest.mark.parametrize(("name", "attention"), [("BLOOM", "eager"), ("MPT", "eager"), ("Falcon, ALiBi", "sdpa")])
def test_slopes_of_alibi_go_with_their_heads_where_batches_are_padded(name, attention):
    """A heads' slope is a matter of which head it was; pruned twice, so that heads are counted from the dense model."""
    model = CASE[name].build(attention)
    dense = copy.deepcopy(model)
    for kept in ([0, 2, 3], [1, 2]):
        group_sets = [s for s in find_group_sets(model) if s.kind == "attention"]
        apply_plan(model, PruningPlan.from_kept(group_sets, [kept for _ in group_sets]))
    group_sets = find_group_sets(dense)
    dense = zeroed(dense, [[2, 3] if s.kind == "attention" else list(range(s.size)) for s in group_sets])
    ids, mask = random_ids(0), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        found, expected = (m(input_ids=ids, attention_mask=mask).logits[:, 4:] for m in (model, dense))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    assert torch.equal(model.generate(ids, num_beams=3, **options), dense.generate(ids, num_beams=3, **options))


def test_a_part_that_no_alternative_describes_is_named():
    model = CASE["Qwen3-MoE"].build()
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp \(Sequential\).*one of \['gate_proj', 'experts'\]; it has \['0'\]"
    ):
        find_group_sets(model)


def test_experts_in_a_list_are_named():
    model = CASE["Mixtral"].build()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts \(ModuleList\) .*'gate_up_proj'; it has \['0'\]"):
        find_group_sets(model)


class Holder(nn.Module):
    def __init__(self, attention) -> None:
        super().__init__()
        self.attention = attention


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.MultiheadAttention(8, 2, kdim=4), "kdim=4"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn=True"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv=True"),
        (nn.Linear(8, 8), r"attention is a Linear; expected nn\.MultiheadAttention"),
    ],
)
def test_attention_of_torch_that_is_laid_out_otherwise_is_refused(module, message):
    register_architecture(Architecture("holder", ("Holder",), (MultiheadAttention("attention"),)))
    with pytest.raises(UnsupportedModelError, match=message):
        find_group_sets(Holder(module))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def test_convolutions_in_groups_lose_channels_unless_they_are_ignored():
    trace = {"example_inputs": lambda: (torch.zeros(1, 3, 6, 6),)}
    register_architecture(Architecture("depthwise", ("Depthwise",), (Traced(**trace),)))
    torch.manual_seed(0)
    model, images = unsettled(Depthwise()), torch.randn(2, 3, 6, 6)
    (group_set,) = find_group_sets(model)
    expected = zeroed(model, [[0, 2]])(images)
    apply_plan(model, PruningPlan.from_kept([group_set], [[0, 2]]))
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert model.second.groups == 2
    register_architecture(Architecture("depthwise", ("Depthwise",), (Traced(**trace, ignored=("first", "second")),)))
    assert find_group_sets(Depthwise()) == []


class DenseBlocks(nn.Module):
    """As in a DenseNet: every layer reads, by one norm, what all those before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 10, 14))
        self.layers = nn.ModuleList(nn.Conv2d(n, 4, 3, padding=1) for n in (6, 10))
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = torch.cat([x, layer(norm(x).relu())], dim=1)
        return self.head(self.norms[-1](x).relu().mean(dim=(2, 3)))


def test_norms_over_what_several_layers_gave_lose_the_channels_of_each():
    trace = Traced(example_inputs=lambda: (torch.zeros(1, 3, 6, 6),))
    register_architecture(Architecture("dense-blocks", (DenseBlocks,), (trace,)))
    torch.manual_seed(0)
    model, images = unsettled(DenseBlocks()), torch.randn(2, 3, 6, 6)
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    for kept, sizes in (([[0, 2, 3, 5], [0, 1, 3], [1, 2]], [6, 4, 4]), ([[1, 3], [0, 2], [1]], [4, 3, 2])):
        group_sets = find_group_sets(model)
        assert [s.size for s in group_sets] == sizes
        expected = zeroed(model, kept)(images)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        plan = PruningPlan.from_kept(group_sets, kept)
        with pytest.raises(PruningError, match="adds a bias"):
            apply_plan(model, PruningPlan(plan.entries, biases=("norms.0",)))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        apply_plan(model, plan)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert [len(n.running_mean) for n in model.norms] == [n.num_features for n in model.norms] == [2, 4, 5]


def test_group_sets_of_a_model_inside_are_refused_and_the_module_itself_is_searched():
    case = CASE["Llama in a LightningModule"]
    model = case.build()
    group_sets = find_group_sets(model)
    config = PruningConfig("magnitude", 0.2)
    with pytest.raises(UnsupportedModelError, match=r"this Classifier does not have.*find_model"):
        make_plan(model, group_sets, None, config)
    with pytest.raises(UnsupportedModelError, match=r"this Classifier does not have"):
        calibrate(model, group_sets, [case.batch(0)], lambda b: loss_of(model, b), PruningConfig("taylor"))
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    assert get_plan(find_model(model)[1]) is not None


# what selection knows


def test_selection_keeps_as_many_experts_as_a_token_goes_to_and_empties_only_what_can_be_empty():
    model = CASE["Mixtral"].build()
    group_sets = find_group_sets(model)
    table = GroupTable.build(group_sets, [torch.rand(s.size) for s in group_sets])
    limits = Limits(min_groups=0, min_fraction=0)
    floor = dict(zip((s.key for s in group_sets), limits.floor(table), strict=True))
    assert {kind: n for (_, kind), n in floor.items()} == {"attention": 0, "mlp": 1, "expert": 2}
    with pytest.raises(BudgetError):
        select(table, int(table.cost.sum()), limits)


def test_experts_stay_where_the_loss_of_the_routers_needs_all_of_them():
    model = hugging("mixtral", num_hidden_layers=2, num_local_experts=4, output_router_logits=True)("eager")
    assert {s.minimum for s in find_group_sets(model) if s.kind == "expert"} == {4}
    emptied(model, (0,), ("attention",))
    loss_of(model, causal_batch(0)).backward()


def test_what_leaves_with_two_sets_is_counted_once():
    model = CASE["Mixtral"].build()
    group_sets = find_group_sets(model)
    before = sum(p.numel() for p in model.parameters())
    config = PruningConfig("random", 0.4, limits=Limits(min_fraction=0))
    table, plan = make_plan(model, group_sets, None, config)
    apply_plan(model, plan)
    removed = before - sum(p.numel() for p in model.parameters())
    assert {e.kind for e in plan.entries} >= {"mlp", "expert"}
    assert table.removed_cost > removed
    assert 0 <= config.budget_of_parameters(CASE["Mixtral"].build(), group_sets) - removed < max(table.cost)


# layers without heads


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "GPT-NeoX / Pythia", "OPT"])
def test_caches_of_every_kind_go_on_when_layers_have_no_heads(name):
    model = emptied(CASE[name].build(), layers=(0, 2))
    ids = random_ids(4, batch=2, tokens=7)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(padded, model.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_a_layer_without_heads_computes_none_and_waits_for_no_gradient():
    model = emptied(tiny("llama"))
    attention = model.model.layers[0].self_attn
    called = []
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda *_: called.append(1))
    loss_of(model, causal_batch(0)).backward()
    assert not called
    assert {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert not attention.q_proj.weight.requires_grad and attention.q_proj.weight.shape == (0, 32)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT, masked language model"])
@pytest.mark.parametrize("method", ["least_squares", "bias"])
def test_what_is_left_of_a_layer_is_repaired(name, method):
    case = CASE[name]
    model = case.build()
    group_sets = find_group_sets(model)
    batches = [case.batch(seed) for seed in range(6)]
    config = PruningConfig("wanda", 0.1, repair=method)
    forward = partial(loss_of, model)
    statistics = calibrate(model, group_sets, batches, forward, config)
    kept = [[] if (s.layer, s.kind) in ((0, "attention"), (1, "mlp")) else list(range(s.size)) for s in group_sets]
    plan, weights = repair(
        model, group_sets, PruningPlan.from_kept(group_sets, kept), statistics, batches, forward, config
    )
    errors = []
    for new in ({}, weights):
        cut = copy.deepcopy(model)
        apply_plan(cut, plan, weights=new)
        with torch.no_grad():
            errors.append(sum(float((output_of(cut, b) - output_of(model, b)).square().mean()) for b in batches))
    assert weights and errors[1] < errors[0]


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3 / Phi-4", "BERT, masked language model", "Mixtral"])
def test_a_model_with_empty_layers_is_saved_and_pruned_again(tmp_path, name):
    case = CASE[name]
    model, once = emptied(case.build()), case.build()
    save_pruned(model, tmp_path / "model")
    group_sets = find_group_sets(model)
    assert [s.key for s in find_group_sets(load_pruned(tmp_path / "model"))] == [s.key for s in group_sets]
    with torch.no_grad():
        assert torch.equal(output_of(load_pruned(tmp_path / "model"), case.batch(0)), output_of(model, case.batch(0)))
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    apply_plan(once, get_plan(model))
    with torch.no_grad():
        assert torch.equal(output_of(once, case.batch(0)), output_of(model, case.batch(0)))


# adapted modules


@pytest.mark.parametrize(
    "name", [c.name for c in CASES if c.name.startswith(("T5", "nn.", "ResNet", "Mixtral", "Phi", "GPT-2"))]
)
def test_a_failure_undoes_adaptations_and_a_copy_keeps_them(name):
    case = CASE[name]
    model = case.build()
    group_sets = find_group_sets(model)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, case.batch(0)).backward()
    optimizer.step()
    inner = find_model(model)[1]
    classes = {n: (type(m), sorted(vars(m)), sorted(m._buffers)) for n, m in inner.named_modules()}
    with torch.no_grad():
        before = output_of(model, case.batch(0))
    plan = PruningPlan.from_kept(
        group_sets, [[] if not s.minimum else k for s, k in zip(group_sets, uneven_kept(group_sets), strict=True)]
    )
    broken = PruningPlan(
        plan.entries,
        biases=(next(n for n, m in inner.named_modules() if isinstance(m, nn.LayerNorm | nn.Embedding | nn.Conv2d)),),
    )
    with pytest.raises(PruningError, match="adds a bias"):
        apply_plan(model, broken, [optimizer])
    assert {n: (type(m), sorted(vars(m)), sorted(m._buffers)) for n, m in inner.named_modules()} == classes
    with torch.no_grad():
        assert torch.equal(output_of(model, case.batch(0)), before)
    apply_plan(model, plan, [optimizer])
    with torch.no_grad():
        assert torch.equal(output_of(copy.deepcopy(model), case.batch(0)), output_of(model, case.batch(0)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_torchs_attention_mean_what_they_meant(batch_first, training):
    register_architecture(Architecture("holder", ("Holder",), (MultiheadAttention("attention"),)))
    torch.manual_seed(0)
    model = unsettled(Holder(nn.MultiheadAttention(12, 4, batch_first=batch_first))).train(training)
    kept = [[0, 3]]
    dense = zeroed(model, kept).attention
    apply_plan(model, PruningPlan.from_kept(find_group_sets(model), kept))
    small = model.attention
    query, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    causal = torch.ones(5, 7).triu(1).bool()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for options in (
        {},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(5, 7)},
        {"attn_mask": torch.randn(8, 5, 7)},
        {"attn_mask": causal.repeat(8, 1, 1), "key_padding_mask": padding},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": causal},
    ):
        expected, _ = dense(query, memory, memory, **options)
        for need_weights in (True, False):
            found, weights = small(query, memory, memory, need_weights=need_weights, **options)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert weights is None or weights.shape == (2, 5, 7)
    per_head = small(query, memory, memory, average_attn_weights=False)[1]
    torch.testing.assert_close(per_head, dense(query, memory, memory, average_attn_weights=False)[1][:, [0, 3]])
    if batch_first:
        alone = small(query[0], memory[0], memory[0])[0]
        torch.testing.assert_close(alone, dense(query[0], memory[0], memory[0])[0], atol=1e-4, rtol=1e-4)
    own = torch.randn(4, 5, 7)
    of_all = torch.full((2, 4, 5, 7), float("-inf"))
    of_all[:, [0, 3]] = own.unflatten(0, (2, 2))
    torch.testing.assert_close(
        small(query, memory, memory, attn_mask=own)[0], small(query, memory, memory, attn_mask=of_all.flatten(0, 1))[0]
    )
    with pytest.raises(ValueError, match=r"shape \(6, 5, 7\) for a batch of 2; expected .*the 2 that"):
        small(query, memory, memory, attn_mask=torch.zeros(6, 5, 7))


def test_an_encoder_of_torch_is_right_where_only_a_later_layer_lost_heads():
    """Its fused path packs padded batches by looking at the first layer alone."""
    model = unsettled(TextClassifier(64))
    group_sets = find_group_sets(model)
    kept = [[1] if s.kind == "attention" and s.layer == 1 else list(range(s.size)) for s in group_sets]
    dense = zeroed(model, kept).train()
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    ids = random_ids(0)
    ids[:, -3:] = 7
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids)[0], dense(ids)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_flex_attention(name):
    model = hugging(name, head_dim=16, sliding_window=4)("flex_attention").eval()
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    dense = zeroed(model, kept)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    with torch.no_grad():
        torch.testing.assert_close(model(random_ids(0)).logits, dense(random_ids(0)).logits, atol=1e-5, rtol=1e-5)


# descriptions of one's own


def test_a_description_is_verified():
    assert verify_architecture(unsettled(MyGPT(64)), lambda m: m(random_ids(0))[0])[:3] == [
        "h.0",
        "h.0.attn",
        "h.0.mlp",
    ]
    assert "stem.0" in verify_architecture(unsettled(MyResNet()), lambda m: m(torch.ones(1, 3, 8, 8))[0])


def test_the_features_of_a_head_may_be_computed():
    class Computed(MyGPT):
        pass

    attention = Attention(
        path="h.*.attn",
        fused="c_attn",
        output="c_proj",
        head_dim=lambda module: module.n_attn // module.n_head,
        attributes={"n_head": "query_heads", "n_attn": "query_features"},
    )
    register_architecture(Architecture("computed", ("Computed",), (attention, MLP("h.*.mlp", ("c_fc",), "c_proj"))))
    model = unsettled(Computed(64))
    for _ in range(2):
        assert verify_architecture(model, lambda m: m(random_ids(0))[0])
        group_sets = find_group_sets(model)
        apply_plan(model, PruningPlan.from_kept(group_sets, [list(range(1, s.size)) for s in group_sets]))
    assert model.h[0].attn.c_attn.weight.shape == (3 * 16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": "head_width"}, r"h\.0\.attn \(CausalAttention\) .*'head_width'; found None.*lambda"),
        ({"layout": "interleaved"}, r"Without h\.0\.attn \(attention\), group 2 of 4, the output differs"),
        ({"attributes": {"n_head": "query_heads"}}, r"Without h\.0\.attn .*does not run.*an attribute"),
    ],
)
def test_a_wrong_description_is_found_out(change, message):
    class Wrong(MyGPT):
        pass

    right = {"fused": "c_attn", "output": "c_proj", "head_dim": "head_size"}
    attributes = {"attributes": {"n_head": "query_heads", "n_attn": "query_features"}}
    attention = Attention("h.*.attn", **{**right, **attributes, **change})
    register_architecture(Architecture("wrong", ("Wrong",), (attention, MLP("h.*.mlp", ("c_fc",), "c_proj"))))
    with pytest.raises(UnsupportedModelError, match=message):
        verify_architecture(unsettled(Wrong(64)), lambda m: m(random_ids(0))[0])
    for change in ({"layout": "diagonal"},):
        with pytest.raises(ValueError, match="Unknown layout 'diagonal'"):
            Attention("h.*.attn", **change)


class Counted(MyGPT):
    """Knows by a number of its own how many layers to run."""

    def __init__(self) -> None:
        super().__init__(64)
        self.depth = len(self.h)

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for layer in range(self.depth):
            x = self.h[layer](x)
        return self.lm_head(self.ln_f(x))


def test_a_depth_that_nobody_described_is_found_out():
    mlp = MLP("h.*.mlp", ("c_fc",), "c_proj")
    for depth in ((), None, ("depth",)):
        register_architecture(Architecture("counted", ("Counted",), (mlp,), depth=depth))
        model = unsettled(Counted())
        if depth == ():
            with pytest.raises(UnsupportedModelError, match=r"Without h\.0 \(block\).*does not run.*number of blocks"):
                verify_architecture(model, lambda m: m(random_ids(0)))
        else:
            checked = verify_architecture(model, lambda m: m(random_ids(0)))
            assert ("h.0" in checked) == (depth is not None)


# inside a fit


class Task(pl.LightningModule):
    """Whatever a case is, in a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return loss_of(self.network, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    ("name", "importance"),
    [
        ("ResNet", "taylor"),
        ("T5", "taylor_2nd"),
        ("Mixtral", "auto"),
        ("BERT, sequence classification", "wanda"),
        ("Mamba", "fisher"),
        ("Nemotron-H", "auto"),
        ("Qwen3.5", "fisher"),
    ],
)
def test_it_is_pruned_in_the_middle_of_a_fit(tmp_path, name, importance):
    case = CASE[name]
    module = Task(case.build())
    before = sum(p.numel() for p in module.parameters())
    prunable = sum(s.cost * s.size for s in find_group_sets(module))
    pruning = StructuredPruning(importance, 0.1, epoch=1, calibration_batches=9, validate=False)
    options = {"logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[pruning], **options)
    batches = DataLoader([case.batch(seed) for seed in range(9)], batch_size=None)
    trainer.fit(module, batches)
    removed = before - sum(p.numel() for p in module.parameters())
    assert 0 < 0.1 * before - removed < max(pruning.table.cost) and removed < prunable
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, more = Task(case.build()), StructuredPruning(importance, 0.1, epoch=1, validate=False)
    pl.Trainer(max_epochs=2, callbacks=[more], **options).fit(again, batches, ckpt_path=tmp_path / "last.ckpt")
    with torch.no_grad():
        assert torch.equal(
            output_of(again.network.eval(), case.batch(0)), output_of(module.network.eval(), case.batch(0))
        )
