"""The folder shows the flow: a module imports only from its own package and from the lines above it."""

from __future__ import annotations

import ast
import contextlib
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# lowest first; the order of docs/how_it_works.md and of a pruning step
LAYERS = [
    "version",
    "_moved",
    "errors",
    "arguments",
    "text_escape",
    "_files",
    "modeling_pruned",
    "user_errors",
    "groups",
    "distributed",
    "group_data",
    "plan",
    "architectures",
    "surgery",
    "verify",
    "calibration",
    "ranking",
    "repair",
    "config",
    "detection",
    "pipeline",
    "reporting",
    "io",
    "callbacks",
    "training",
    "cli",
]


def modules() -> dict[str, Path]:
    found = {}
    for path in [*(ROOT / "lit_prune").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "lit_prune" else ("lit_prune", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> list[tuple[str, str]]:
    """Module and name of every import of our own package in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lit_prune":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else node.module, alias.name))
        elif isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.split(".")[0] == "lit_prune"]
    return found


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lit_prune"}))
def test_imports_run_one_way(module):
    for imported, name in imports(MODULES[module]):
        assert imported != "lit_prune", f"{module} imports {name} from the package's root: name the module it is in"
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_private_names_stay_in_their_folder(module):
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for imported, name in imports(MODULES[module]):
        if name.startswith("_") and not name.startswith("__") and f"lit_prune.{name}" not in MODULES:
            assert imported.rpartition(".")[0] == package, f"{module} imports the private {name} of {imported}"


def test_there_is_no_circle():
    graph = {m: {i for i, _ in imports(path) if i in MODULES and i != m} for m, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_of_ours_hides_behind_type_checking(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            assert "lit_prune" not in ast.unparse(node)


def test_the_old_paths_of_release_0_1_warn_and_work():
    moved = importlib.import_module("lit_prune._moved")
    assert moved.MOVED
    for old, places in moved.MOVED.items():
        for new, names in places.items():
            for entry in names.split():
                name, _, now = entry.partition("=")
                module = importlib.import_module(old)
                # what a module still uses it still has
                silent = name in vars(module)
                with (
                    contextlib.nullcontext()
                    if silent
                    else pytest.warns(DeprecationWarning, match=f"{old}.{name} is now")
                ):
                    found = getattr(module, name)
                assert found is getattr(importlib.import_module(new), now or name)
