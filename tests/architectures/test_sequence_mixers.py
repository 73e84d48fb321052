"""Heads and channels of state-space models and of linear attention, beyond what the conformance suite says of each."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from architecture_cases import CASES, causal_batch, loss_of
from test_export import WITHOUT, loads
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from conftest import tiny, uneven_kept
from lit_prune import (
    Architecture,
    GroupTable,
    Limits,
    PlanError,
    PruningConfig,
    PruningPlan,
    SequenceMixer,
    Term,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    load_pruned,
    make_plan,
    prune,
    register_architecture,
    save_pruned,
    unexplained_shares,
    verify_architecture,
)
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.mask_gradients import observable
from lit_prune.ranking.selection import select
from lit_prune.surgery.apply import cut

CASE = {case.name: case for case in CASES}
MIXERS = ("Mamba", "Mamba-2, two groups", "Qwen3.5", "LFM2")


def two_groups(**overrides) -> nn.Module:
    """A Mamba-2 with 16 heads, 8 of them for each B and C, whose projections kernels can read."""
    options = {"num_heads": 16, "head_dim": 4, "n_groups": 2, "state_size": 4, "expand": 2, "chunk_size": 4}
    return tiny("mamba2", "eager", **{**options, **overrides})


def half(model: nn.Module, kinds=None) -> nn.Module:
    """The model without the second half of every set (of every part of it)."""
    group_sets = find_group_sets(model)
    kept = []
    for s in group_sets:
        chosen = kinds is None or s.kind in kinds
        size = s.size // s.equal_parts
        stay = max(1, size // 2) if chosen else size
        kept.append([part * size + g for part in range(s.equal_parts) for g in range(stay)])
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


# equal parts, and what kernels ask for


def test_each_b_and_c_keeps_its_most_important_heads_and_as_many_as_the_others():
    model = two_groups(num_hidden_layers=1)
    group_sets = find_group_sets(model)
    assert [(s.size, s.equal_parts, s.minimum) for s in group_sets] == [(16, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    # the second part is more important than the first throughout, which must not cost the first any heads more
    importance = torch.rand(16, generator=generator) + torch.tensor([0.0, 10.0]).repeat_interleave(8)
    table = GroupTable.build(group_sets, [importance])
    for removed in range(1, 7):
        limits = Limits(min_fraction=0, multiple_of={"ssm_head": 1})
        table.kept = select(table, removed * 2 * group_sets[0].cost, limits)
        expected = [set((part * 8 + importance[part * 8 :][:8].argsort()[removed:]).tolist()) for part in (0, 1)]
        assert set(table.kept_groups()[0].tolist()) == set.union(*expected)


def test_a_plan_that_leaves_parts_of_different_sizes_is_refused_before_any_cut():
    model = two_groups()
    group_sets = find_group_sets(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for removed in ([0], [0, 1], [0, 1, 9]):
        kept = [sorted(set(range(16)) - set(removed)) for _ in group_sets]
        with pytest.raises(PlanError, match=r"in the 2 parts of .*mixer' \(ssm_head\); expected as many in each"):
            apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: two_groups(), 8),
        (lambda: two_groups(n_groups=1), 8),
        # 12 rows of B and C: kernels cannot read this one as it is
        (lambda: two_groups(state_size=3), 1),
        (lambda: tiny("mamba", "eager", expand=1, state_size=4), 8),
        (lambda: tiny("lfm2", layer_types=["conv"] * 3), 8),
        (lambda: tiny("lfm2", layer_types=["conv"] * 3, hidden_size=36, num_attention_heads=4), 1),
        (lambda: CASE["Qwen3.5"].build(), 1),
    ],
)
def test_by_default_what_cuda_kernels_read_stays_a_multiple_of_8(model, expected):
    model = model()
    group_sets = [s for s in find_group_sets(model) if s.kind not in ("mlp", "attention")]
    assert {s.multiple_of for s in group_sets} == {expected}
    kinds = tuple({s.kind for s in group_sets})
    config = PruningConfig("magnitude", 0.5, ratio_of="prunable", limits=Limits(kinds=kinds, min_fraction=0))
    _, plan = make_plan(model, group_sets, None, config)
    assert plan.entries
    assert all(len(e.kept) % expected == 0 for e in plan.entries)
    if expected == 8:
        free = replace(config, pruning_ratio=0.3, limits=replace(config.limits, multiple_of={kinds[0]: 1}))
        _, uneven = make_plan(model, group_sets, None, free)
        assert any(len(e.kept) % 8 for e in uneven.entries)
        _, other = make_plan(model, group_sets, None, replace(config, limits=replace(config.limits, multiple_of={})))
        assert all(len(e.kept) % 8 == 0 for e in other.entries)
        apply_plan(model, plan)
        mixers = [m for m in model.modules() if hasattr(m, "in_proj")]
        assert mixers and all(m.in_proj.out_features % 8 == 0 for m in mixers)


# statistics and repair


@pytest.mark.parametrize("name", MIXERS)
def test_derivatives_by_masks_are_those_by_a_scale_of_what_consumers_read(name):
    """Scaling a consumer's columns by m has the derivative sum(W * dL/dW) at m = 1."""
    model = CASE[name].build()
    group_sets = find_group_sets(model)
    assert observable(group_sets)
    term = Term(lambda derivative: derivative, "mask_gradient", per_group=True)
    batch = {k: v[:1] for k, v in causal_batch(0).items()}
    statistics = collect_statistics(model, group_sets, [batch], lambda b: loss_of(model, b), [term])
    loss_of(model, batch).backward()
    for group_set in group_sets:
        expected = torch.zeros(group_set.size)
        for part in group_set.consumers:
            weight = model.get_parameter(part.parameter)
            columns = (weight * weight.grad).sum(dim=1 - part.dim)
            expected += columns[part.index].sum(dim=1)
        torch.testing.assert_close(statistics.reduced[term, group_set.key, 0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_what_the_others_can_make_up_for_is_known_and_a_copy_of_a_group_is_free(name):
    model = CASE[name].build()
    group_sets = find_group_sets(model)
    kind = next(s.kind for s in group_sets if s.kind not in ("mlp", "attention"))
    chosen = next(s for s in group_sets if s.kind == kind)
    with torch.no_grad():
        for part in chosen.slices:
            # group 1 gives what group 0 does; what is read of them stays different
            if not part.consumes:
                parameter = model.get_parameter(part.parameter)
                parameter.index_copy_(part.dim, part.index[1], parameter.index_select(part.dim, part.index[0]))
    batches = [causal_batch(seed) for seed in range(8)]
    shares = unexplained_shares(model, group_sets, batches, lambda b: loss_of(model, b))
    assert shares.keys() == {s.key for s in group_sets}
    own = shares[chosen.key]
    assert bool(((own > 0) & (own <= 1)).all())
    assert float(own[:2].max()) < 0.6 * float(own[2:].max())


@pytest.mark.parametrize("name", [*MIXERS, "Jamba", "Nemotron-H", "Granite 4 hybrid"])
def test_repair_brings_the_output_nearer_to_the_dense_one_with_the_defaults(name):
    errors = []
    for method in (None, "least_squares"):
        model = CASE[name].build()
        batches = [causal_batch(seed) for seed in range(6)]
        with torch.no_grad():
            dense = [model(**b).logits for b in batches]
        limits = Limits(multiple_of={s.kind: 1 for s in find_group_sets(model)})
        config = PruningConfig("fisher", 0.3, ratio_of="prunable", repair=method, limits=limits, compensation=False)
        prune(model, batches, lambda b: loss_of(model, b), config)
        with torch.no_grad():
            errors.append(
                sum(float((model(**b).logits - d).square().mean()) for b, d in zip(batches, dense, strict=True))
            )
    assert errors[1] < errors[0]


# surgery and files


@pytest.mark.parametrize("name", [*MIXERS, "Falcon-H1, norm", "Zamba2"])
def test_a_cut_that_is_undone_leaves_weights_integers_and_outputs_as_they_were(name):
    def integers(model):
        return {
            (path, key): value
            for path, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, tuple))
        }

    model = CASE[name].build()
    before, output = integers(model), model(**causal_batch(0)).logits
    group_sets = find_group_sets(model)
    undo = cut(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    smaller = integers(model)
    assert smaller != before
    for module in (m for m in model.modules() if isinstance(m, nn.Conv1d)):
        assert module.groups == module.in_channels == module.out_channels == len(module.weight)
    undo()
    assert integers(model) == before
    assert torch.equal(model(**causal_batch(0)).logits, output)


def test_falcon_h1_is_pruned_twice_copied_and_pickled_with_multipliers_of_its_own(tmp_path):
    model = CASE["Falcon-H1"].build()
    for _ in range(2):
        group_sets = find_group_sets(model)
        apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    expected = model(**causal_batch(0)).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(**causal_batch(0)).logits, expected)
    loaded = load_pruned(save_pruned(model, tmp_path / "model"))
    assert torch.equal(loaded(**causal_batch(0)).logits, expected)
    with pytest.raises(UnsupportedModelError, match=r"mamba' became a .* cannot be saved with self_contained"):
        save_pruned(model, tmp_path / "other", self_contained=True)


@pytest.mark.parametrize("name", ["Mamba-2, two groups", pytest.param("Qwen3-Next", marks=pytest.mark.slow)])
def test_a_self_contained_folder_of_uneven_mixers_loads_without_lit_prune(name, tmp_path, tokens):
    model = CASE[name].build()
    group_sets = find_group_sets(model)
    # widths that the grouped kernels of experts take, which an adaptation would have to replace
    kept = [
        range(8) if s.name.endswith("experts") else k for s, k in zip(group_sets, uneven_kept(group_sets), strict=True)
    ]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    folder = save_pruned(model, tmp_path / "model", self_contained=True)
    done = loads(folder, tokens, model, options="{'trust_remote_code': True}", block=WITHOUT)
    assert "loaded Pruned" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "model_type", "kinds"),
    [
        ("Mamba-2, two groups", "mamba2", None),
        ("Nemotron-H", "nemotron_h", None),
        ("Falcon-H1", "falcon_h1", ("ssm_head", "mlp")),
        ("Zamba2", "zamba2", None),
        ("Qwen3.5", "qwen3_5_text", None),
        ("Qwen3-Next", "qwen3_next", ("attention", "mlp")),
        # its inner width is a whole multiple of the hidden size, and one channel less cannot be said
        ("Mamba", "lit_prune", None),
    ],
)
def test_uniform_cuts_are_stock_models_of_transformers(name, model_type, kinds, tmp_path, tokens):
    model = half(CASE[name].build(), kinds)
    folder = save_pruned(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded).__name__.startswith("Pruned") == (model_type == "lit_prune")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), loaded.generate(tokens, use_cache=False, **options))


# a description of one's own


class GatedConvolution(nn.Module):
    """Values and gates of several heads, a causal convolution of the values, a bias that all heads share behind them."""

    def __init__(self, hidden: int, heads: int, width: int, shared: int) -> None:
        super().__init__()
        self.heads, self.width, self.shared = heads, width, shared
        self.into = nn.Linear(hidden, heads * width + shared + heads)
        self.mix = nn.Conv1d(
            heads * width + shared, heads * width + shared, 3, padding=2, groups=heads * width + shared
        )
        self.scale = nn.Parameter(torch.ones(heads))
        self.out = nn.Linear(heads * width, hidden)

    def forward(self, x):
        inner, gate = self.into(x).split([self.heads * self.width + self.shared, self.heads], dim=-1)
        inner = self.mix(inner.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        values, common = inner.split([self.heads * self.width, self.shared], dim=-1)
        gate = (gate.sigmoid() * self.scale * common.mean(dim=-1, keepdim=True)).repeat_interleave(self.width, dim=-1)
        return self.out(functional.silu(values) * gate)


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedConvolution(12, heads, 4, 6) for heads in (3, 5))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


OWN = SequenceMixer(
    path="layers.*",
    kind="gated_convolution",
    widths=lambda m: {"value": m.width, "head": 1},
    shared=lambda m: {"common": m.shared},
    produced={"into": ("value", "common", "head")},
    parameters={"mix.weight": ("value", "common"), "mix.bias": ("value", "common"), "scale": ("head",)},
    output="out",
    attributes={"heads": ("head",)},
)


def describe(mixer):
    register_architecture(Architecture("own-mixer", (OwnModel,), (mixer,)))


def test_a_mixer_of_ones_own_is_described_by_its_sections():
    describe(OWN)
    torch.manual_seed(0)
    model = OwnModel()
    x = torch.randn(2, 7, 12)
    assert verify_architecture(model, lambda m: m(x)) == ["layers.0", "layers.1"]
    assert [s.size for s in find_group_sets(model)] == [3, 5]
    before = sum(p.numel() for p in model.parameters())
    costs = [s.cost for s in find_group_sets(model)]
    apply_plan(model, PruningPlan.from_kept(find_group_sets(model), [[0, 2], [1]]))
    assert before - sum(p.numel() for p in model.parameters()) == costs[0] + 4 * costs[1]
    assert model(x).shape == x.shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"produced": {"into": ("value", "head")}},
            r"'layers\.0\.into\.weight' has 21 positions .* expected 15.*value: 12",
        ),
        ({"parameters": {"scale": ("value",)}}, r"'layers\.0\.scale' has 3 positions"),
        (
            {"widths": lambda m: {"value": 5, "head": 1}},
            r"layers\.0\.out .* has 12 input features; expected a multiple of 5",
        ),
        ({"produced": {"missing": ("value",)}}, r"expected to have a projection 'missing'"),
        # 12 rows fit in the first layer by chance
        ({"parameters": {"out.weight": ("value",)}}, r"'layers\.1\.out\.weight' has 12 positions .* expected 20"),
    ],
)
def test_a_wrong_description_names_parameter_and_sections(wrong, message):
    describe(replace(OWN, **wrong))
    with pytest.raises(UnsupportedModelError, match=message):
        find_group_sets(OwnModel()) and verify_architecture(OwnModel(), lambda m: m(torch.randn(2, 7, 12)))


def test_a_table_without_parts_selects_as_before():
    generator = np.random.default_rng(0)
    values = torch.tensor(generator.random(12))
    group_sets = find_group_sets(
        two_groups(num_hidden_layers=1, num_heads=12, n_groups=1, hidden_size=24, state_size=3)
    )
    table = GroupTable.build(group_sets, [values])
    bare = replace(table, equal_parts=None, multiple_of=None)
    for budget in range(int(table.cost[0]), int(table.cost.sum() * 0.7), 97):
        assert np.array_equal(select(table, budget), select(bare, budget))


def test_a_uniform_plan_of_heads_keeps_as_many_in_every_layer_and_part(tmp_path, tokens):
    model = CASE["Nemotron-H"].build()
    limits = Limits(kinds=("ssm_head",), uniform=True, min_fraction=0)
    config = PruningConfig("magnitude", 0.2, ratio_of="prunable", limits=limits, repair=None)
    apply_plan(model, make_plan(model, find_group_sets(model), None, config)[1])
    mixers = [m for m in model.modules() if hasattr(m, "A_log")]
    assert {len(m.A_log) for m in mixers} == {mixers[0].num_heads} and 2 <= mixers[0].num_heads < 8
    loaded = AutoModelForCausalLM.from_pretrained(save_pruned(model, tmp_path / "model")).eval()
    assert loaded.config.model_type == "nemotron_h" and loaded.config.mamba_num_heads == mixers[0].num_heads
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
