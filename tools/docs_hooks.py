"""What MkDocs does for this site beside its plugins: lays the package out, turns roles into links, shows files of the repository.

* ``callbacks/`` is copied to where it lies once installed, so that ``lit_prune.callbacks`` is found.
* Roles of docstrings (``:func:`prune```) become links to the reference, if the name is in it, and code otherwise.
* README-like files at the top become pages, and every file that a page links to outside ``docs/`` becomes one with its text.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LAID_OUT = ROOT / "build" / "docs"
AT_THE_TOP = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".md": "markdown", ".toml": "toml"}
ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc):`~?([\w.]+)`")
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_startup(command: str, dirty: bool) -> None:
    """Make the folder that the package is laid out in: a search path that is not there yet would be left out."""
    del command, dirty
    LAID_OUT.mkdir(parents=True, exist_ok=True)


def on_config(config: Any) -> Any:
    """Lay the package out for the reference."""
    documented = _documented()
    shutil.rmtree(LAID_OUT, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lit_prune", LAID_OUT / "lit_prune", ignore=skip)
    shutil.copytree(ROOT / "callbacks", LAID_OUT / "lit_prune" / "callbacks", ignore=skip)
    for file in LAID_OUT.rglob("*.py"):
        file.write_text(_with_links(file.read_text(encoding="utf-8"), documented), encoding="utf-8")
    return config


def _documented() -> dict[str, str]:
    """Identifiers of the reference by the last part of their names."""
    pages = (ROOT / "docs" / "api").glob("*.md")
    names = [n for page in pages for n in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    return {name.rpartition(".")[2]: name for name in names}


def _with_links(source: str, documented: dict[str, str]) -> str:
    def link(found: re.Match[str]) -> str:
        owner, _, last = found[1].rpartition(".")
        owner = owner.rpartition(".")[2]
        if last in documented:
            return f"[`{last}`][{documented[last]}]"
        if owner in documented and owner[:1].isupper():
            return f"[`{owner}.{last}`][{documented[owner]}.{last}]"
        return f"`{last}`"

    source = ROLE.sub(link, source)
    return re.sub(r"^( +)Example::$", r"\1**Example**", source, flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside ``docs/``."""
    for page, source in AT_THE_TOP.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        files.append(File.generated(config, page, content=text))
    linked = set()
    for file in files.documentation_pages():
        if file.abs_src_path is not None:
            text = Path(file.abs_src_path).read_text(encoding="utf-8")
            linked |= {_target(file.src_uri, link) for link, _ in LINK.findall(text)}
    for target in sorted(t for t in linked if not t.startswith("docs/")):
        files.append(File.generated(config, _page(target), content=_shown(target)))
    return files


def _target(page: str, link: str) -> str:
    """Where in the repository a link leads that stands in a page of ``docs/``."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def _page(target: str) -> str:
    return f"source/{target}.md"


def _shown(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        listed = [p for p in sorted(path.iterdir()) if p.is_file()]
        parts = [f"## {p.name}\n\n{_fenced(p)}" for p in listed]
        return "\n\n".join([f"# {target}", *parts])
    return f"# {target}\n\n{_fenced(path)}"


def _fenced(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return f"`````` {LANGUAGES.get(path.suffix, 'text')}\n{text}\n``````"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links outside ``docs/`` to the pages made of those files."""

    del config, files
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def inside(found: re.Match[str]) -> str:
        target = _target(here, found[1])
        if target.startswith("docs/"):
            return found[0]
        return f"]({posixpath.relpath(_page(target), posixpath.dirname(here) or '.')}{found[2] or ''})"

    return LINK.sub(inside, markdown)
