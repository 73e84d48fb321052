"""A pruned model is saved and loads again, and what was tampered with does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from local_assets import write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny, uneven_kept
from lit_prune import PlanError, PruningError, PruningPlan, UnsupportedModelError, apply_plan, find_group_sets, get_plan
from lit_prune.export import load_pruned, save_pruned


def pruned(name="llama", **overrides):
    model = tiny(name, **overrides)
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    return model


@pytest.mark.parametrize(
    ("name", "overrides"), [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})]
)
def test_what_is_loaded_gives_the_same_logits_and_goes_on_being_pruned(tmp_path, tokens, name, overrides):
    model = pruned(name, **overrides)
    save_pruned(model, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert get_plan(loaded).digest() == get_plan(model).digest()
    assert [s.size for s in find_group_sets(loaded)] == [s.size for s in find_group_sets(model)]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


def test_type_and_tokenizer_are_kept(tmp_path, tokens):
    tiny().bfloat16().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "t"))
    save_pruned(model, tmp_path / "model", tokenizer)
    loaded = load_pruned(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert load_pruned(tmp_path / "model", dtype=torch.float32).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w5 w7")["input_ids"] == [5, 7]


def test_saving_again_replaces_and_leaves_no_temporary_files(tmp_path, tokens):
    first, second = pruned(), pruned("qwen2")
    save_pruned(first, tmp_path / "model")
    save_pruned(second, tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(tokens).logits, second(tokens).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, tokens):
    class Failing:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{")
            raise OSError("disk full")

    model = pruned()
    save_pruned(model, tmp_path / "model")
    with pytest.raises(OSError, match="disk full"):
        save_pruned(pruned("qwen2"), tmp_path / "model", Failing())
    assert torch.equal(load_pruned(tmp_path / "model")(tokens).logits, model(tokens).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_nothing_is_pickled(saved):
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}


def test_nothing_else_is_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("x")
    with pytest.raises(PruningError, match="holds no pruned model"):
        save_pruned(pruned(), tmp_path / "notes")
    assert (tmp_path / "notes" / "precious.txt").read_text() == "x"
    with pytest.raises(PruningError, match="was not pruned"):
        save_pruned(tiny(), tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="found Linear"):
        save_pruned(torch.nn.Linear(2, 2), tmp_path / "linear")


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_pruned(pruned(), tmp_path / "model")


def test_a_truncated_file_is_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PruningError, match=r"model\.safetensors is damaged"):
        load_pruned(saved)


def test_a_missing_tensor_is_refused(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruningError, match=r"lacks the weights \['model.layers.1.mlp.up_proj.weight'\]"):
        load_pruned(saved)


def test_another_plan_is_refused(saved):
    plan = json.loads((saved / "plan.json").read_text())
    plan["group_sets"][0]["kept"] = plan["group_sets"][0]["kept"][1:]
    (saved / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="do not fit the plan beside them"):
        load_pruned(saved)


def test_missing_files_are_named(saved, tmp_path):
    (saved / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no plan\.json"):
        load_pruned(saved)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_pruned(tmp_path)
