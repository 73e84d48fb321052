"""Loading a pruned folder takes torch, transformers, safetensors, pydantic and what those require, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions

import pytest
import torch
from test_export import pruned, with_requirements

from lit_prune import save_pruned

pytestmark = pytest.mark.core

ALONE = '''
import json, sys
allowed, installed, folder, tokens, expected, again = map(json.loads, sys.argv[1:7])
before = set(sys.modules)

class NotInstalled:
    """Stands before what finds modules in folders, and finds none of those."""
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        hidden = top in installed and top not in allowed
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

from importlib.machinery import PathFinder
sys.meta_path[:] = [NotInstalled(f) if f is PathFinder else f for f in sys.meta_path]
try:
    import lightning
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("lightning was found")
import torch
import lit_prune
from transformers import AutoModelForCausalLM

tokens, expected = torch.load(tokens), torch.load(expected)
for load in (AutoModelForCausalLM.from_pretrained, lit_prune.load_pruned):
    model = load(folder)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
lit_prune.save_pruned(model, again)
loaded = lit_prune.load_pruned(again, verify=True)
torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=0)
groups = lit_prune.find_group_sets(loaded)
lit_prune.apply_plan(loaded, lit_prune.PruningPlan.from_kept(groups, [[0] for _ in groups]))
print("loaded", {name.partition(".")[0] for name in set(sys.modules) - before} & set(installed) - set(allowed) or "alone")
'''


def top_names(packages):
    """The names by which installed distributions are imported."""
    names = {file.parts[0].removesuffix(".py") for package in packages for file in package.files or ()}
    return {name for name in names if name.isidentifier()}


def test_what_else_is_installed_is_not_imported(tmp_path, tokens):
    allowed = top_names(with_requirements("torch", "transformers", "safetensors", "pydantic"))
    installed = top_names(distributions()) - {"lit_prune", "callbacks"}
    assert {"lightning", "wandb", "datasets", "torchmetrics", "jsonargparse", "matplotlib"} <= installed - allowed
    model = pruned()
    folder = save_pruned(model, tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    torch.save(model(tokens).logits.detach(), tmp_path / "logits.pt")
    places = [tmp_path / name for name in ("tokens.pt", "logits.pt", "again")]
    given = [sorted(allowed), sorted(installed), str(folder), *map(str, places)]
    command = [sys.executable, "-c", ALONE, *(json.dumps(value) for value in given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert "per-layer" not in done.stderr, "a warning about what is as it should be"
    assert done.stdout.strip() == "loaded alone", done.stderr
