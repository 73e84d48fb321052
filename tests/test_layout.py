"""The folder shows the flow: a module imports only from its own package and from the lines above it."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parent.parent
# lowest first; the order of docs/how_it_works.md and of a pruning step
LAYERS = [
    "version",
    "_moved",
    "_renamed",
    "_auto_classes",
    "errors",
    "extras",
    "torch_internals",
    "transformers_internals",
    "arguments",
    "text_escape",
    "_files",
    "costs",
    "progress",
    "modeling_pruned",
    "user_errors",
    "groups",
    "distributed",
    "plan_entries",
    "group_data",
    "plan",
    "architectures",
    "surgery",
    "verify",
    "calibration",
    "budgets",
    "ranking",
    "repair",
    "config",
    "planning",
    "budgeting",
    "ratios",
    "repairing",
    "polishing",
    "detection",
    "phases",
    "pipeline",
    "gating",
    "reporting",
    "io",
    "_api",
    "callbacks",
    "training",
    "objectives",
    "calibration_input",
    "session",
    "evaluate",
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


def test_the_docs_list_the_modules_in_their_order():
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8").partition("## Where it is")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(rows)) == LAYERS
    assert {m.split(".")[1] for m in set(MODULES) - {"lit_prune"}} == set(LAYERS)


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


# the root names for type checkers what it imports on demand
@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lit_prune"}))
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


# what may be longer, each with its reason
LONG_FILES = {
    "lit_prune.modeling_pruned": "it is copied beside weights as one file, and self-contained folders name it",
}
LONG_FUNCTIONS = {
    "lit_prune.callbacks.pruning.StructuredPruning.__init__": "one argument a line, and one check for each",
    "lit_prune.pipeline.prune_with": "the steps of pruning in their order, on one page",
}
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Qualified name and number of lines, without those of the docstring, of every function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not isinstance(node, ast.ClassDef):
                first = node.body[0]
                docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                described = first.end_lineno - first.lineno + 1 if docstring else 0
                yield f"{prefix}{node.name}", node.end_lineno - node.lineno + 1 - described
            yield from functions(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    long = len(text.splitlines()) > LINES_OF_A_FILE
    assert long == (module in LONG_FILES), f"{module} has {len(text.splitlines())} lines: split it by concept"
    for name, lines in functions(ast.parse(text)):
        listed = f"{module}.{name}" in LONG_FUNCTIONS
        assert (lines > LINES_OF_A_FUNCTION) == listed, f"{module}.{name} has {lines} lines without its docstring"


# the one module for each library that may use what that library does not document
INTERNALS = {"lit_prune.torch_internals", "lit_prune.transformers_internals", "lit_prune.callbacks.lightning_internals"}
PRIVATE_ELSEWHERE = {
    "lit_prune.modeling_pruned": {
        "_parameters": "it imports nothing of this package",
        "_modules": "it imports nothing of this package",
        "_model_mapping": "it imports nothing of this package",
    },
    "lit_prune.calibration.mask_shapes": {"_asdict": "documented of named tuples"},
    "lit_prune.callbacks.pruning": {"_generate_state_key": "Lightning documents it for a callback's state_key"},
    "lit_prune.cli.running": {
        "_actions": "of jsonargparse, which has no other way to the options' help; see test_internals"
    },
}


def defined_names() -> set[str]:
    """Every private name that a module of this package defines or assigns, for itself or its objects."""
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif (
                isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
            ):
                found |= {node.attr} if node.value.id in ("self", "cls") else set()
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


OURS = defined_names()
# names that are ours on some objects, and torch's on modules
OF_MODULES = set(vars(nn.Module()))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("module", sorted(set(MODULES) - INTERNALS))
def test_internals_of_libraries_are_used_in_one_place(module):
    found = {}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if node.attr not in OURS or (node.attr in OF_MODULES and not own):
                found[node.attr] = node.lineno
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lit_prune"):
            parts = (node.module or "").split(".")
            found |= {p: node.lineno for p in (*parts, *(a.name for a in node.names)) if is_private(p)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found |= {name: node.lineno} if is_private(str(name)) and name not in OURS else {}
    allowed = PRIVATE_ELSEWHERE.get(module, {})
    assert found.keys() == allowed.keys(), (
        f"{module} uses what a library does not document: {found}; expected {sorted(allowed)}. Put it into the library's"
        f" ..._internals module, with a test in tests/test_internals.py."
    )
