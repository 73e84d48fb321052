"""LitGPT's models: every kind of attention and MLP is cut as zeros would silence it, generates, trains and is repaired."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from litgpt_package import VOCABULARY, gpt, ids, import_litgpt, named
from torch import Tensor, nn
from torch.nn import functional

from conftest import skipping, uneven_kept, zeroed
from lit_prune import (
    BudgetError,
    Limits,
    PruningConfig,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    calibrate,
    find_group_sets,
    make_plan,
    prune,
    repair,
    verify_architecture,
)
from lit_prune.groups import BLOCK

litgpt = import_litgpt()

# one name for each set of options that the 210 configs of LitGPT 0.5.13 have; all of them were run once
NAMES = (
    "Camel-Platypus2-13B",
    "Camel-Platypus2-70B",
    "CodeGemma-7b-it",
    "Gemma-2-27b",
    "Gemma-2-2b",
    "Gemma-2b",
    "Gemma-3-12b-it",
    "Gemma-3-1b-it",
    "Gemma-3-27b-it",
    "Mathstral-7B-v0.1",
    "Mixtral-8x22B-Instruct-v0.1",
    "OLMo-1B-hf",
    "OLMo-2-1124-13B",
    "Phi-3-mini-128k-instruct",
    "Phi-4-mini-instruct",
    "QwQ-32B",
    "Qwen3-0.6B",
    "Qwen3-235B-A22B",
    "falcon-180B",
    "falcon-7b",
    "phi-1_5",
    "phi-2",
    "pythia-1.4b",
    "stable-code-3b",
)
LATENT = {
    "name": "latent",
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMoE",
    "parallel_residual": False,
    "bias": False,
    "rotary_percentage": 1.0,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 6,
    "head_size": 8,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "block_size": 64,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "n_expert": 4,
    "n_expert_groups": 2,
    "n_topk_groups": 1,
    "n_topk_scores_per_group": 2,
    "n_expert_per_token": 2,
    "n_shared_expert": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.0,
    "norm_topk_prob": True,
    "latent_attention": {
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 5,
    },
}


def latent(**fields: object) -> nn.Module:
    return gpt(litgpt.Config(**{**LATENT, **fields}))


MODELS = {
    **{name: lambda name=name: named(name) for name in NAMES},
    "latent attention, groups of experts, shared experts": latent,
    "latent attention, biases, yarn": lambda: latent(
        attn_bias=True,
        bias=True,
        rope_interleave=True,
        rope_adjustments={
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_seq_len": 32,
            "mscale_all_dim": 0.8,
        },
    ),
    "sliding windows and one key/value head": lambda: named(
        "falcon-7b", sliding_window_size=3, sliding_window_indices=[0, 1]
    ),
    "norms of queries and keys with biases": lambda: named("pythia-14m", norm_qk=True, attn_bias=True),
}
# windows, softcapping (whose mask LitGPT adds as zeros and ones, dense or not), one key/value head, latent attention, ...
CACHED = ("Gemma-2-2b", "Gemma-3-1b-it", "OLMo-2-1124-13B", "falcon-7b", "phi-2", "QwQ-32B", "stable-code-3b")
CACHED += tuple(name for name in MODELS if name not in NAMES)
VERIFIED = ("Camel-Platypus2-70B", "Gemma-3-1b-it", "Mixtral-8x22B-Instruct-v0.1", "falcon-7b", "phi-1_5")
VERIFIED += tuple(name for name in MODELS if name not in NAMES)
every_model = pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in MODELS.items()])


class _NormOverKept(nn.Module):
    """A root-mean-square norm that counts only some features: over all heads, a cut one counts those that stay."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.eps, self.kept = norm.weight, norm.eps, kept

    def forward(self, x: Tensor) -> Tensor:
        mean = x[..., self.kept].square().mean(dim=-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + self.eps))


def dense_with_zeros(model: nn.Module, kept: list[list[int]]) -> nn.Module:
    oracle = zeroed(model, kept)
    for group_set, keep in zip(find_group_sets(model), kept, strict=True):
        for part in group_set.slices:
            owner, _, last = part.module.rpartition(".")
            if last in ("norm_q", "norm_k"):
                norm = _NormOverKept(oracle.get_submodule(part.module), part.index[keep].flatten())
                setattr(oracle.get_submodule(owner), last, norm)
    return oracle


def cut(model: nn.Module) -> nn.Module:
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    return model


def assert_close(found: Tensor, expected: Tensor, precision: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=precision, atol=precision * float(expected.abs().max()))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@every_model
@torch.no_grad()
def test_equals_dense_model_with_zeros(build):
    model = build()
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    dense, expected = model(ids()), dense_with_zeros(model, kept)(ids())
    before = sum(p.numel() for p in model.parameters())
    cut(model)
    assert_close(model(ids()), expected)
    assert float((expected - dense).abs().max()) > 1e-3 * float(dense.abs().max())
    left = sum(s.cost * (s.size - len(k)) for s, k in zip(group_sets, kept, strict=True))
    assert before - sum(p.numel() for p in model.parameters()) == left


def decoded(model: nn.Module, tokens: Tensor, prompt: int = 3) -> Tensor:
    """Logits of a prefill, and then of one token after the other."""
    model.set_kv_cache(batch_size=len(tokens))
    found = [model(tokens[:, :prompt], torch.arange(prompt))]
    found += [model(tokens[:, t : t + 1], torch.tensor([t])) for t in range(prompt, tokens.shape[1])]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("build", [pytest.param(MODELS[n], id=n) for n in CACHED])
@torch.no_grad()
def test_cache_of_keys_and_values_works(build):
    """As in the dense model with zeros; what the dense model's cache held of heads that left is gone."""
    model = build()
    kept = uneven_kept(find_group_sets(model))
    expected = decoded(dense_with_zeros(model, kept), ids(1))
    model.set_kv_cache(batch_size=2)
    cut(model)
    assert model.transformer.h[0].attn.kv_cache is None
    with pytest.raises(TypeError, match="set_kv_cache"):
        model(ids(1), torch.arange(10))
    assert_close(decoded(model, ids(1)), expected)


@pytest.mark.parametrize("name", ["Gemma-2-2b", "OLMo-2-1124-13B", "pythia-14m", "latent"])
def test_a_layer_may_lose_all_its_heads(name):
    """With and without a cache; its norm still gets a gradient, which DDP waits for."""
    model = latent(attn_bias=True) if name == "latent" else named(name)
    group_sets = find_group_sets(model)
    assert {s.minimum for s in group_sets if s.kind == "attention"} == {0}
    kept = [[] if s.name == "transformer.h.0.attn" else list(range(s.size)) for s in group_sets]
    oracle = zeroed(model, kept)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    loss_of(model, ids()).backward()
    assert all(p.grad is not None for p in model.transformer.h[0].norm_1.parameters())
    with torch.no_grad():
        assert_close(model(ids()), oracle(ids()))
        assert_close(decoded(model, ids(1)), decoded(oracle, ids(1)))
        assert_close(copy.deepcopy(model)(ids()), oracle(ids()))


def test_generates_text_as_litgpt_does_it():
    from litgpt.generate.base import generate

    model = cut(named("Llama-3.2-1B"))
    prompt = ids(2, batch=1, tokens=4)[0]
    with torch.no_grad():
        expected = prompt
        for _ in range(6):
            expected = torch.cat([expected, model(expected[None])[0, -1].argmax()[None]])
    model.set_kv_cache(batch_size=1)
    assert torch.equal(generate(model, prompt, 10, temperature=0.0), expected)


@pytest.mark.parametrize("build", [pytest.param(MODELS[n], id=n) for n in VERIFIED])
def test_verify_architecture_passes(build):
    """A norm over all heads (OLMo 2) counts the zeros of the dense model, and is not among them."""
    model = build()
    names = verify_architecture(model, lambda m: m(ids()))
    assert {s.name for s in find_group_sets(model, blocks=True)} == set(names)


@pytest.mark.parametrize("name", ["Gemma-3-1b-it", "pythia-14m", "Qwen3-235B-A22B"])
@torch.no_grad()
def test_whole_blocks_leave_with_their_rotary_base_and_window(name):
    """Gemma 3 has two kinds of layers, whose list in the config has to follow."""
    model = named(name, 4)
    if model.config.rope_indices is not None:
        model = named(name, 4, rope_indices=[0, 1, 1, 0], sliding_window_indices=[0, 1, 1, 0])
    dense = model.config
    group_sets = find_group_sets(model, blocks=True)
    kept = [[] if s.kind == BLOCK and s.layer in (0, 2) else list(range(s.size)) for s in group_sets]
    expected = skipping(model, ["transformer.h.0", "transformer.h.2"])(ids())
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    assert_close(model(ids()), expected)
    assert model.config.n_layer == 2 == len(model.transformer.h)
    assert [block.attn.block_idx for block in model.transformer.h] == [0, 1]
    assert dense.n_layer == 4
    if dense.rope_indices is not None:
        assert model.config.rope_indices == [1, 0] == model.config.sliding_window_indices


@pytest.mark.parametrize("name", ["Gemma-2-2b", "falcon-7b"])
def test_training_goes_on_as_that_of_the_dense_model_with_zeros(name):
    """Tied embeddings; an optimizer with state; frozen zeros in the dense model."""
    model = named(name)
    model.lm_head.weight = model.transformer.wte.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        loss_of(network, ids(seed)).backward()
        optimizer.step()

    step(model, optimizer, 1)
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    oracle = copy.deepcopy(model)
    masks = {name: torch.ones_like(p) for name, p in oracle.named_parameters()}
    for group_set, keep in zip(group_sets, kept, strict=True):
        gone = group_set.kept_to_removed(keep)
        for part in group_set.slices:
            masks[part.parameter].index_fill_(part.dim, part.index[gone].flatten(), 0.0)
    twin = torch.optim.SGD(oracle.parameters(), lr=0.01, momentum=0.9)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, parameter in oracle.named_parameters():
        parameter.data.mul_(masks[name])
        twin.state[parameter]["momentum_buffer"].mul_(masks[name])
        parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept), [optimizer])
    assert model.lm_head.weight is model.transformer.wte.weight
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(oracle, twin, seed)
    with torch.no_grad():
        assert_close(model(ids()), oracle(ids()), 1e-4)


@pytest.mark.parametrize("how", ["least_squares", "bias"])
@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "latent", "pythia-14m", "OLMo-2-1124-7B"])
def test_prunes_with_every_repair_and_no_warning(name, how, recwarn):
    model = latent() if name == "latent" else named(name)
    before = sum(p.numel() for p in model.parameters())
    config = PruningConfig(pruning_ratio=0.2, repair=how)
    prune(model, [ids(seed) for seed in range(3)], lambda batch: loss_of(model, batch), config)
    assert not [w for w in recwarn if "repaired" in str(w.message)]
    assert 0.15 * before < before - sum(p.numel() for p in model.parameters()) <= 0.2 * before


@torch.no_grad()
def test_experts_are_refitted_to_what_they_gave():
    """With all else whole, an expert's new weights are the ordinary least-squares solution on the tokens sent to it."""
    model = named("Mixtral-8x7B-v0.1", 1)
    batches = [ids(seed, batch=16, tokens=40) for seed in range(8)]
    config = PruningConfig("magnitude", 0.1, limits=Limits(kinds=["mlp"]))
    group_sets = find_group_sets(model)
    statistics = calibrate(model, group_sets, batches, lambda b: loss_of(model, b), config)
    _, plan = make_plan(model, group_sets, statistics, config)
    _, weights = repair(model, group_sets, plan, statistics, batches, lambda b: loss_of(model, b), config)
    touched = {e.name: list(e.kept) for e in plan.entries}
    assert touched
    assert all(".experts." in name for name in touched)
    for name, kept in touched.items():
        projection = model.get_submodule(f"{name}.proj")
        seen: list[Tensor] = []
        handle = projection.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for batch in batches:
            model(batch[:, :-1])
        handle.remove()
        x = torch.cat(seen).double()
        wanted = torch.linalg.lstsq(x[:, kept], x @ projection.weight.T.double()).solution.T
        found = weights[f"{name}.proj.weight"].double()
        # the damping pulls a little towards the weights that were there
        before = projection.weight[:, kept].double()
        assert float((found - wanted).norm()) < 0.25 * float((before - wanted).norm())


def test_expert_that_no_token_goes_to_is_no_obstacle():
    model = named("Mixtral-8x7B-v0.1", n_expert_per_token=1)
    experts = model.transformer.h[0].mlp
    with torch.no_grad():
        # of two opposite scores one is above 0
        experts.gate.weight[1] = -experts.gate.weight[0]
        experts.gate.weight[3] = 0.0
    calls: list[int] = []
    handle = experts.experts[3].register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    batches = [ids(seed, batch=1, tokens=3) for seed in range(2)]
    for how in ("least_squares", "bias"):
        smaller = copy.deepcopy(model)
        config = PruningConfig("flap" if how == "bias" else "fisher", 0.1, repair=how, iterations=1)
        prune(smaller, batches, lambda b, m=smaller: loss_of(m, b), config)
        assert all(bool(p.isfinite().all()) for p in smaller.parameters())
    handle.remove()
    assert set(calls) == {0}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: _with_adapters("litgpt.lora", lora_r=2, lora_query=True), "litgpt merge_lora"),
        (lambda: _with_adapters("litgpt.adapter"), "train the adapter on the pruned model"),
        (lambda: _with_adapters("litgpt.adapter_v2"), "train the adapter on the pruned model"),
        (lambda: named("OLMo-1B-hf", norm_qk=True, norm_qk_type="olmo2"), "norm_q"),
    ],
    ids=["lora", "adapter", "adapter v2", "norm without weights"],
)
def test_what_does_not_carry_is_refused_by_name(build, words):
    with pytest.raises(UnsupportedModelError, match=words):
        find_group_sets(build())


def _with_adapters(module: str, **fields: object) -> nn.Module:
    import importlib

    from litgpt_package import shrunk

    package = importlib.import_module(module)
    config = shrunk(litgpt.Config.from_name("Llama-3.2-1B"))
    own = {f: getattr(config, f) for f in config.__dataclass_fields__}
    return package.GPT(package.Config(**{**own, **fields}))


def test_shrinking_keeps_what_distinguishes_the_names():
    """The table of names above is one of options: the two kinds of norms over queries and keys, windows, experts, ..."""
    from litgpt_package import shrunk

    configs = [shrunk(litgpt.Config.from_name(name)) for name in NAMES]
    neutral = {"name": "", "hf_config": {}, "rope_base": 1, "rope_adjustments": None, "norm_eps": 1e-5}
    distinct = {repr(replace(c, **neutral)) + str("Gemma" in c.name) + str("OLMo" in c.name) for c in configs}
    assert len(distinct) > 20


def test_uniform_widths_are_those_of_the_same_place_in_each_layer():
    """A dense block beside blocks of experts: each kind of MLP keeps one width, and the three may differ."""
    model = latent(n_layer=3)
    config = PruningConfig("magnitude", 0.3, repair=None, limits=Limits(uniform=True))
    prune(model, [ids()], lambda batch: loss_of(model, batch), config)
    mlps = {s.name: s.size for s in find_group_sets(model) if s.kind == "mlp"}
    assert len({size for name, size in mlps.items() if ".experts." in name}) == 1
    assert len({size for name, size in mlps.items() if "shared" in name}) == 1
    assert sum(".experts." in name for name in mlps) == 2 * 4
    narrower = named("pythia-14m")
    sets = find_group_sets(narrower)
    apply_plan(narrower, PruningPlan.from_kept(sets, [range(s.size - (s.name == sets[1].name)) for s in sets]))
    with pytest.raises(BudgetError, match="uniform plan needs mlp group sets of one size"):
        prune(narrower, [ids()], lambda batch: loss_of(narrower, batch), config)


@pytest.mark.slow
@torch.no_grad()
def test_every_config_that_litgpt_names():
    names = sorted(litgpt.config.name_to_config)
    assert len(names) >= 210
    for name in names:
        model = named(name)
        kept = uneven_kept(find_group_sets(model))
        expected = dense_with_zeros(model, kept)(ids())
        difference = (cut(model)(ids()) - expected).abs().max()
        assert float(difference) < 1e-5 * float(expected.abs().max()), name
