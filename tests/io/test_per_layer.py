"""Folders say what single layers have in transformers' ``per_layer_config``, and models are built from that alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from test_export import WITHOUT, edit_config, pruned, without_block
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from conftest import SMALL, tiny, uneven_kept
from lit_prune import PruningPlan, apply_plan, find_group_sets, get_plan, load_pruned, modeling_pruned, save_pruned

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(
        not hasattr(PreTrainedConfig, "per_layer_config"), reason="this transformers knows no such field"
    ),
]

GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
MODELS = {
    "llama": {},
    "qwen3": {"head_dim": 6},
    "gemma3_text": {"head_dim": 6, "sliding_window": 4, "sliding_window_pattern": 2},
    "gemma4_text": GEMMA4,
}


def content(folder):
    return json.loads((folder / "config.json").read_text())


def widths(model):
    """Heads, key/value heads, size of a head and width of the MLP of every layer, read from the weights."""
    for layer in model.get_decoder().layers:
        attention, size = layer.self_attn, layer.self_attn.head_dim
        heads = [getattr(attention, f"{name}_proj", None) for name in "qk"]
        yield (
            *(None if p is None else p.weight.shape[0] // size for p in heads),
            size,
            layer.mlp.up_proj.weight.shape[0],
        )


def said(config):
    for layer in config.per_layer_config:
        yield layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, layer.intermediate_size


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_widths_of_every_layer(tmp_path, name):
    model = pruned(name, **MODELS[name])
    folder = save_pruned(model, tmp_path / "model")
    assert content(folder)["model_type"] == name
    config = type(model.config).from_pretrained(folder)
    assert list(said(config)) == list(widths(model))
    assert len({(heads, width) for heads, _, _, width in widths(model)}) == 3
    # sparse: what a layer has like the rest is said once
    last = content(folder)["per_layer_config"].get("2", {})
    assert "num_attention_heads" not in last


@pytest.fixture
def without_engine(monkeypatch):
    """The modelling file builds models by itself, as where lit_prune is not installed."""
    monkeypatch.setattr(modeling_pruned, "build", modeling_pruned.resize)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_ours_is_read_to_build_the_model(tmp_path, tokens, name, without_engine):
    model = pruned(name, **MODELS[name])
    folder = save_pruned(model, tmp_path / "model")
    whole = (folder / "config.json").read_text()
    edit_config(folder, lambda c: c["pruning"].update(groups=[], biases=[], digest=""))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == f"Pruned{type(model).__name__}"
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    assert torch.equal(loaded.generate(tokens, **options), expected)
    assert torch.equal(loaded.generate(tokens, cache_implementation="static", **options), expected)
    for each in (loaded, model):
        each.set_attn_implementation("eager")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    (folder / "config.json").write_text(whole)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(folder)


def test_gemma_4_is_pruned_through_the_config_that_it_has(tmp_path, tokens):
    model = pruned("gemma4_text", **GEMMA4)
    first = load_pruned(save_pruned(model, tmp_path / "first"))
    apply_plan(first, PruningPlan.from_kept(find_group_sets(first), [[0, 2], [1, 3, 5], [0]]))
    second = AutoModelForCausalLM.from_pretrained(save_pruned(first, tmp_path / "second"))
    assert torch.equal(second(tokens).logits, first(tokens).logits)
    assert get_plan(second).digest() == get_plan(first).digest()
    assert [(layer.head_dim, layer.intermediate_size) for layer in second.config.per_layer_config] == [
        (8, 2),
        (16, 3),
        (16, 1),
    ]


def test_layers_that_left_and_layers_that_differ(tmp_path, tokens, without_engine):
    model = without_block(tiny(num_hidden_layers=4), 1, widths=True)
    folder = save_pruned(model, tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder)
    assert config.num_hidden_layers == 3 and list(said(config)) == list(widths(model))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, model(tokens).logits)


def test_what_the_field_cannot_say_keeps_our_type(tmp_path, tokens):
    """GPT-2 has no size of a head in its config, and Falcon's follows from the number of heads."""
    for name, overrides in (("gpt2", {}), ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4})):
        model = pruned(name, **overrides)
        folder = save_pruned(model, tmp_path / name)
        assert content(folder)["model_type"] == "lit_prune"
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert loaded.config.model_type == name


def test_folders_of_release_0_1_load(tmp_path, tokens, monkeypatch):
    """Those have no per_layer_config, and lit_prune's model type."""
    model = pruned()
    folder = save_pruned(model, tmp_path / "model")

    def as_before(config):
        config.update(model_type="lit_prune", architectures=["PrunedLlamaForCausalLM"])
        for name in ("complete", "dense_layers"):
            config["pruning"].pop(name)
        for name in ("per_layer_config", "allow_global_per_layer_attribute_access"):
            config.pop(name)

    edit_config(folder, as_before)
    for load in (load_pruned, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(folder)(tokens).logits, model(tokens).logits)
    monkeypatch.setattr(modeling_pruned, "build", modeling_pruned.resize)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", MODELS)
def test_stock_classes_of_today_do_not_load_it_as_something_else(tmp_path, tokens, name):
    model = pruned(name, **MODELS[name])
    folder = save_pruned(model, tmp_path / "model")
    if name == "llama" and builds_layers_from_the_field():
        assert torch.equal(type(model).from_pretrained(folder)(tokens).logits, model(tokens).logits)
        return
    with pytest.raises((RuntimeError, ValueError), match=r"per.layer|mismatch|not homogeneous"):
        type(model).from_pretrained(folder)


def builds_layers_from_the_field():
    """Whether the Llama of this transformers builds every layer from its own config."""
    config = LlamaConfig(**SMALL, per_layer_config={0: {"intermediate_size": 5}})
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(config).model.layers[0].mlp.up_proj.out_features == 5
    except RuntimeError:
        return False


@pytest.mark.skipif(not builds_layers_from_the_field(), reason="transformers PR 45332 is not in this version")
def test_stock_llama_loads_the_folder(tmp_path, tokens):
    model = pruned()
    loaded = LlamaForCausalLM.from_pretrained(save_pruned(model, tmp_path / "model"))
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_stock_llama_loads_the_folder_once_its_layers_get_their_own_config(tmp_path, tokens, monkeypatch):
    """What PR 45332 does to the layers of Llama, and no more: the folder has all that this takes."""
    model = pruned()
    folder = save_pruned(model, tmp_path / "model")
    stock = LlamaDecoderLayer.__init__
    own = lambda self, config, layer_idx: stock(self, config.per_layer_config[layer_idx], layer_idx)  # noqa: E731
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", own)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


BACKEND = """
import sys, json, torch
{block}
from transformers import AutoConfig, AutoModel, AttentionInterface
folder = sys.argv[1]
calls = {{}}
def attention(module, query, key, value, mask, scaling=None, heads=None, **kwargs):
    calls[module.layer_idx] = (query.shape[1], key.shape[1], query.shape[3])
    return torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
AttentionInterface.register("of_a_server", attention)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.is_heterogeneous and config.architectures == ["LlamaForCausalLM"], config
config._attn_implementation = "of_a_server"
with torch.device("meta"):
    model = AutoModel.from_config(config, trust_remote_code=True)
model.to_empty(device="cpu")
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
model(torch.arange(6)[None], use_cache=False)
said = {{i: (c.num_attention_heads, c.num_key_value_heads, c.head_dim) for i, c in enumerate(config.per_layer_config)}}
assert calls == said, (calls, said)
print("served", len(set(said.values())))
"""


def test_a_server_builds_the_model_and_gets_each_layers_heads(tmp_path):
    """The calls of vLLM's transformers backend: the config first, then ``AutoModel.from_config`` on the meta device."""
    folder = save_pruned(pruned(), tmp_path / "model", self_contained=True)
    script = tmp_path / "serve.py"
    script.write_text(BACKEND.format(block=WITHOUT))
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.strip() == "served 3", done.stderr


def test_a_bias_that_was_added_keeps_our_type(tmp_path, tokens, without_engine):
    model = tiny()
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    plan = PruningPlan.from_dict({**plan.to_dict(), "biases": ["model.layers.0.mlp.down_proj"]})
    values = {"model.layers.0.mlp.down_proj.bias": torch.ones(32)}
    apply_plan(model, plan, weights=values)
    assert isinstance(model.model.layers[0].mlp.down_proj.bias, nn.Parameter)
    folder = save_pruned(model, tmp_path / "model")
    assert content(folder)["model_type"] == "lit_prune" and "per_layer_config" in content(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert list(said(loaded.config)) == list(widths(model))
