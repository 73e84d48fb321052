"""What a release says of itself, and what a feature says whose package is not installed."""

from __future__ import annotations

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


def test_a_package_is_of_the_core_or_of_an_extra():
    core, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    assert {"torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb", "safetensors"} <= core
    features = {extra: names(extras[extra]) for extra in ("cli", "plots", "gguf", "lora")}
    assert not core & set().union(*features.values())
    (everything,) = extras["all"]
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == set(features)
    readme = (ROOT / "README.md").read_text()
    assert "[all]" in re.search(r"^pip install .*$", readme, re.MULTILINE)[0]


FEATURES = {
    "plots": ("matplotlib", "from lit_prune.callbacks import PruningReport; PruningReport('out')"),
    "lora": ("peft", "from lit_prune.callbacks import LoRARecovery; LoRARecovery()"),
    "gguf": ("gguf", "from lit_prune.io.gguf import save_gguf; save_gguf(None, 'out.gguf', None)"),
    "pictures": ("matplotlib", "import lit_prune.reporting.plots"),
    "cli": ("jsonargparse", "from lit_prune.training.command_line import run; run('train.py', None, None, [])"),
}
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {package!r} else found(name, *a)
from lit_prune.callbacks import StructuredPruning
from lit_prune.extras import MissingPackageError
try:
    {code}
except MissingPackageError as error:
    print(error)
"""


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_without_its_package_names_the_extra(feature):
    package, code = FEATURES[feature]
    script = WITHOUT.format(package=package, code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    extra = {"pictures": "plots"}.get(feature, feature)
    assert f"needs the package {package}" in done.stdout and f"pip install 'lit_prune[{extra}]'" in done.stdout, (
        done.stderr
    )
    assert extra in PROJECT["optional-dependencies"]


def test_the_error_is_one_of_lit_prune_and_an_import_error():
    error = missing("gone", "plots", "A picture")
    assert isinstance(error, PruningError) and isinstance(error, ImportError)
    with pytest.raises(MissingPackageError, match=r"^A picture needs the package no_such_package"):
        require("no_such_package", "plots", "A picture")
    require("json", "plots", "A picture")
