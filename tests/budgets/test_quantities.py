"""Predicted FLOPs and memory are those of the cut model: torch's counter and the tensors that generate holds say so."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architecture_cases import CASES
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, Cache, DynamicCache, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import SMALL, tiny, uneven_kept
from lit_prune import Budget, Limits, PruningConfig, apply_plan, find_group_sets, prune, trace
from lit_prune.budgeting import with_measured
from lit_prune.budgets.flops import count_flops, flops_model
from lit_prune.budgets.goals import Goals
from lit_prune.budgets.memory import count_memory, memory_model
from lit_prune.budgets.workloads import Workload, token_ids
from lit_prune.errors import BudgetError
from lit_prune.groups import BLOCK
from lit_prune.plan import PruningPlan
from lit_prune.repair.bias import added_biases

MODELS = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 8, "attn": "eager"},
    "mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
}


def build(name: str) -> nn.Module:
    options = dict(MODELS[name])
    implementation = options.pop("experts_implementation", None)
    model = tiny(name, options.pop("attn", "sdpa"), **options)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


def uneven(group_sets, seed: int) -> tuple[np.ndarray, PruningPlan]:
    """Numbers of kept groups that differ from set to set, one block removed, and the plan."""
    generator = np.random.default_rng(seed)
    kept, blocks = [], [s.name for s in group_sets if s.kind == BLOCK]
    for group_set in group_sets:
        if group_set.kind == BLOCK:
            kept.append(int(group_set.name != blocks[0]))
        else:
            kept.append(max(group_set.minimum, 1, int(group_set.size * generator.choice([0.5, 0.75, 1.0]))))
    plan = PruningPlan.from_kept(group_sets, [np.arange(k) for k in kept])
    return np.array(kept), plan


def counted(model: nn.Module, batch: int, length: int) -> int:
    """FLOPs by torch's own counter; it has no formula of the fused attention of CPUs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=token_ids(model, batch, length), use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_flops_are_those_of_the_cut_model(name, blocks):
    if blocks and name == "mixtral":
        pytest.skip("the experts of a removed block are covered by the others")
    model = build(name)
    group_sets = find_group_sets(model, blocks=blocks)
    flops = flops_model(Workload(model, 2, 20), group_sets)
    dense = np.array([s.size for s in group_sets])
    assert flops.value(dense) == counted(model, 2, 20)
    kept, plan = uneven(group_sets, seed=3)
    apply_plan(model, plan)
    assert flops.value(kept) == pytest.approx(counted(model, 2, 20), rel=1e-9)
    assert flops.value(kept) < 0.95 * flops.value(dense)


LLAMA_4 = {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 20, "head_dim": 8}
# what runs experts, and whether it gives each of them every token
EXPERTS = {
    "llama4_text": ("eager", True, {"num_local_experts": 4, **LLAMA_4}),
    "mixtral": ("eager", False, {"num_local_experts": 4}),
    "qwen3_moe": ("grouped_mm", False, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}),
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("length", [20, 1100])
def test_experts_that_leave_save_what_they_computed(name, length):
    implementation, every_token, options = EXPERTS[name]
    model = tiny(name, num_hidden_layers=2, max_position_embeddings=2048, **options)
    if not every_token:
        model.set_experts_implementation(implementation)
    group_sets = find_group_sets(model)
    flops = flops_model(Workload(model, 2, length), group_sets)
    sizes = np.array([s.size for s in group_sets])
    kept = np.array([3 if s.kind == "expert" else s.size for s in group_sets])
    dense = count_flops(Workload(model, 2, length))
    assert flops.value(sizes) == pytest.approx(dense, rel=1e-9) and not np.array_equal(kept, sizes)
    apply_plan(model, PruningPlan.from_kept(group_sets, [np.arange(k) for k in kept]))
    saved = dense - count_flops(Workload(model, 2, length))
    assert dense - flops.value(kept) == pytest.approx(saved, rel=1e-9)
    routers = 2 * 2 * length * model.config.hidden_size * model.config.num_hidden_layers
    assert saved > 2 * routers if every_token else saved == routers


def test_flops_of_long_sequences_follow_from_short_ones():
    model = tiny("llama", max_position_embeddings=4096)
    group_sets = find_group_sets(model)
    flops = flops_model(Workload(model, 1, 1100), group_sets)
    dense = np.array([s.size for s in group_sets])
    whole = counted(model, 1, 1100)
    assert flops.value(dense) == pytest.approx(whole, rel=1e-9) and count_flops(Workload(model, 1, 1100)) == whole
    # attention takes the square of the length
    assert whole > 1.2 * 11 * counted(model, 1, 100)


class CallsWithParameters(nn.Module):
    """A table that a layer of its own turns before words meet it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))
        self.turn, self.norm, self.read = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x @ self.norm(self.turn(self.table)))


def test_flops_are_counted_where_modules_are_called_with_parameters():
    """Torch's own counter fails for such modules where gradients are off, as they are when what is left is measured."""
    model, x = CallsWithParameters(), torch.randn(3, 6)
    example = lambda: contextlib.nullcontext(lambda: model(x).mean())  # noqa: E731
    assert count_flops(Workload(model, 1, 1, example)) == 2 * (6 * 8 * 12 + 3 * 6 * 12 + 3 * 12 * 5)
    positions = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}

    def deberta(norm: str) -> nn.Module:
        sizes = {k: v for k, v in SMALL.items() if not k.startswith(("num_key_value", "bos", "eos", "pad"))}
        config = CONFIG_MAPPING["deberta-v2"](**sizes, **positions, norm_rel_ebd=norm)
        return AutoModelForMaskedLM.from_config(config).eval()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = deberta("layer_norm")
        model(input_ids=token_ids(model, 2, 16))
    model = deberta("none")
    flops = flops_model(Workload(model, 2, 16), group_sets := find_group_sets(model))
    assert count_flops(Workload(model, 2, 16)) == counter.get_total_flops()
    kept, plan = uneven(group_sets, seed=2)
    apply_plan(model, plan)
    assert flops.value(kept) == pytest.approx(count_flops(Workload(model, 2, 16)), rel=1e-9)


class Convolutions(nn.Module):
    """Every convolution gives what the next one reads, so that both of its dimensions shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = nn.Conv2d(16, 24, 3, stride=2)
        self.third = nn.Conv2d(24, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.depthwise(self.first(x).relu())).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


def test_flops_of_convolutions_are_products_of_both_widths():
    torch.manual_seed(0)
    model, images = Convolutions().eval(), torch.randn(2, 3, 12, 12)
    trace(model, [images], lambda batch: model(batch).square().mean())
    group_sets = find_group_sets(model)

    example = lambda: contextlib.nullcontext(lambda: model(images))  # noqa: E731
    flops = flops_model(Workload(model, 1, 1, example), group_sets)
    kept, plan = uneven(group_sets, seed=0)
    assert len(set(kept / [s.size for s in group_sets])) > 1
    apply_plan(model, plan)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert flops.value(kept) == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_predicted_memory_is_what_generate_holds_to_the_byte(name):
    model = build(name)
    blocks = name != "mixtral"
    group_sets = find_group_sets(model, blocks=blocks)
    memory = memory_model(Workload(model, 2, 20), group_sets)
    half = memory_model(Workload(model, 2, 20), group_sets, torch.float16)
    kept, plan = uneven(group_sets, seed=1)
    apply_plan(model, plan)
    prompt = token_ids(model, 2, 9)
    out = model.generate(prompt, min_new_tokens=12, max_new_tokens=12, return_dict_in_generate=True, pad_token_id=0)
    # the last token is not fed to the model
    assert out.sequences.shape == (2, 21)
    held = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    bytes_held = sum(t.numel() * t.element_size() for t in [*held, *model.parameters()])
    assert memory.value(kept) == bytes_held
    assert half.value(kept) == bytes_held // 2


BIASES = {
    "biases of all outputs": {"num_hidden_layers": 3},
    "biases present": {"num_hidden_layers": 3, "attention_bias": True},
    "blocks": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("case", BIASES)
@pytest.mark.parametrize("asked", [{"params": "80%"}, {"memory": "85%", "length": 16, "dtype": "bfloat16"}])
def test_biases_that_a_repair_adds_are_within_the_budget(asked, case, iterations, batches, loss_of):
    model = tiny(**BIASES[case])
    kinds = ("attention", "mlp", "block") if case == "blocks" else None
    config = PruningConfig(
        importance="wanda", budget=Budget(**asked), iterations=iterations, repair="bias", limits=Limits(kinds=kinds)
    )
    _, plan = prune(model, batches, loss_of(model), config)
    (row,) = plan.info["budgets"]
    assert plan.biases or case == "blocks"
    assert row["measured"] <= row["predicted"] <= row["target"] < row["dense"]
    if case != "blocks":
        # a set that keeps all of its groups gets none
        spared = len(added_biases(tiny(**BIASES[case]), find_group_sets(model))) - len(plan.biases)
        size = model.config.hidden_size * (1 if "params" in asked else 2)
        assert row["predicted"] - row["measured"] == spared * size
    dense = tiny(**BIASES[case])
    repaired = prune(dense, batches, loss_of(dense), replace(config, repair=None))[1].info["budgets"][0]
    assert repaired["dense"] == row["dense"] and repaired["target"] == row["target"]


@pytest.mark.parametrize("transposed", [False, True])
def test_biases_of_convolutions_are_within_the_budget(transposed):
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        kind(16, 24, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(24, 8, 1, bias=False),
        nn.Flatten(2),
    ).eval()
    images = list(torch.randn(3, 2, 3, 8, 8))
    config = PruningConfig(importance="wanda", budget="params=80%", iterations=1, repair="bias")
    _, plan = prune(model, images, lambda batch: model(batch).square().mean(), config)
    (row,) = plan.info["budgets"]
    assert plan.biases and row["measured"] <= row["predicted"] <= row["target"]


# caches of encoders and decoders, layers that the cache numbers otherwise, states beside keys and in place of them
CACHES = (
    "BART",
    "T5",
    "GPT-Neo",
    "Falcon-H1",
    "Zamba",
    "Mamba",
    "Mamba-2, two groups",
    "Kimi Linear",
    "Qwen3-Next",
    "LFM3",
)


@pytest.mark.parametrize("name", CACHES)
def test_predicted_memory_is_what_the_cache_holds(name):
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    group_sets = find_group_sets(model)
    memory = memory_model(Workload(model, 2, 20), group_sets)
    kept = uneven_kept(group_sets)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    ids = token_ids(model, 2, 20)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, **given)
    cache = out.get("past_key_values", out.get("cache_params"))
    held = [*tensors_in(cache), *model.parameters()]
    assert memory.value(np.array([len(k) for k in kept])) == sum(t.numel() * t.element_size() for t in held)
    assert len(held) > len([*model.parameters()])


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a cache that are no scalars, wherever they are in it."""
    if isinstance(value, torch.Tensor):
        return [value] if value.dim() > 1 else []
    if isinstance(value, Cache | CacheLayerMixin | LinearAttentionCacheLayerMixin):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("kinds", [("block", "mlp"), ("block",), ("block", "mlp", "query_head")])
@pytest.mark.parametrize("name", ["llama", "gpt_bigcode"])
def test_blocks_take_along_what_belongs_to_no_set(name, kinds):
    model = tiny(name, **({"num_key_value_heads": 1} if name == "llama" else {}))
    group_sets = [s for s in find_group_sets(model, blocks=True) if s.kind in kinds]
    models = [quantity(Workload(model, 2, 20), group_sets) for quantity in (flops_model, memory_model)]
    kept, plan = uneven(group_sets, seed=2)
    saved = [m.saved(np.array([s.size for s in group_sets])) for m in models]
    apply_plan(model, plan)
    workload = Workload(model, 2, 20)
    assert [m.value(kept) for m in models] == [pytest.approx(count_flops(workload), rel=1e-9), count_memory(workload)]
    if kinds == ("block",):
        dense = [m.value(np.array([1, 1, 1])) - m.value(np.array([0, 1, 1])) for m in models]
        assert [s[0] for s in saved] == pytest.approx(dense)


def test_a_budget_that_is_missed_is_said():
    model = tiny("llama")
    group_sets = find_group_sets(model)
    goals = Goals(model, group_sets, Budget(memory="80%", params="80%", length=16))
    sizes = [np.arange(s.size) for s in group_sets]
    plan = replace(PruningPlan.from_kept(group_sets, sizes), info={"predicted": goals.targets})
    with pytest.warns(UserWarning, match="misses its budget of") as warned:
        with_measured(model, plan, goals, cut=True)
    assert [str(warning.message).split("budget of ")[1].split(":")[0] for warning in warned] == ["params", "memory"]


def test_a_cache_that_no_module_is_called_with_is_refused():
    class Hidden(LlamaForCausalLM):
        """A decoder whose cache is made behind its modules."""

        def forward(self, input_ids, past_key_values=None, use_cache=False):
            out = super().forward(input_ids, use_cache=False)
            cache = DynamicCache()
            states = input_ids[:, None, :, None].float()
            cache.update(states, states, 0)
            out.past_key_values = cache
            return out

    model = Hidden(tiny("llama").config)
    with pytest.raises(BudgetError, match="which module"):
        memory_model(Workload(model, 1, 8), find_group_sets(model))


def test_what_cannot_be_run_is_said():
    model = tiny("gpt2")
    with pytest.raises(BudgetError, match="positions"):
        Workload(model, 1, 10**6).forward()
    with pytest.raises(BudgetError, match="calibration batch"):
        Workload(Convolutions(), 1, 1)
