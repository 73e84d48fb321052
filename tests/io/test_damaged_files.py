"""Files that are damaged, or were tampered with, end in one clear error, and none of their code is run."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from local_assets import write_model
from safetensors.torch import load_file, save_file
from test_export import edit_config, pruned, uniform
from transformers import AutoModelForCausalLM

from conftest import tiny, uneven_kept
from lit_prune import PlanError, PruningError, PruningPlan, UnsupportedModelError, apply_plan, find_group_sets
from lit_prune._files import read_json
from lit_prune.io.conversion import convert_checkpoint
from lit_prune.io.gguf import check_output
from lit_prune.io.huggingface import save_pruned
from lit_prune.io.lightning_checkpoint import rebuild_from_checkpoint
from lit_prune.io.loading import load_pruned
from lit_prune.io.manifest import MANIFEST
from lit_prune.io.sources import gguf_file, load_model
from lit_prune.modeling_pruned import PrunedModelError, from_ranges
from lit_prune.plan import PlanEntry

INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    save_pruned(pruned(), place / "whole")
    save_pruned(pruned(), place / "sharded", max_shard_size="10KB")
    save_pruned(uniform(tiny()), place / "stock")
    return place


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(name):
        return shutil.copytree(folders / name, tmp_path / name)

    return copy


def put(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("kind", ["whole", "stock"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected a JSON object; found list"),
        ("null", "expected a JSON object; found NoneType"),
        ("{", "is not JSON"),
        ("\xff\x00", "is not JSON|expected"),
        ("", "is not JSON"),
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_config_that_is_no_object(copy_of, kind, content, said):
    folder = copy_of(kind)
    put(folder, "config.json", content)
    with pytest.raises(PruningError, match=said):
        load_pruned(folder)


@pytest.mark.parametrize("kind", ["whole", "stock"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(dtype="float99"), "dtype 'float99'"),
        (lambda c: c.update(dtype="int8"), "dtype 'int8'"),
        (lambda c: c.update(dtype=["float32"]), "expected a floating type"),
        (lambda c: c.update(architectures=["PrunedNoSuchModel"]), "model class.*PrunedNoSuchModel"),
        (lambda c: c.update(architectures=["pipeline"]), "model class.*pipeline"),
        (lambda c: c.update(architectures=["LlamaConfig"]), "model class.*LlamaConfig"),
        (lambda c: c.update(architectures=["PreTrainedModel"]), "model class.*PreTrainedModel"),
        (lambda c: c.update(architectures=[5]), r"model class \[5\]"),
        (lambda c: c.update(architectures="LlamaForCausalLM"), "model class 'LlamaForCausalLM'"),
        (lambda c: c.update(architectures=[]), "names no model class"),
        (lambda c: c.update(architectures=["BertModel"]), "do not belong together"),
        (lambda c: c.update(hidden_size="wide"), "config.json is damaged|malformed"),
        (lambda c: c.update(num_attention_heads=0), "config.json is damaged|malformed|not fit"),
        (lambda c: c.update(hidden_size=10**9), r"do not fit the plan|config.json is damaged"),
        (lambda c: c.update(model_type="no-such"), "model_type 'no-such'"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.update(pruning=[]), "pruning entry"),
        (lambda c: c["pruning"].update(groups=5), "malformed"),
        (lambda c: c["pruning"].update(biases="mlp"), "expected a list|Expected a list"),
        (lambda c: c["pruning"].update(biases=5), "malformed|Expected a list"),
        (lambda c: c["pruning"].update(info=[]), "malformed"),
        (lambda c: c["pruning"]["groups"][0].update(kept="0-99999999999"), "within 0"),
        (lambda c: c["pruning"]["groups"][0].update(kept="0-99999999999", size=10**11), "number of groups from 0"),
        (lambda c: c["pruning"]["groups"][0].update(kept="5-3"), "ascending"),
        (lambda c: c["pruning"]["groups"][0].update(kept="-1"), "malformed|Expected"),
        (lambda c: c["pruning"]["groups"][0].update(kept=5), "malformed"),
        (lambda c: c["pruning"]["groups"][0].update(size="24"), "malformed"),
    ],
)
def test_a_config_with_a_wrong_value(copy_of, kind, change, said):
    folder = copy_of(kind)
    edit_config(folder, change)
    with pytest.raises(PruningError, match=said):
        load_pruned(folder)


def test_the_type_of_another_family(copy_of):
    folder = copy_of("whole")
    edit_config(folder, lambda c: c.update(base_model_type="mistral"))
    with pytest.raises(PruningError, match="do not belong together; expected the type of LlamaConfig"):
        load_pruned(folder)
    with pytest.raises(PrunedModelError, match="do not belong together"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: "{", "is damaged"),
        (lambda i: DEEP, "is damaged"),
        (lambda i: [], "is damaged"),
        (lambda i: {"metadata": {}}, "is damaged.*weight_map"),
        (lambda i: {"weight_map": ["a"]}, "is damaged"),
        (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], 5)}, "names the file 5"),
        (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "../outside.safetensors")}, "in the same folder"),
        (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "/outside.safetensors")}, "in the same folder"),
        (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "..")}, "in the same folder"),
        (lambda i: {"weight_map": {}}, "names the file ''"),
        (lambda i: {**i, "weight_map": dict.fromkeys(i["weight_map"], "gone.safetensors")}, "has no file gone"),
        (lambda i: {"weight_map": i["weight_map"]}, "is damaged.*'metadata'"),
        (lambda i: {**i, "metadata": 5}, "is damaged.*'metadata'"),
    ],
)
def test_a_list_of_shards_that_is_wrong(copy_of, tmp_path, change, said):
    folder = copy_of("sharded")
    save_file({"lm_head.weight": torch.zeros(64, 32)}, tmp_path / "outside.safetensors")
    put(folder, INDEX, change(json.loads((folder / INDEX).read_text())))
    with pytest.raises((PruningError, FileNotFoundError), match=said):
        load_pruned(folder)
    with pytest.raises((PrunedModelError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_is_no_folder_is_refused_before_anybody_is_asked(copy_of):
    folder = copy_of("whole")
    with pytest.raises(PruningError, match=r"config\.json is a file; expected the folder"):
        load_pruned(folder / "config.json")
    with pytest.raises(TypeError, match="directory must be a path"):
        load_pruned(5)


def test_the_name_of_a_checkpoint_in_place_of_it_is_refused():
    with pytest.raises(TypeError, match=r"checkpoint must be the loaded checkpoint.*found str"):
        rebuild_from_checkpoint(tiny(), "last.ckpt")


def test_a_shard_that_is_missing_or_cut_short(copy_of):
    folder = copy_of("sharded")
    shards = sorted(folder.glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    for load, error in ((load_pruned, PruningError), (AutoModelForCausalLM.from_pretrained, PrunedModelError)):
        with pytest.raises(error, match=rf"are damaged: {shards[1].name}"):
            load(folder)
    shards[1].unlink()
    for load in (load_pruned, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FileNotFoundError, match=rf"has no file {shards[1].name}"):
            load(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_pruned(folder)


@pytest.mark.parametrize("kind", ["whole", "stock"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.to(torch.int8), "has the type I8; expected a floating one"),
        (lambda t: t > 0, "has the type BOOL"),
        (lambda t: t.to(torch.int64), "has the type I64"),
        (lambda t: torch.where(t == t.max(), torch.nan, t), "not finite"),
        (lambda t: torch.where(t == t.max(), -torch.inf, t), "not finite"),
    ],
)
def test_weights_that_no_model_has(copy_of, kind, change, said):
    folder = copy_of(kind)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruningError, match=rf"{name}' .*{said}"):
        load_pruned(folder)
    if kind == "whole":
        with pytest.raises(PrunedModelError, match=said):
            AutoModelForCausalLM.from_pretrained(folder)


def test_checksums_tell_other_weights(copy_of, tmp_path):
    for name in ("whole", "sharded"):
        folder = copy_of(name)
        load_pruned(folder, verify=True)
        file = min(folder.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        load_pruned(folder)
        with pytest.raises(PruningError, match=rf"{file.name} is not the file that was saved: its SHA-256"):
            load_pruned(folder, verify=True)
    put(folder, MANIFEST, '{"format": "lit_prune._files", "version": 1, "files": {"../x.safetensors": {}}}')
    with pytest.raises(PruningError, match=r"names '\.\./x\.safetensors'"):
        load_pruned(folder, verify=True)
    (folder / MANIFEST).unlink()
    with pytest.raises(PruningError, match="cannot be verified"):
        load_pruned(folder, verify=True)


def test_code_beside_the_weights_is_never_run(copy_of, monkeypatch):
    folder = copy_of("whole")
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for kind in ("no-such", "lit_prune"):
        edit_config(
            folder,
            lambda c, kind=kind: c.update(
                model_type=kind, auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_evil.Evil")
            ),
        )
        if kind == "no-such":
            with pytest.raises(UnsupportedModelError, match="Code from the folder is not run"):
                load_pruned(folder)
        else:
            assert load_pruned(folder, trust_remote_code=True).config.base_model_type == "llama"


def test_a_folder_of_stock_weights_and_one_of_cut_ones_without_a_plan(tmp_path):
    tiny().save_pretrained(tmp_path / "dense")
    with pytest.raises(PruningError, match=r"was not pruned by lit_prune\. Load it with transformers"):
        load_pruned(tmp_path / "dense")
    model = pruned()
    type(model).save_pretrained(model, tmp_path / "cut")  # as before
    with pytest.raises(PruningError, match=r"saved by its own save_pretrained\?.*save_pruned"):
        load_pruned(tmp_path / "cut")


def plan_file(tmp_path, change):
    model = tiny()
    plan = PruningPlan.from_kept(find_group_sets(model), uneven_kept(find_group_sets(model)))
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    changed = change(data)
    return changed if isinstance(changed, str) and changed[:1] in "n[{" else data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: "null", "expected a mapping"),
        (lambda d: DEEP, "nested too deeply"),
        (lambda d: "{", "is not JSON"),
        (lambda d: d.update(version=9), "reads versions 1 and 2"),
        (lambda d: d.update(biases="mlp"), "expected a list, found 'mlp'"),
        (lambda d: d.update(biases=5), "expected a list, found 5"),
        (lambda d: d.update(biases={"a": 1}), "expected a list"),
        (lambda d: d.update(biases=[5]), "expected text, found 5"),
        (lambda d: d.update(info=[1]), "expected a mapping of info"),
        (lambda d: d.update(group_sets="abc"), "expected a list"),
        (lambda d: d.update(group_sets={}), "expected a list"),
        (lambda d: d.update(group_sets=[5]), "malformed"),
        (lambda d: d.update(model=[["a", "mlp"]]), "malformed"),
        (lambda d: d.update(model="abc"), "expected a list"),
        (lambda d: d["group_sets"][0].update(kept="0-99999999999"), "within 0"),
        (lambda d: d["group_sets"][0].update(kept="0-99999999999", size=10**11), "from 0 to"),
        (lambda d: d["group_sets"][0].update(kept="9-3"), "ascending"),
        (lambda d: d["group_sets"][0].update(kept=[0, 1.5]), "expected integers, found 1.5"),
        (lambda d: d["group_sets"][0].update(kept=[0, True]), "expected integers, found True"),
        (lambda d: d["group_sets"][0].update(kept=[3, 2]), "ascending"),
        (lambda d: d["group_sets"][0].update(size=-1), "from 0 to|within"),
        (lambda d: d["group_sets"][0].pop("name"), "malformed"),
    ],
)
def test_a_plan_that_is_damaged(tmp_path, change, said):
    put(tmp_path, "plan.json", plan_file(tmp_path, change))
    with pytest.raises(PlanError, match=said):
        PruningPlan.load(tmp_path / "plan.json")


# "10-" was read as "10", and what int() reads besides ASCII digits as numbers
@pytest.mark.parametrize(
    "text",
    ["1-", "-1", "0-", "-", "0 1-", "0--1", "0-1-2", "0-1_0", "1_0", "+1", "\uff10-\uff11", "\u0661", "0,1", "0x1"],
)
def test_ranges_that_are_not_numbers_in_full(tmp_path, text):
    put(tmp_path, "plan.json", plan_file(tmp_path, lambda d: d["group_sets"][0].update(kept=text)))
    with pytest.raises(PlanError, match="Expected indices like '0-2 5'"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(PrunedModelError, match="Expected indices like '0-2 5'"):
        from_ranges(text, 100)


@pytest.mark.parametrize("index", ["\uff10", "\u00b2", "0_0", "+0", " 0"])
def test_blocks_are_named_by_ascii_digits(index):
    depth = PruningPlan((PlanEntry("layers", "block", 0, 3, (0, 1)),))
    later = PruningPlan((PlanEntry(f"layers.{index}.mlp", "mlp", 0, 4, (0,)),))
    with pytest.raises(PlanError, match="is in none of the 2 blocks"):
        depth.compose(later)


def test_a_plan_that_is_no_file(tmp_path):
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        PruningPlan.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.json"):
        PruningPlan.load(tmp_path / "absent.json")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(PlanError, match="is not JSON"):
        PruningPlan.load(tmp_path / "binary")
    with pytest.raises(PruningError, match="is not JSON"):
        read_json(tmp_path / "binary")


def test_plans_are_written_as_ranges_and_the_old_form_is_read(tmp_path):
    model = tiny()
    plan = PruningPlan.from_kept(find_group_sets(model), uneven_kept(find_group_sets(model)), {"a": 1})
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert all(isinstance(entry["kept"], str) for entry in data["group_sets"])
    again = PruningPlan.load(tmp_path / "plan.json")
    assert (again, again.info, again.sets) == (plan, plan.info, plan.sets)
    old = {
        "format": "lit_prune.plan",
        "version": 1,
        "biases": [],
        "info": {},
        "group_sets": [
            {"name": e.name, "kind": e.kind, "layer": e.layer, "size": e.size, "kept": list(e.kept)}
            for e in plan.entries
        ],
    }
    put(tmp_path, "old.json", old)
    assert PruningPlan.load(tmp_path / "old.json") == plan
    assert PruningPlan.load(tmp_path / "old.json").digest() == plan.digest()
    # what this digest was before plans were written as ranges
    fixed = PruningPlan((PlanEntry("model.layers.0.mlp", "mlp", 0, 4, (0, 2)),))
    assert fixed.digest() == "0be93ca8a6f558793f8eb238e05e2f4c1f8882c14d30fdefd56b43e2a58560f7"
    assert from_ranges("", 0) == []


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 4}, {"num_hidden_layers": 5}])
def test_a_plan_knows_its_model(tmp_path, overrides):
    model = tiny()
    plan = PruningPlan.from_kept(find_group_sets(model), uneven_kept(find_group_sets(model)))
    plan.save(tmp_path / "plan.json")
    other = tiny(**overrides)
    before = {n: p.clone() for n, p in other.named_parameters()}
    for given in (plan, PruningPlan.load(tmp_path / "plan.json")):
        with pytest.raises(PlanError, match=r"made for another model.*layers\.3.*6 group sets in all"):
            apply_plan(other, given)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    # the sets that the plan leaves whole, too, are known
    sets = find_group_sets(model)
    first = PruningPlan.from_kept(sets, [range(1, s.size) if s.layer == 0 else range(s.size) for s in sets])
    narrower = tiny()
    narrower.model.layers[2].mlp = tiny(intermediate_size=20).model.layers[2].mlp
    with pytest.raises(PlanError, match=r"made for another model: one with 24 groups at 'model.layers.2.mlp'.* has 20"):
        apply_plan(narrower, first)
    composed = plan.compose(PruningPlan(()))
    assert composed.sets == plan.sets
    apply_plan(model, composed)


def checkpoint(tmp_path, change=lambda c: None):
    model = tiny()
    plan = PruningPlan.from_kept(find_group_sets(model), uneven_kept(find_group_sets(model)))
    apply_plan(model, plan)
    state = {
        "format": "lit_prune.plan",
        "model_path": None,
        "plan": plan.to_dict(),
        "digests": {"start": None, "now": plan.digest()},
    }
    content = {
        "state_dict": {f"lm.{n}": v for n, v in model.state_dict().items()},
        "callbacks": {"StructuredPruning": state},
    }
    content = change(content) or content
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["callbacks"]["StructuredPruning"]["digests"].update(now="0" * 64), "its digest is"),
        (lambda c: c["callbacks"]["StructuredPruning"].update(digests=None), "malformed"),
        (
            lambda c: c["callbacks"]["StructuredPruning"]["plan"]["group_sets"][0].update(kept="0"),
            "its digest is",
        ),
        (lambda c: c["callbacks"]["StructuredPruning"].update(plan=[]), "Not a pruning plan"),
        (lambda c: c.update(callbacks=None), "holds no pruning plan"),
        (lambda c: c.update(state_dict=[]), "has no state_dict"),
        (
            lambda c: c["state_dict"]["lm.lm_head.weight"].fill_(torch.nan),
            "lm_head.weight' has values that are not finite",
        ),
        (lambda c: [1], "has no state_dict"),
    ],
)
def test_a_checkpoint_that_is_damaged(tmp_path, change, said):
    file = checkpoint(tmp_path, lambda c: result if isinstance(result := change(c), list) else None)
    model = tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PruningError, match=said):
        convert_checkpoint(file, model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)), b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00."])
def test_a_checkpoint_that_is_none(tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(PruningError, match=r"damaged, or holds more|has no state_dict"):
        convert_checkpoint(tmp_path / "last.ckpt", tiny())


def test_a_checkpoint_as_it_was_saved_converts(tmp_path, tokens):
    model = convert_checkpoint(checkpoint(tmp_path), tiny())
    assert torch.equal(model(tokens).logits, pruned()(tokens).logits)


def test_a_package_inside_another_is_not_imported(tmp_path, monkeypatch):
    inner = tmp_path / "outer_of_models" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="ships none"):
        gguf_file("package:outer_of_models.inner")
    (inner / "weights.gguf").touch()
    assert gguf_file("package:outer_of_models.inner") == inner / "weights.gguf"
    assert not {"outer_of_models", "outer_of_models.inner"} & set(sys.modules)
    for name in ("", ".", "a..b", "outer_of_models.absent", "absent.inner", "__main__"):
        with pytest.raises(FileNotFoundError, match="GGUF file in the installed package"):
            gguf_file(f"package:{name}")


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"model_type": "no-such"}', DEEP])
def test_a_config_to_build_from_that_is_damaged(tmp_path, content):
    put(tmp_path, "config.json", content)
    with pytest.raises(PruningError, match=r"config\.json"):
        load_model(str(tmp_path / "config.json"), random_weights=True)


def test_a_gguf_file_replaces_nothing_but_one(tmp_path):
    folder = write_model(tmp_path / "model")
    for name, said in (("model.safetensors", "no GGUF file"), (".", "is a folder"), ("config.json/x", "not a folder")):
        with pytest.raises(PruningError, match=said):
            check_output(folder / name)
    (tmp_path / "old.gguf").write_bytes(b"GGUF old")
    check_output(tmp_path / "old.gguf")
    check_output(tmp_path / "new" / "model.gguf")
