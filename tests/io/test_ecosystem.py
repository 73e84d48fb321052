"""Other libraries use pruned models as they use any: peft, transformers' Trainer, accelerate."""

from __future__ import annotations

import copy

import pytest
import torch
from test_export import pruned
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lit_prune import load_pruned, save_pruned

pytestmark = pytest.mark.core


def test_peft_knows_a_loaded_model_by_its_type(tmp_path, tokens):
    """The modules to adapt are not given: peft looks them up by ``model_type``."""
    peft = pytest.importorskip("peft")
    folder = save_pruned(pruned(), tmp_path / "model")
    model = peft.get_peft_model(load_pruned(folder), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert any("q_proj.lora_A" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_pruned(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(automatic(tokens).logits, model(tokens).logits)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="10KB")
    assert (tmp_path / "merged" / "README.md").read_text().count("# A pruned llama model") == 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits, merged(tokens).logits)


def test_the_best_checkpoint_of_a_trainer_is_loaded_at_the_end(tmp_path, tokens):
    pytest.importorskip("accelerate")
    model = pruned()
    data = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]
    # the largest loss counts as the best, which is not the last one
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 10.0, "seed": 0}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "max_steps": 3}
    arguments = TrainingArguments(tmp_path / "run", **options)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = load_pruned(trainer.state.best_model_checkpoint)
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    step = max(losses, key=losses.get)
    assert step < 3 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert torch.equal(model.eval()(tokens).logits, best(tokens).logits)
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(load_pruned(tmp_path / "saved")(tokens).logits, best(tokens).logits)


def test_accelerate_places_the_layers_of_a_folder(tmp_path, tokens):
    pytest.importorskip("accelerate")
    model = pruned()
    folder = save_pruned(model, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(placed(tokens).logits, model(tokens).logits)
    placed.save_pretrained(tmp_path / "again")
    assert torch.equal(load_pruned(tmp_path / "again")(tokens).logits, model(tokens).logits)
