"""A cut model's own ``save_pretrained`` writes what loads again, and nothing that copies or saves models notices."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from test_export import pruned, uniform, without_block
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    LlamaForCausalLM,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTModel,
)

from conftest import tiny, uneven_kept, unsettled
from lit_prune import (
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    get_plan,
    load_pruned,
    save_pruned,
)
from lit_prune.errors import ArgumentValueError
from lit_prune.io.huggingface import to_pretrained
from lit_prune.surgery.apply import cut

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("make", "kind"),
    [(pruned, "llama"), (lambda: uniform(tiny()), "llama"), (lambda: without_block(tiny(), 1), "llama")],
    ids=["uneven", "uniform", "blocks"],
)
def test_save_pretrained_writes_what_loads(tmp_path, tokens, make, kind):
    model = make()
    model.save_pretrained(tmp_path / "model")
    for load in (load_pruned, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(tmp_path / "model")(tokens).logits, model(tokens).logits)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    assert type(model) is LlamaForCausalLM and model.config.model_type == "llama"
    # loaded, cut and saved again
    again = load_pruned(tmp_path / "model")
    apply_plan(again, PruningPlan.from_kept(find_group_sets(again), [[0] for _ in find_group_sets(again)]))
    again.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert torch.equal(load_pruned(tmp_path / "again")(tokens).logits, again(tokens).logits)
    to_pretrained(again).save_pretrained(tmp_path / "third")
    assert torch.equal(load_pruned(tmp_path / "third")(tokens).logits, again(tokens).logits)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, torch_saved])
def test_copies_save_themselves(tmp_path, tokens, copied):
    model = pruned()
    other = copied(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "other")(tokens).logits, other(tokens).logits)
    assert torch.equal(load_pruned(tmp_path / "model")(tokens).logits, model(tokens).logits)
    assert not torch.equal(other(tokens).logits, model(tokens).logits)


SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 8, "patch_size": 4}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("cls", "options", "part"),
    [
        (BertModel, {"add_pooling_layer": False}, "pooler"),
        (RobertaModel, {"add_pooling_layer": False}, "pooler"),
        (ViTModel, {"add_pooling_layer": False}, "pooler"),
        (ViTModel, {"use_mask_token": True}, "embeddings.mask_token"),
    ],
)
def test_what_a_class_was_built_with_beside_its_config_is_not_lost(tmp_path, cls, options, part, hidden):
    fields = {**SIZES, **(PATCHES if cls is ViTModel else {"vocab_size": 64})}

    def build():
        return unsettled(cls(cls.config_class(**fields), **options))

    model = build()
    group_sets = find_group_sets(model, hidden=hidden)
    kept = [range(24) if s.kind == "hidden" else range(s.size - 1) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, [list(k) for k in kept]))
    for save in (to_pretrained, lambda one: one.save_pretrained(tmp_path / "n")):
        with pytest.raises(UnsupportedModelError, match=f"option that its config does not hold.*{part}.*save_pruned"):
            save(model)
    loaded = load_pruned(save_pruned(model, tmp_path / "m"), model=build)
    one = {"pixel_values": torch.randn(2, 3, 8, 8)} if cls is ViTModel else {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        assert torch.equal(loaded(**one).last_hidden_state, model(**one).last_hidden_state)
    assert get_plan(loaded).digest() == get_plan(model).digest()


@pytest.mark.parametrize("make", [pruned, lambda: uniform(tiny()), lambda: without_block(tiny(), 1)])
def test_the_dense_model_is_built_once(tmp_path, monkeypatch, make):
    model, built, init = make(), [], LlamaForCausalLM.__init__

    def counted(self, config, *args, **kwargs):
        built.append(config)
        init(self, config, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counted)
    to_pretrained(model)
    alone = len(built)
    built.clear()
    save_pruned(model, tmp_path / "model")
    assert len(built) == alone


def test_undoing_the_cut_undoes_it(tmp_path):
    model = tiny()
    undo = cut(model, PruningPlan.from_kept(find_group_sets(model), uneven_kept(find_group_sets(model))))
    assert "save_pretrained" in vars(model)
    undo()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"


def test_nothing_is_kept_alive_by_a_loaded_model_or_by_saving(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    gone = weakref.ref(loaded)
    gc.disable()
    try:
        del loaded
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_saved_says_what_to_do(tmp_path):
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(model.model.layers[0].mlp.up_proj.weight.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="quantised weights"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, d_ff=24, num_layers=2)
    model = T5ForConditionalGeneration(config).eval()
    apply_plan(model, PruningPlan.from_kept(find_group_sets(model), uneven_kept(find_group_sets(model))))
    model.save_pretrained(tmp_path / "model")
    ids = {"input_ids": torch.arange(2, 9)[None], "decoder_input_ids": torch.arange(2, 6)[None]}
    assert torch.equal(load_pruned(tmp_path / "model")(**ids).logits, model(**ids).logits)


def test_peft_saves_its_adapters_and_the_merged_model_saves_itself(tmp_path, tokens):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pruned(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(pruned(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_pruned(tmp_path / "merged")(tokens).logits, merged(tokens).logits)


def test_the_trainer_of_transformers_saves_and_resumes(tmp_path, tokens):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def train(steps, resume=None):
        model = pruned()
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2, "seed": 0}
        arguments = TrainingArguments(tmp_path / "run", max_steps=steps, save_steps=2, **options)
        data = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model.eval()

    model = train(4)
    saved = load_pruned(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(saved(tokens).logits, model(tokens).logits)
    resumed = train(4, resume=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(resumed(tokens).logits, model(tokens).logits)


FIRST = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.arange(12)[None]
before = model(tokens).logits
import lit_prune
lit_prune.save_pruned(model, sys.argv[2])
assert torch.equal(lit_prune.load_pruned(sys.argv[2])(tokens).logits, before)
groups = lit_prune.find_group_sets(model)
lit_prune.apply_plan(model, lit_prune.PruningPlan.from_kept(groups, [[0] for _ in groups]))
lit_prune.save_pruned(model, sys.argv[3], self_contained=True)
assert torch.equal(lit_prune.load_pruned(sys.argv[3])(tokens).logits, model(tokens).logits)
"""


@pytest.mark.parametrize("make", [pruned, lambda: pruned("gpt2")], ids=["llama", "gpt2"])
def test_what_was_loaded_by_its_own_code_is_saved_and_cut_again(tmp_path, make):
    save_pruned(make(), tmp_path / "model", self_contained=True)
    folders = [str(tmp_path / name) for name in ("model", "again", "smaller")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run([sys.executable, "-c", FIRST, *folders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_options_of_from_pretrained(tmp_path, tokens):
    model = pruned()
    save_pruned(model, tmp_path / "parent" / "model")
    loaded = load_pruned(tmp_path / "parent", subfolder="model")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    folder = tmp_path / "parent" / "model"
    for options in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        assert load_pruned(folder, **options).dtype == torch.bfloat16
    loaded, info = load_pruned(folder, output_loading_info=True)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits) and not info["missing_keys"]
    with pytest.raises(ArgumentValueError, match="two names of one argument"):
        load_pruned(folder, dtype="float32", torch_dtype="bfloat16")
    for name in ("blah", "int8"):
        with pytest.raises(ArgumentValueError, match="dtype must be a floating type"):
            load_pruned(folder, dtype=name)
