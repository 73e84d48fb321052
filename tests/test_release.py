"""What a release says of itself, and what a feature says whose package is not installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit_prune
from lit_prune.errors import PruningError
from lit_prune.extras import MissingPackageError, missing, require

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.match(r"[\w-]+", r)[0].replace("_", "-") for r in requirements}


def test_the_version_comes_from_one_place_and_has_an_entry_of_the_changelog():
    assert PROJECT["dynamic"] == ["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lit_prune.__version__
    assert re.search(rf"^## {re.escape(lit_prune.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    written = [
        p
        for folder in ("lit_prune", "callbacks")
        for p in (ROOT / folder).rglob("*.py")
        if re.search(r"^__version__ = ", p.read_text(), re.MULTILINE)
    ]
    assert written == [ROOT / "lit_prune" / "version.py"]


def test_the_distribution_holds_every_folder_of_the_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "lit_prune").rglob("*.py")}
    folders |= {"lit_prune" / p.parent.relative_to(ROOT) for p in (ROOT / "callbacks").rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_a_package_is_of_the_core_or_of_an_extra():
    core, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    assert {"torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb", "safetensors"} <= core
    features = {extra: names(extras[extra]) for extra in ("cli", "plots", "gguf", "lora")}
    assert not core & set().union(*features.values())
    (everything,) = extras["all"]
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == set(features)
    readme = (ROOT / "README.md").read_text()
    assert "[all]" in re.search(r"^pip install .*$", readme, re.MULTILINE)[0]


# by feature: the package, the extra, and what needs it
FEATURES = {
    "report": ("matplotlib", "plots", "from lit_prune.callbacks import PruningReport; PruningReport('out')"),
    "pictures": ("matplotlib", "plots", "import lit_prune.reporting.plots"),
    "adapters": ("peft", "lora", "from lit_prune.callbacks import LoRARecovery; LoRARecovery()"),
    "export": ("gguf", "gguf", "from lit_prune.io.gguf import save_gguf; save_gguf(None, 'out.gguf', None)"),
    "train.py": ("jsonargparse", "cli", "from lit_prune.training.command_line import run; run('x', None, None, [])"),
}
WITHOUT = """
import importlib.util, json, sys
import lightning.pytorch.cli  # what others import of the packages, with ways of their own to tell that one is missing
refused, features = json.loads(sys.argv[1]), json.loads(sys.argv[2])
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
for name in [n for n in sys.modules if n.partition(".")[0] in refused]:
    del sys.modules[name]
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in refused else found(name, *rest)
from lit_prune.callbacks import StructuredPruning
from lit_prune.extras import MissingPackageError
said = {}
for name, (_, _, code) in features.items():
    try:
        exec(code)
    except MissingPackageError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_a_feature_without_its_package_names_the_extra():
    refused = sorted({package for package, _, _ in FEATURES.values()})
    command = [sys.executable, "-c", WITHOUT, json.dumps(refused), json.dumps(FEATURES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for feature, (package, extra, _) in FEATURES.items():
        assert f"needs the package {package}" in said[feature] and f"pip install 'lit_prune[{extra}]'" in said[feature]
        assert extra in PROJECT["optional-dependencies"]


def test_the_error_is_one_of_lit_prune_and_an_import_error():
    error = missing("gone", "plots", "A picture")
    assert isinstance(error, PruningError) and isinstance(error, ImportError)
    with pytest.raises(MissingPackageError, match=r"^A picture needs the package no_such_package"):
        require("no_such_package", "plots", "A picture")
    require("json", "plots", "A picture")
