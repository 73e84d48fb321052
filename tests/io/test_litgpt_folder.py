"""Folders of pruned models of LitGPT: LitGPT itself reads its form, and lit_prune reads both."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from litgpt_package import FOLDER, ids, import_litgpt, named
from local_assets import write_tokenizer
from test_litgpt import cut, latent, loss_of
from torch import nn

from lit_prune import (
    Limits,
    PlanError,
    PruningConfig,
    PruningError,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    get_plan,
    load_pruned,
    prune,
    save_pruned,
)
from lit_prune.groups import BLOCK
from lit_prune.io.litgpt_folder import load_litgpt, save_litgpt

litgpt = import_litgpt()


def uniform(model: nn.Module, ratio: float = 0.15, **limits: object) -> nn.Module:
    config = PruningConfig("magnitude", ratio, repair=None, iterations=1, limits=Limits(uniform=True, **limits))
    prune(model, [ids()], lambda batch: loss_of(model, batch), config)
    return model


def without_blocks(model: nn.Module, gone: list[int]) -> nn.Module:
    group_sets = find_group_sets(model, blocks=True)
    kept = [[] if s.kind == BLOCK and s.layer in gone else list(range(s.size)) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


def halved_experts() -> nn.Module:
    """Experts half as wide, and the shared ones as they were, which then are twice as many of the narrow ones."""
    model = latent()
    group_sets = find_group_sets(model)
    kept = [range(0, s.size, 2) if ".experts." in s.name else range(s.size) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


def tied() -> nn.Module:
    model = named("Gemma-2-2b")
    model.lm_head.weight = model.transformer.wte.weight
    return model


STOCK = {
    "heads and channels": lambda: uniform(named("Llama-3.2-1B")),
    "query heads": lambda: uniform(named("falcon-7b")),
    "norms over all heads": lambda: uniform(named("OLMo-2-1124-13B")),
    "biases": lambda: uniform(named("pythia-14m")),
    "experts": lambda: uniform(named("Mixtral-8x7B-v0.1")),
    "latent attention, dense and other MLPs": lambda: uniform(
        latent(n_layer=3), protect=["shared_experts"], kinds=["attention"]
    ),
    "a dense block, experts": lambda: uniform(latent(n_layer=3, n_shared_expert=None), 0.2),
    "narrower experts beside shared ones": halved_experts,
    "tied embeddings": lambda: uniform(tied()),
    "blocks": lambda: without_blocks(
        named("Gemma-3-1b-it", 4, rope_indices=[0, 1, 1, 0], sliding_window_indices=[0, 1, 1, 0]), [0, 2]
    ),
    "the only dense block": lambda: without_blocks(latent(n_layer=3), [0]),
}
OPEN = """
import sys
import torch
import lightning as L
sys.path.append(sys.argv[2])
from pathlib import Path
from litgpt import GPT, Config
from litgpt.utils import check_valid_checkpoint_dir, load_checkpoint
folder = Path(sys.argv[1])
check_valid_checkpoint_dir(folder, raise_error=True)
fabric = L.Fabric(accelerator="cpu", devices=1)
model = GPT(Config.from_file(folder / "model_config.yaml")).eval()
load_checkpoint(fabric, model, folder / "lit_model.pth")
with torch.no_grad():
    torch.save(model(torch.load(folder.parent / "ids.pt")), folder.parent / "logits.pt")
from litgpt import LLM
llm = LLM.load(str(folder))
print(llm.generate("w2 w3 w4", max_new_tokens=4, temperature=0.0))
assert not any(name.split(".")[0] == "lit_prune" for name in sys.modules)
"""


@pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in STOCK.items()])
@torch.no_grad()
def test_litgpt_builds_and_loads_a_uniform_model(tmp_path, build):
    model = build()
    expected = model(ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pruned(model, tmp_path / "model")
    config = litgpt.Config.from_file(tmp_path / "model" / "model_config.yaml")
    theirs = litgpt.GPT(config).eval()
    theirs.load_state_dict(torch.load(tmp_path / "model" / "lit_model.pth", weights_only=True))
    assert torch.equal(theirs(ids()), expected)
    ours = load_pruned(tmp_path / "model", verify=True)
    assert torch.equal(ours(ids()), expected)
    assert get_plan(ours) == get_plan(model)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == (
        model.lm_head.weight is model.transformer.wte.weight
    )
    ours.set_kv_cache(batch_size=2)
    assert torch.isfinite(ours(ids(tokens=4), torch.arange(4))).all()


@pytest.mark.slow
def test_another_process_opens_the_folder_without_lit_prune(tmp_path):
    """``Config.from_file`` with ``load_checkpoint``, and ``litgpt.LLM.load``, with the tokenizer that was copied."""
    source = write_tokenizer(tmp_path / "dense")
    model = uniform(named("Llama-3.2-1B"))
    save_pruned(model, tmp_path / "model", source)
    torch.save(ids(), tmp_path / "ids.pt")
    arguments = [sys.executable, "-c", OPEN, str(tmp_path / "model"), str(FOLDER)]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids()))
    assert "w" in ran.stdout


@pytest.mark.parametrize("name", ["Gemma-3-1b-it", "OLMo-2-1124-13B", "Mixtral-8x7B-v0.1", "latent", "tied"])
@torch.no_grad()
def test_a_model_that_no_config_describes_is_saved_in_our_form(tmp_path, name):
    model = cut(latent() if name == "latent" else tied() if name == "tied" else named(name))
    with pytest.warns(UserWarning, match=r"LitGPT itself cannot load .* is \d+ at transformer\.h\.0"):
        save_pruned(model, tmp_path / "model")
    assert not (tmp_path / "model" / "lit_model.pth").exists()
    loaded = load_pruned(tmp_path / "model", verify=True)
    assert torch.equal(loaded(ids()), model(ids()))
    assert get_plan(loaded) == get_plan(model)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (name == "tied")
    assert get_plan(loaded).info == get_plan(model).info
    # it is cut and saved again, and replaces what was there
    group_sets = find_group_sets(loaded)
    apply_plan(loaded, PruningPlan.from_kept(group_sets, [range(s.size - (s.size > 2)) for s in group_sets]))
    save_litgpt(loaded, tmp_path / "model", stock=False)
    assert torch.equal(load_litgpt(tmp_path / "model")(ids()), loaded(ids()))
    assert load_pruned(tmp_path / "model", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_stock_folder_can_be_cut_on_and_saved_in_our_form(tmp_path):
    """The plan is relative to the dense model, whose config the folder holds, too; blocks that left are in it."""
    model = uniform(without_blocks(named("Llama-3.2-1B", 3), [1]))
    save_litgpt(model, tmp_path / "stock", stock=True)
    loaded = load_pruned(tmp_path / "stock")
    assert loaded.config.n_layer == 2
    save_litgpt(loaded, tmp_path / "again", stock=True)
    cut(loaded)
    save_litgpt(loaded, tmp_path / "own", stock=False)
    assert torch.equal(load_pruned(tmp_path / "own")(ids()), loaded(ids()))
    dense = named("Llama-3.2-1B", 3)
    apply_plan(dense, get_plan(load_pruned(tmp_path / "own")))
    dense.load_state_dict(loaded.state_dict())
    assert torch.equal(dense(ids()), loaded(ids()))


def _narrower(model: nn.Module, name: str) -> nn.Module:
    group_sets = find_group_sets(model)
    kept = [range(s.size - s.name.endswith(name)) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


def _without_heads(model: nn.Module) -> nn.Module:
    group_sets = find_group_sets(model)
    kept = [[] if s.kind == "attention" else range(s.size) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    return model


def _with_bias(model: nn.Module) -> nn.Module:
    config = PruningConfig(pruning_ratio=0.1, repair="bias", iterations=1, limits=Limits(uniform=True, kinds=["mlp"]))
    prune(model, [ids()], lambda batch: loss_of(model, batch), config)
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: _narrower(named("Llama-3.2-1B"), "h.1.attn"), r"n_head is 8 at transformer\.h\.0\.attn and 6 at"),
        (
            lambda: _narrower(named("pythia-14m"), "h.1.mlp"),
            r"intermediate_size is 24 at .* and 23 at transformer\.h\.1\.mlp",
        ),
        (
            lambda: _narrower(named("Mixtral-8x7B-v0.1"), "h.0.mlp.experts.0"),
            r"moe_intermediate_size is 11 at .* and 12 at .*",
        ),
        (lambda: _narrower(latent(n_layer=1, first_k_dense_replace=0), "shared_experts"), "no multiple of moe_interm"),
        (lambda: _without_heads(named("Llama-3.2-1B")), r"refuses a config with .*'n_head': 0"),
        (lambda: _with_bias(named("Llama-3.2-1B")), r"'transformer\.h\.\d\.mlp\.proj\.bias' has shape \(32,\)"),
    ],
    ids=["heads", "channels", "experts", "shared experts", "no heads", "biases"],
)
def test_what_a_config_cannot_say_is_refused_with_the_field(tmp_path, build, words):
    model = build()
    with pytest.raises(UnsupportedModelError, match=words):
        save_litgpt(model, tmp_path / "model", stock=True)
    assert not (tmp_path / "model").exists()
    save_litgpt(model, tmp_path / "model", stock=False)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "model")(ids()), model(ids()))


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path):
    model = uniform(named("Llama-3.2-1B"))
    with pytest.raises(TypeError, match="LitGPT checkpoint folder"):
        save_pruned(model, tmp_path / "model", tokenizer=3)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        save_pruned(model, tmp_path / "model", tokenizer=tmp_path)
    with pytest.raises(PruningError, match="not pruned"):
        save_pruned(named("Llama-3.2-1B"), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"Expected a litgpt\.GPT; found torch"):
        save_litgpt(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(ValueError, match="self_contained"):
        save_pruned(model, tmp_path / "model", self_contained=True)
    assert not (tmp_path / "model").exists()
    save_pruned(model, tmp_path / "model")
    with pytest.raises(ValueError, match="device_map"):
        load_pruned(tmp_path / "model", device_map="cpu")


def test_a_subclass_with_weights_of_its_own_is_refused(tmp_path):
    class Mine(litgpt.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(2, 2)

    model = cut(Mine(named("Llama-3.2-1B").config))
    with (
        pytest.warns(UserWarning, match=r"extra\.weight|n_head"),
        pytest.raises(UnsupportedModelError, match=r"'extra\.weight' has shape"),
    ):
        save_pruned(model, tmp_path / "model")


def _edit_weights(folder: Path, change) -> None:
    weights = torch.load(folder / "lit_model.pth", weights_only=True)
    change(weights)
    torch.save(weights, folder / "lit_model.pth")


def _edit_config(folder: Path, **fields: object) -> None:
    file = folder / "model_config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **fields}))


def _other_plan(folder: Path) -> None:
    plan = PruningPlan.load(folder / "plan.json")
    data = plan.to_dict()
    data["group_sets"][0]["kept"] = "0"
    PruningPlan.from_dict(data).save(folder / "plan.json")


DAMAGES = {
    "cut short": (
        lambda f: (f / "lit_model.pth").write_bytes((f / "lit_model.pth").read_bytes()[:500]),
        PruningError,
        "damaged",
    ),
    "no weights": (lambda f: (f / "lit_model.pth").unlink(), FileNotFoundError, "lit_model"),
    "a weight less": (lambda f: _edit_weights(f, lambda w: w.pop("lm_head.weight")), PruningError, "lacks weights"),
    "a weight more": (lambda f: _edit_weights(f, lambda w: w.update(x=torch.ones(1))), PruningError, "unknown weights"),
    "not finite": (
        lambda f: _edit_weights(f, lambda w: w["lm_head.weight"].fill_(float("nan"))),
        PruningError,
        "finite",
    ),
    "other widths": (lambda f: _edit_config(f, intermediate_size=7), PlanError, r"mlp\.fc_1.*has shape"),
    "unknown field": (lambda f: _edit_config(f, depth=7), PruningError, r"model_config\.yaml is damaged.*depth"),
    "no mapping": (
        lambda f: (f / "model_config.yaml").write_text("- 1\n"),
        PruningError,
        "model_config.yaml is damaged",
    ),
    "no YAML": (lambda f: (f / "model_config.yaml").write_text("a: [\n"), PruningError, "model_config.yaml is damaged"),
    "no plan": (lambda f: (f / "plan.json").unlink(), PruningError, r"has no plan\.json.*litgpt\.LLM\.load"),
    "another plan": (_other_plan, PlanError, r"does not belong to the weights"),
}


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_folders_are_refused(tmp_path, damage, error, words):
    save_pruned(uniform(named("Llama-3.2-1B")), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=words):
        load_pruned(tmp_path / "model")


def test_verify_finds_other_weights(tmp_path):
    save_pruned(uniform(named("Llama-3.2-1B")), tmp_path / "model")
    _edit_weights(tmp_path / "model", lambda w: w["lm_head.weight"].mul_(2))
    load_pruned(tmp_path / "model")
    with pytest.raises(PruningError, match="SHA-256"):
        load_pruned(tmp_path / "model", verify=True)


def test_weights_are_no_code(tmp_path):
    """A pickle that would run something is not run."""
    save_pruned(uniform(named("Llama-3.2-1B")), tmp_path / "model")
    torch.save({"model": copy.copy(Path("x"))}, tmp_path / "model" / "lit_model.pth")
    with pytest.raises(PruningError, match="damaged"):
        load_pruned(tmp_path / "model")
