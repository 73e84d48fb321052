"""What is heavy is imported when it is used: by the package, and by the command line."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys

import pytest

import lit_prune
from lit_prune import _api, _auto_classes, modeling_pruned
from lit_prune.cli import COMMANDS
from lit_prune.cli.running import function_of

HEAVY = (
    "torch",
    "transformers",
    "lightning",
    "datasets",
    "matplotlib",
    "numpy",
    "pydantic",
    "jsonargparse",
    "rich",
    "tqdm",
)


def run(code: str) -> list[str]:
    """Lines that a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def imported(code: str) -> list[str]:
    """Which of the heavy packages some code imports."""
    shown = f"import sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    return json.loads(run(f"{code}\n{shown}")[-1])


COMMAND = "from lit_prune.cli import main\ntry: main({})\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    "code",
    [
        "import lit_prune; lit_prune.__version__",
        *(COMMAND.format(a) for a in (["--help"], ["--version"], ["nope"], [])),
    ],
)
def test_help_and_import_need_nothing_heavy(code):
    assert imported(code) == []


def test_the_engine_alone_needs_no_lightning():
    assert "lightning" not in imported("import lit_prune; lit_prune.prune")


def test_the_public_names_are_those_of_the_module_that_imports_them():
    assert lit_prune.__all__ == _api.__all__
    assert set(lit_prune.__all__) <= set(dir(lit_prune))
    for name in lit_prune.__all__:
        assert getattr(lit_prune, name) is getattr(_api, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
        lit_prune.nothing_of_the_kind  # noqa: B018


def test_repair_is_the_function_though_a_folder_has_its_name():
    importlib.import_module("lit_prune.repair.refit")
    assert callable(lit_prune.repair) and inspect.isfunction(lit_prune.repair)
    from lit_prune import repair

    assert repair is _api.repair


@pytest.mark.parametrize("first", ["lit_prune", "transformers"])
def test_auto_classes_know_the_model_type_whatever_is_imported_first(first):
    """The class is a stand-in until a pruned config is read."""
    second = {"lit_prune": "transformers", "transformers": "lit_prune"}[first]
    lines = run(
        f"import {first}, {second}, sys\n"
        "from transformers import AutoConfig\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "known = CONFIG_MAPPING['lit_prune']\n"
        "print('lit_prune.io.loading' in sys.modules)\n"
        "try: known.from_dict({'base_model_type': 'nope'})\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(CONFIG_MAPPING['lit_prune'].__module__)"
    )
    assert lines == ["False", "PrunedPlanError", "lit_prune.modeling_pruned"]
    assert _auto_classes.MODEL_TYPE == modeling_pruned.MODEL_TYPE


def test_the_summaries_in_the_help_are_those_of_the_docstrings():
    for name, (_, summary) in COMMANDS.items():
        assert inspect.cleandoc(function_of(name).__doc__ or "").partition("\n\n")[0] == summary
