"""A pruned model is saved and loads again in every way that a user has, and what was tampered with does not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from local_assets import write_tokenizer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file
from test_pruning import fit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
)

from conftest import SMALL, tiny, uneven_kept
from lit_prune import (
    PlanError,
    PruningConfig,
    PruningError,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    calibrate,
    find_group_sets,
    get_plan,
    make_plan,
    repair,
)
from lit_prune.callbacks import StructuredPruning
from lit_prune.io.huggingface import convert_checkpoint, load_pruned, save_pruned, to_pretrained
from lit_prune.modeling_pruned import PrunedModelError, from_ranges, resize, to_ranges


def pruned(name="llama", **overrides):
    model = tiny(name, **overrides)
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    return model


def uniform(model, attention=2, mlp=16):
    group_sets = find_group_sets(model)
    kept = [range(1, 1 + (attention if s.kind == "attention" else mlp)) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_pruned(pruned(), tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "overrides"), [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})]
)
@pytest.mark.parametrize("load", [load_pruned, AutoModelForCausalLM.from_pretrained])
def test_what_is_loaded_gives_the_same_logits_and_goes_on_being_pruned(tmp_path, tokens, name, overrides, load):
    model = pruned(name, **overrides)
    save_pruned(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert get_plan(loaded) == get_plan(model)
    assert get_plan(loaded).digest() == get_plan(model).digest()
    assert [s.size for s in find_group_sets(loaded)] == [s.size for s in find_group_sets(model)]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))
    again = PruningPlan.from_kept(find_group_sets(model), [[0] for _ in find_group_sets(model)])
    for each in (model, loaded):
        apply_plan(each, again)
    assert get_plan(loaded).digest() == get_plan(model).digest()
    loaded.save_pretrained(tmp_path / "stock")
    save_pruned(loaded, tmp_path / "again")
    for folder in ("again", "stock"):
        assert torch.equal(load(tmp_path / folder)(tokens).logits, model(tokens).logits)


def test_type_tokenizer_and_generation_config_are_kept(tmp_path, tokens):
    tiny().bfloat16().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    model.generation_config.update(temperature=0.7, do_sample=True)
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "t"))
    save_pruned(model, tmp_path / "model", tokenizer)
    loaded = load_pruned(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.generation_config.temperature == 0.7
    assert load_pruned(tmp_path / "model", dtype=torch.float32).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float16").dtype == torch.float16
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w5 w7")["input_ids"] == [5, 7]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_sharded_files_and_device_maps(tmp_path, tokens, device_map):
    model = pruned()
    save_pruned(model, tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(load_pruned(tmp_path / "model", device_map=device_map)(tokens).logits, model(tokens).logits)
    first = min((tmp_path / "model").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        load_pruned(tmp_path / "model")


def test_layers_go_to_the_disk_and_back(tmp_path, tokens):
    model = pruned()
    save_pruned(model, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    loaded = load_pruned(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_added_biases_are_part_of_the_model(tmp_path, tokens, batches, loss_of):
    model = tiny()
    group_sets, config = find_group_sets(model), PruningConfig(repair="bias", importance="wanda")
    statistics = calibrate(model, group_sets, batches, loss_of(model), config)
    _, plan = make_plan(model, group_sets, statistics, config)
    plan, weights = repair(model, group_sets, plan, statistics, batches, loss_of(model), config)
    apply_plan(model, plan, weights=weights)
    assert plan.biases
    save_pruned(model, tmp_path / "model")
    for loaded in (load_pruned(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_uniform_widths_are_a_stock_model(tmp_path, tokens, overrides):
    model = uniform(tiny(**overrides))
    save_pruned(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (4, 2, 16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert get_plan(load_pruned(tmp_path / "model")).digest() == get_plan(model).digest()
    again = PruningPlan.from_kept(find_group_sets(loaded), uneven_kept(find_group_sets(loaded)))
    apply_plan(loaded, again)
    save_pruned(loaded, tmp_path / "again")
    twice = load_pruned(tmp_path / "again")
    assert type(twice).__name__ == "PrunedLlamaForCausalLM"
    assert twice.config.intermediate_size == SMALL["intermediate_size"]
    assert torch.equal(twice(tokens).logits, loaded(tokens).logits)
    assert {e.size for e in get_plan(twice).entries} == {4, 24}


def test_widths_that_a_stock_config_refuses_are_saved_as_pruned(tmp_path, tokens):
    model = uniform(tiny(), attention=3)  # transformers wants the heads to divide the hidden size
    loaded = load_pruned(save_pruned(model, tmp_path / "model"))
    assert {layer.num_attention_heads for layer in loaded.config.per_layer_config} == {6}
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_task_heads_and_the_bare_model(tmp_path, tokens):
    config = AutoConfig.for_model("llama", **{**SMALL, "num_labels": 3, "pad_token_id": 0})
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    save_pruned(model, tmp_path / "model")
    for loaded in (
        load_pruned(tmp_path / "model"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    bare = AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(bare(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert [s.size for s in find_group_sets(bare)] == [len(e.kept) for e in get_plan(bare).entries] + [4]
    save_pruned(bare, tmp_path / "bare")
    assert torch.equal(load_pruned(tmp_path / "bare")(tokens)[0], bare(tokens)[0])
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    assert torch.equal(headed.model(tokens)[0], bare(tokens)[0])


def without_block(model, layer, widths=False):
    group_sets = find_group_sets(model, blocks=True)
    kept = uneven_kept(group_sets) if widths else [range(s.size) for s in group_sets]
    leaves = [s.kind == "block" and s.layer == layer for s in group_sets]
    kept = [
        [] if gone else range(1) if s.kind == "block" else k
        for gone, s, k in zip(leaves, group_sets, kept, strict=True)
    ]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


def depth_of(folder):
    content = json.loads((folder / "config.json").read_text())
    return content["model_type"], content["num_hidden_layers"], content.get("layer_types")


def test_a_model_that_lost_nothing_but_blocks_is_stock(tmp_path, tokens):
    mixed = {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = without_block(tiny("gemma3_text", num_hidden_layers=4, **mixed), 1)
    folder = save_pruned(model, tmp_path / "model")
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    assert depth_of(folder) == ("gemma3_text", 3, types)
    done = loads(folder, tokens, model, block=WITHOUT)
    assert "loaded Gemma3ForCausalLM" in done.stdout, done.stderr
    assert "| blocks | 4 | 3 |" in (folder / "README.md").read_text()
    # cut and saved again, the plan is that for the model of four layers
    again = without_block(load_pruned(folder), 0)
    save_pruned(again, tmp_path / "again")
    assert depth_of(tmp_path / "again") == ("gemma3_text", 2, types[1:])
    loaded = load_pruned(tmp_path / "again")
    assert get_plan(loaded).removed_blocks == ("model.layers.0", "model.layers.1")
    assert torch.equal(loaded(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("self_contained", [False, True])
def test_blocks_and_widths_together(self_contained, tmp_path, tokens):
    model = without_block(tiny(num_hidden_layers=4), 1, widths=True)
    folder = save_pruned(model, tmp_path / "model", self_contained=self_contained)
    assert depth_of(folder) == ("llama", 3, None)
    if self_contained:
        trusting = {"options": "{'trust_remote_code': True}", "block": WITHOUT}
        done = loads(folder, tokens, model, tmp_path / "again", **trusting)
    else:
        done = loads(folder, tokens, model, tmp_path / "again", imports="import lit_prune", known=True)
    assert "loaded PrunedLlamaForCausalLM" in done.stdout, done.stderr
    for path in (folder, tmp_path / "again"):
        loaded = load_pruned(path)
        assert get_plan(loaded) == get_plan(model)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))
    thinner = without_block(load_pruned(folder), 2, widths=True)
    loaded = load_pruned(save_pruned(thinner, tmp_path / "thinner", self_contained=self_contained))
    assert torch.equal(loaded(tokens).logits, thinner(tokens).logits)
    assert get_plan(loaded).removed_blocks == ("model.layers.1", "model.layers.3")
    assert loaded.config.num_hidden_layers == 2


def test_settings_that_follow_from_the_index_of_a_layer_are_kept(tmp_path, tokens):
    model = without_block(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), 0)
    folder = save_pruned(model, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    assert (content["model_type"], content["n_layer"]) == ("lit_prune", 2)
    assert torch.equal(load_pruned(folder)(tokens).logits, model(tokens).logits)


def test_task_heads_around_fewer_blocks(tmp_path, tokens):
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **{**SMALL, "num_labels": 3, "pad_token_id": 0})
    model = without_block(AutoModelForSequenceClassification.from_config(config).eval(), 1, widths=True)
    folder = save_pruned(model, tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.num_hidden_layers == loaded.model.config.num_hidden_layers == 2
    assert get_plan(loaded) == get_plan(model)
    bare = AutoModel.from_pretrained(folder)
    assert torch.equal(bare(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


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


def test_nothing_is_pickled_and_the_saved_model_is_left_as_it_was(tmp_path, tokens):
    model = pruned()
    before, config = model(tokens).logits, model.config.to_dict()
    folder = save_pruned(model, tmp_path / "model", self_contained=True)
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors", ".md", ".py"}
    assert type(model) is LlamaForCausalLM
    assert model.config.to_dict() == config
    assert torch.equal(model(tokens).logits, before)
    assert to_pretrained(model).lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_nothing_else_is_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("x")
    with pytest.raises(PruningError, match="holds no saved model"):
        save_pruned(pruned(), tmp_path / "notes")
    assert (tmp_path / "notes" / "precious.txt").read_text() == "x"
    with pytest.raises(PruningError, match="was not pruned"):
        save_pruned(tiny(), tmp_path / "dense")
    with pytest.raises(PruningError, match="This Linear was not pruned, nor was a module in it"):
        save_pruned(torch.nn.Linear(2, 2), tmp_path / "linear")


def test_the_card_tells_what_was_cut_and_how_it_did(tmp_path):
    model = tiny()
    group_sets = find_group_sets(model)
    _, plan = make_plan(model, group_sets, None, PruningConfig(importance="magnitude", pruning_ratio=0.2))
    apply_plan(model, plan)
    metrics = {"dense": {"val_perplexity": 7.25}, "recovered": {"val_perplexity": 8.5, "val_loss": 2.0}}
    card = (save_pruned(model, tmp_path / "model", metrics=metrics) / "README.md").read_text()
    after = sum(p.numel() for p in model.parameters())
    for words in (
        f"{after:,} parameters, {1 - after / plan.info['parameters_before']:.1%} fewer",
        "| val_perplexity | 7.25 | 8.5 |",
        "| val_loss |  | 2 |",
        "importance: magnitude",
        "import lit_prune",
        "library_name: transformers",
    ):
        assert words in card
    trusting = (save_pruned(model, tmp_path / "model", self_contained=True) / "README.md").read_text()
    assert "trust_remote_code=True" in trusting and "import lit_prune" not in trusting
    stock = (save_pruned(uniform(tiny()), tmp_path / "model") / "README.md").read_text()
    assert "trust_remote_code" not in stock and "import lit_prune" not in stock


# what lit_prune trains, draws, writes tables and reads the command line with, but does not need to load a model
NOT_NEEDED = {"lightning", "torchmetrics", "datasets", "wandb", "jsonargparse", "pyarrow", "matplotlib"}
LOAD = """
import sys
{block}
import torch
{imports}
from transformers import AutoModelForCausalLM
folder, tokens, expected = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, **{options})
torch.testing.assert_close(model(torch.load(tokens)).logits, torch.load(expected), rtol=0, atol=0)
assert ("lit_prune" in sys.modules) == {known}, sorted(sys.modules)
assert not {not_needed} & set(sys.modules), sorted(sys.modules)
print("loaded", type(model).__name__)
if len(sys.argv) > 4:
    model.save_pretrained(sys.argv[4])
"""


def loads(folder, tokens, model, *more, python=sys.executable, imports="", options="{}", block="", known=False):
    """Load a folder in a fresh process and compare its logits, bit for bit."""
    torch.save(tokens, folder.parent / "tokens.pt")
    torch.save(model(tokens).logits.detach(), folder.parent / "logits.pt")
    script = folder.parent / "load.py"
    script.write_text(LOAD.format(imports=imports, options=options, block=block, known=known, not_needed=NOT_NEEDED))
    command = [python, script, folder, folder.parent / "tokens.pt", folder.parent / "logits.pt", *more]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
    }
    return subprocess.run(
        list(map(str, command)), env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=300
    )


WITHOUT = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lit_prune":
            raise ImportError("lit_prune is not installed here")
sys.meta_path.insert(0, Refuse())
"""


def test_a_self_contained_folder_loads_without_lit_prune_and_saves_itself_again(tmp_path, tokens):
    model = pruned()
    folder = save_pruned(model, tmp_path / "model", self_contained=True)
    trusting = {"options": "{'trust_remote_code': True}", "block": WITHOUT}
    done = loads(folder, tokens, model, tmp_path / "again", **trusting)
    assert "loaded PrunedLlamaForCausalLM" in done.stdout, done.stderr
    done = loads(tmp_path / "again", tokens, model, **trusting)
    assert "loaded PrunedLlamaForCausalLM" in done.stdout, done.stderr
    assert torch.equal(load_pruned(tmp_path / "again")(tokens).logits, model(tokens).logits)
    # code from the folder does not run where lit_prune itself is imported
    done = loads(folder, tokens, model, imports="import lit_prune", known=True)
    assert "loaded PrunedLlamaForCausalLM" in done.stdout, done.stderr
    assert "lit_prune" in (folder / "modeling_pruned.py").read_text()


def test_what_needs_code_of_lit_prune_cannot_be_self_contained(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=32, d_kv=8, num_heads=4, d_ff=24, num_layers=2)
    model = T5ForConditionalGeneration(config).eval()
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    with pytest.raises(UnsupportedModelError, match=r"SelfAttention' became a .* cannot be saved with self_contained"):
        save_pruned(model, tmp_path / "model", self_contained=True)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(save_pruned(model, tmp_path / "model"))
    ids = {"input_ids": torch.arange(2, 9)[None], "decoder_input_ids": torch.arange(2, 6)[None]}
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)


def test_without_lit_prune_a_folder_that_needs_it_says_so_and_a_uniform_one_loads(tmp_path, tokens):
    needs = loads(save_pruned(pruned(), tmp_path / "model"), tokens, pruned(), block=WITHOUT)
    assert needs.returncode != 0
    assert "lit_prune" in needs.stderr
    model = uniform(tiny())
    done = loads(save_pruned(model, tmp_path / "uniform"), tokens, model, block=WITHOUT)
    assert "loaded LlamaForCausalLM" in done.stdout, done.stderr


def with_requirements(*names):
    """Installed distributions and all that they require, extras aside."""
    found, wanted = {}, list(names)
    while wanted:
        name = wanted.pop()
        if canonicalize_name(name) in found:
            continue
        found[canonicalize_name(name)] = package = distribution(name)
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return found.values()


def fresh_environment(folder, *names):
    """A virtual environment that has these packages, shared with this one by links, and what they require."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for package in with_requirements(*names):
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(package.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_fresh_virtual_environments_load_what_was_saved(tmp_path, tokens):
    """One with transformers and the wheel of lit_prune; one with transformers alone."""
    run = {"check": True, "capture_output": True, "text": True, "timeout": 600, "cwd": tmp_path}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, root], **run)
    pythons = {name: fresh_environment(tmp_path / name, "torch", "transformers") for name in ("with", "without")}
    (wheel,) = tmp_path.glob("lit_prune-*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", pythons["with"], *install], **run)
    listed = "from importlib.util import find_spec; print([n for n in {} if find_spec(n)])"
    for name, wanted in (("with", ["lit_prune"]), ("without", [])):
        script = listed.format(sorted({"lit_prune", *NOT_NEEDED}))
        assert subprocess.run([pythons[name], "-c", script], **run).stdout.strip() == str(wanted)
    where = subprocess.run([pythons["with"], "-c", "import lit_prune; print(lit_prune.__file__)"], **run)
    assert str(tmp_path) in where.stdout
    model = pruned()
    folder = save_pruned(model, tmp_path / "model", self_contained=True)
    done = loads(folder, tokens, model, python=pythons["with"], imports="import lit_prune", known=True)
    assert "loaded PrunedLlamaForCausalLM" in done.stdout, done.stderr
    done = loads(folder, tokens, model, python=pythons["without"], options="{'trust_remote_code': True}")
    assert "loaded PrunedLlamaForCausalLM" in done.stdout, done.stderr


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's API as a push needs; keeps the files of the commit."""

    files: dict[str, bytes] = {}

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(404, {"error": "Entry not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/me/small"
        if self.path.endswith("/repos/create"):
            self.answer(200, {"url": address, "id": "me/small"})
        elif self.path.endswith("/validate-yaml"):
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            wanted = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer(200, {"files": [{**f, "shouldIgnore": False} for f in wanted]})
        else:
            assert "/commit/" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{address}/commit/1", "commitOid": "1"})

    def log_message(self, *arguments: object) -> None:
        pass


PUSH = """
import sys, json, torch, lit_prune
from transformers import LlamaConfig, LlamaForCausalLM
model = {model}
if {just_cut}:
    groups = lit_prune.find_group_sets(model)
    kept = [list(range(1 + i % 2, group.size)) for i, group in enumerate(groups)]
    lit_prune.apply_plan(model, lit_prune.PruningPlan.from_kept(groups, kept))
model.push_to_hub("me/small", token="not-a-token")
"""


@pytest.mark.parametrize("just_cut", [False, True])
def test_the_stock_method_pushes_what_loads_again(saved, tmp_path, tokens, just_cut):
    """The client of huggingface_hub against a server on this machine."""
    FakeHub.files.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = "lit_prune.load_pruned(sys.argv[1])"
        if just_cut:
            # the model of a run, which was not saved before
            model = "(torch.manual_seed(0), LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2]))))[1]"
        script = PUSH.format(model=model, just_cut=just_cut)
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, saved, json.dumps(SMALL)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert set(FakeHub.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert "# A pruned llama model" in FakeHub.files["README.md"].decode()
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in FakeHub.files.items():
        (pushed / name).write_bytes(content)
    loaded = load_pruned(pushed)
    if just_cut:
        assert {len(e.kept) for e in get_plan(loaded).entries} == {2, 23}
    else:
        assert torch.equal(loaded(tokens).logits, load_pruned(saved)(tokens).logits)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def plan_of(config):
    groups = [
        {**{k: g[k] for k in ("name", "kind", "layer", "size")}, "kept": from_ranges(g["kept"], g["size"])}
        for g in config["pruning"]["groups"]
    ]
    return PruningPlan.from_dict({"format": "lit_prune.plan", "version": 1, "group_sets": groups})


def both(folder, message, error=PruningError):
    """Whichever way it is loaded, the same is said."""
    with pytest.raises(error, match=message):
        load_pruned(folder)
    with pytest.raises(PrunedModelError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("rest", [100, 2_000])
def test_a_truncated_file_is_refused(saved, rest):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-rest])
    both(saved, "are damaged")


def test_a_missing_tensor_is_refused(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    both(saved, r"lacks the weights \['model.layers.1.mlp.up_proj.weight'\]")


def test_an_unknown_tensor_is_refused(saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    both(saved, r"has unknown weights \['model.layers.1.mlp.extra.weight'\]")


def drop(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        (drop, r"lacks the weights \['model.layers.1.mlp.up_proj.weight'\]", PruningError),
        (lambda w: w.update(extra=torch.zeros(2)), r"has unknown weights \['extra'\]", PruningError),
        (lambda w: w.update({"lm_head.weight": torch.zeros(64, 30)}), r"has shape \(64, 30\); expected", PlanError),
    ],
)
def test_a_stock_model_is_checked_as_strictly(tmp_path, change, message, error):
    folder = save_pruned(uniform(tiny()), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        load_pruned(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(PruningError, match="are damaged"):
        load_pruned(folder)


def test_a_stock_model_is_not_quantised_on_loading(tmp_path):
    folder = save_pruned(uniform(tiny()), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="quantise the loaded model"):
        load_pruned(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_config_that_is_no_json_is_refused(saved):
    file = saved / "config.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(PruningError, match=r"config\.json is damaged"):
        load_pruned(saved)


def test_another_plan_is_refused(saved):
    def keep_less(config):
        group = config["pruning"]["groups"][0]
        group["kept"] = to_ranges(from_ranges(group["kept"], group["size"])[1:])

    edit_config(saved, keep_less)
    both(saved, "was changed after it was saved", PlanError)

    def and_sign_it(config):
        config["pruning"]["digest"] = plan_of(config).digest()

    edit_config(saved, and_sign_it)
    both(saved, "do not fit the plan", PlanError)


def test_a_plan_that_names_other_groups_of_the_same_number_is_refused(saved):
    def keep_others(config):
        group = config["pruning"]["groups"][1]
        removed = set(range(group["size"])) - set(from_ranges(group["kept"], group["size"]))
        group["kept"] = to_ranges(sorted({*from_ranges(group["kept"], group["size"])[1:], removed.pop()}))

    edit_config(saved, keep_others)
    both(saved, "was changed after it was saved", PlanError)


@pytest.mark.parametrize(
    ("change", "with_lit_prune", "without"),
    [
        (lambda c: c["pruning"].update(version=9), "version 9; expected 1", "version 9; expected 1"),
        (lambda c: c["pruning"]["groups"][0].pop("kept"), "malformed: KeyError: 'kept'", "malformed.*KeyError: 'kept'"),
        (lambda c: c["pruning"]["groups"][0].update(kept="1-x"), "found '1-x'", "found '1-x'"),
        (lambda c: c["pruning"]["groups"][0].update(kept="0-99"), "within 0..23", "within 0..23"),
        (lambda c: c["pruning"]["groups"][0]["parameters"].update({"model.no.weight": [0, 1]}), None, "does not fit"),
        (lambda c: c["pruning"].pop("digest"), "has no digest", None),
        (lambda c: c.update(base_model_type="no-such"), "base_model_type 'no-such'", None),
    ],
)
def test_a_config_that_is_wrong_is_refused(saved, change, with_lit_prune, without):
    edit_config(saved, change)
    if with_lit_prune is not None:
        both(saved, with_lit_prune)
    if without is not None:
        config = json.loads((saved / "config.json").read_text())
        with pytest.raises(PrunedModelError, match=without):
            resize(tiny(), config["pruning"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("pruning"), "no pruning entry, and the weights do not fit it"),
        (lambda c: c.update(num_hidden_layers=2), "per_layer_config"),
        (lambda c: c["per_layer_config"].update({"7": {"intermediate_size": 3}}), "per_layer_config"),
        (lambda c: c.update(per_layer_config=[]), "config.json is damaged"),
    ],
)
def test_a_stock_config_that_is_wrong_is_refused(saved, change, message):
    """Transformers reads such a config before lit_prune does, and refuses it in its own words."""
    edit_config(saved, change)
    with pytest.raises(PruningError, match=message):
        load_pruned(saved)
    with pytest.raises(Exception, match=r"\w"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_quantised_models_are_refused(saved, tmp_path):
    with pytest.raises(UnsupportedModelError, match="quantise the loaded model"):
        load_pruned(saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(NotImplementedError, match="quantise the loaded model"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    edit_config(saved, lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))
    with pytest.raises(UnsupportedModelError, match="quantise the loaded model"):
        load_pruned(saved)
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(model.model.layers[0].mlp.up_proj.weight.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="quantised weights"):
        save_pruned(model, tmp_path / "quantised")


def test_what_was_never_pruned_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_pruned(tmp_path)
    tiny().save_pretrained(tmp_path / "dense")
    with pytest.raises(PruningError, match="was not pruned by lit_prune"):
        load_pruned(tmp_path / "dense")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    trainer, module = fit(tmp_path, StructuredPruning("magnitude", epoch=0, repair=None), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.save(module.inner["lm"].state_dict(), tmp_path / "weights.pt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("name", [None, "inner.lm"])
def test_a_lightning_checkpoint_converts(checkpoint, tmp_path, name):
    model = convert_checkpoint(checkpoint, tiny(), name=name)
    expected = torch.load(tmp_path / "weights.pt")
    loaded = load_pruned(save_pruned(model, tmp_path / "model"))
    assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {n: t.tolist() for n, t in expected.items()}


def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path):
    with pytest.raises(PlanError, match="has 2 groups, the plan was made for 4"):
        convert_checkpoint(checkpoint, tiny(num_key_value_heads=2))
    with pytest.raises(PlanError, match=r"embed_tokens.weight' has shape \(64, 32\)"):
        convert_checkpoint(checkpoint, tiny(vocab_size=80))
    with pytest.raises(PruningError, match="0 places with the weights"):
        convert_checkpoint(checkpoint, tiny("qwen3"))
    with pytest.raises(PruningError, match="0 places with the weights"):
        convert_checkpoint(checkpoint, tiny(), name="elsewhere")
    with pytest.raises(FileNotFoundError, match="Consolidate"):
        convert_checkpoint(tmp_path, tiny())
    with pytest.raises(PruningError, match="no state_dict"):
        convert_checkpoint(tmp_path / "weights.pt", tiny())
    trainer, _ = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(PruningError, match="no pruning plan"):
        convert_checkpoint(tmp_path / "dense.ckpt", tiny())


@pytest.mark.parametrize("indices", [[], [0], [0, 1, 2], [3, 5, 6, 9], [0, 2, 4]])
def test_ranges_are_told_in_short_and_back(indices):
    assert from_ranges(to_ranges(indices), 10) == indices
