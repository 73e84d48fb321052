"""Models with a smaller hidden size load again: stock ones in plain transformers, the others with their plan."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from hidden_cases import MODELS, hidden_plan, logits, some
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import SMALL, uneven_kept, unsettled
from lit_prune import apply_plan, find_group_sets, get_plan, modeling_pruned
from lit_prune.io.huggingface import load_pruned, save_pruned, to_pretrained

# a config of these has no field for the size of a head
WITHOUT_HEAD_DIM = ("gpt2", "bert")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def narrower(name, others=None, count=24):
    model = MODELS[name]()
    rest = None if others is None else others(find_group_sets(model))
    apply_plan(model, hidden_plan(model, some(32, count), rest))
    return model


def in_proportion(group_sets):
    """Three quarters of the heads of every layer, all MLP channels."""
    return [list(range(s.size * 3 // 4)) if s.kind == "attention" else list(range(s.size)) for s in group_sets]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", [n for n in MODELS if n not in WITHOUT_HEAD_DIM])
def test_hidden_size_alone_is_stock(name, tmp_path):
    model = narrower(name)
    folder = save_pruned(model, tmp_path / "m")
    config = config_of(folder)
    assert (config["model_type"], config["hidden_size"]) == (MODELS[name]().config.model_type, 24)
    plain = getattr(transformers, type(model).__name__).from_pretrained(folder)
    assert "lit_prune" not in type(plain).__module__
    close(logits(plain.eval()), logits(model))
    again = load_pruned(folder)
    assert get_plan(again).digest() == get_plan(model).digest()
    assert [s.size for s in find_group_sets(again, hidden=True)] == [
        s.size for s in find_group_sets(model, hidden=True)
    ]
    # it can be pruned, saved and loaded further
    kept = some(24, 16)
    for one in (again, model):
        apply_plan(one, hidden_plan(one, kept))
    close(logits(load_pruned(save_pruned(again, tmp_path / "n")).eval()), logits(model))


@pytest.mark.parametrize("name", WITHOUT_HEAD_DIM)
def test_stock_where_heads_leave_in_proportion(name, tmp_path):
    model = narrower(name, in_proportion)
    folder = save_pruned(model, tmp_path / "m")
    assert config_of(folder)["model_type"] == MODELS[name]().config.model_type
    close(logits(getattr(transformers, type(model).__name__).from_pretrained(folder).eval()), logits(model))
    alone = narrower(name)
    folder = save_pruned(alone, tmp_path / "n")
    assert config_of(folder)["model_type"] == "lit_prune"
    assert torch.equal(logits(load_pruned(folder)), logits(alone))


@pytest.mark.parametrize("name", MODELS)
def test_mixed_with_uneven_layers(name, tmp_path):
    model = narrower(name, uneven_kept)
    folder = save_pruned(model, tmp_path / "m")
    assert config_of(folder)["model_type"] in ("lit_prune", MODELS[name]().config.model_type)
    loaded = load_pruned(folder)
    assert loaded.config.hidden_size == model.config.hidden_size == 24
    assert torch.equal(logits(loaded), logits(model))
    # the code that lies beside the weights of a self-contained folder
    rebuilt = to_pretrained(model, self_contained=True)
    config = copy.deepcopy(rebuilt.config)
    fields = {**config.to_dict(), **config.pruning["dense_width"], "per_layer_config": None}
    dense = type(MODELS[name]().config).from_dict(fields)
    by_itself = type(model)(dense).eval()
    modeling_pruned.resize(by_itself, config.pruning)
    by_itself.load_state_dict(model.state_dict())
    by_itself.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(logits(by_itself), logits(model))


@pytest.mark.parametrize(("kind", "name"), [("vit", "ViTModel"), ("deit", "DeiTModel")])
def test_a_pooler_is_stock_and_as_wide_as_the_hidden_size(kind, name, tmp_path):
    sizes = {k: v for k, v in SMALL.items() if k in ("hidden_size", "num_attention_heads", "intermediate_size")}
    config = CONFIG_MAPPING[kind](**sizes, num_hidden_layers=2, image_size=8, patch_size=4)
    model = unsettled(getattr(transformers, name)(config))
    apply_plan(model, hidden_plan(model, some(32, 24)))
    assert model.config.pooler_output_size == model.config.hidden_size == 24
    folder = save_pruned(model, tmp_path / "m")
    written = config_of(folder)
    assert (written["model_type"], written["hidden_size"], written["pooler_output_size"]) == (kind, 24, 24)
    images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        for loaded in (getattr(transformers, name).from_pretrained(folder).eval(), load_pruned(folder)):
            close(loaded(**images).pooler_output, model(**images).pooler_output)


def test_without_head_and_with_another(tmp_path):
    model = narrower("llama-tied", uneven_kept)
    folder = save_pruned(model, tmp_path / "m")
    inner = transformers.AutoModel.from_pretrained(folder)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        close(inner.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert other.score.weight.shape == (3, 24)
    other.config.pad_token_id = 0
    assert other(ids).logits.shape == (1, 3)
