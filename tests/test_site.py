"""The documentation site: every public name is in the reference once, and the check of links finds what it is for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import lit_prune
import lit_prune.callbacks

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference_once():
    pages = "\n".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(listed) == len(set(listed))
    # the folder lit_prune.repair hides the function of that name from the tool
    names = {n.replace("lit_prune.repairing.repair", "lit_prune.repair") for n in listed}
    public = {f"lit_prune.{n}" for n in lit_prune.__all__ if n != "__version__"}
    public |= {f"lit_prune.callbacks.{n}" for n in lit_prune.callbacks.__all__}
    assert public <= names
    assert all(name.startswith("lit_prune.errors.") for name in names - public)


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def files(part):
        if isinstance(part, str):
            return [part]
        return [f for inner in (part.values() if isinstance(part, dict) else part) for f in files(inner)]

    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    shown = files(config["nav"])
    assert len(shown) == len(set(shown)) and pages <= set(shown)


GOOD = '<a href="other/#there">x</a><img src="picture.png"><a href="https://elsewhere.example/">x</a>'
BAD = {
    "a page": ('<a href="gone/">x</a>', "links to gone/, which is not there"),
    "an anchor": ('<a href="other/#gone">x</a>', "other/#gone, which has no such anchor"),
    "its own anchor": ('<a href="#gone">x</a>', "#gone, which has no such anchor"),
    "a picture": ('<img src="gone.png">', "links to gone.png, which is not there"),
    "a script": ('<script src="https://elsewhere.example/x.js"></script>', "from elsewhere"),
    "a font": ('<link rel="stylesheet" href="https://elsewhere.example/font.css">', "from elsewhere"),
}


@pytest.mark.parametrize("case", [None, *BAD])
def test_the_check_of_links_finds(case, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text('<h1 id="there">x</h1>')
    (tmp_path / "picture.png").write_bytes(b"")
    body, expected = BAD[case] if case else ("", None)
    (tmp_path / "index.html").write_text(GOOD + body)
    found = list(tool("check_site").problems(tmp_path))
    assert len(found) == (case is not None)
    assert case is None or expected in found[0]
