"""What a context manager changes it puts back also after an error: nothing stands behind its ``yield`` but in ``finally``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "lit_prune").rglob("*.py")), *sorted((ROOT / "callbacks").rglob("*.py"))]
# what these do there is for the case that nothing failed: a file takes its place only if it was written whole
ONLY_WITHOUT_AN_ERROR = {
    "_files.py": {"replacing", "replacing_files"},
    "costs.py": {"phase"},
    "progress.py": {"phase"},
    "output_folder.py": {"replacing_folder"},
    "ranks.py": {"together"},
}


def managers(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("contextmanager" in ast.unparse(d) for d in node.decorator_list):
            yield node


def skipped_after_an_error(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements behind a ``yield``, which an error thrown in at the ``yield`` does not reach."""
    for number, statement in enumerate(block):
        if isinstance(statement, (ast.FunctionDef, ast.Return)) or not any(
            isinstance(n, (ast.Yield, ast.YieldFrom)) for n in ast.walk(statement)
        ):
            continue
        if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return):
            yield from skipped_after_an_error(statement.body[:-1])
            continue
        yield from (s for s in block[number + 1 :] if not (isinstance(s, ast.Return) and s.value is None))
        for inner in ("body", "orelse"):
            yield from skipped_after_an_error(getattr(statement, inner, []))
        if isinstance(statement, ast.Try):
            yield from (s for handler in statement.handlers for s in skipped_after_an_error(handler.body))
            yield from skipped_after_an_error(statement.finalbody)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_behind_a_yield_is_in_finally(path):
    for manager in managers(ast.parse(path.read_text())):
        if manager.name in ONLY_WITHOUT_AN_ERROR.get(path.name, set()):
            continue
        skipped = [f"line {s.lineno}: {ast.unparse(s)}" for s in skipped_after_an_error(manager.body)]
        assert not skipped, f"{path}: {manager.name}: {skipped}"


def test_the_rule_finds_what_it_is_for():
    written = """
@contextlib.contextmanager
def isolate():
    state = get()
    yield
    set(state)

@contextlib.contextmanager
def well():
    state = get()
    if state is None:
        yield
        return
    try:
        with other():
            yield
    finally:
        set(state)
"""
    bad, good = managers(ast.parse(written))
    assert [s.lineno for s in skipped_after_an_error(bad.body)] == [6]
    assert not list(skipped_after_an_error(good.body))
