"""Check the built documentation: every link, picture and anchor leads somewhere, and nothing is loaded from elsewhere.

python tools/check_site.py site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what a browser fetches on its own, as against what a reader may click
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """What a page links to, loads, and offers as anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes of a tag that name a place."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src"):
            if name in given and not (tag == "link" and given.get("rel") == "canonical"):
                (self.loaded if (tag, name) in LOADED else self.links).append(given[name])


def problems(site: Path) -> Iterator[str]:
    """What is wrong with a built site, a sentence each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        here = path.relative_to(site)
        for url in page.loaded:
            if urlsplit(url).netloc:
                yield f"{here} loads {url} from elsewhere."
        # the page of missing addresses is served from any depth, so its links are absolute
        for url in [] if path.name == "404.html" else [*page.links, *page.loaded]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{here} links to {url}, which is not there."
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{here} links to {url}, which has no such anchor."
    for path in site.rglob("*.css"):
        for url in re.findall(r"url\([\"']?(https?:[^)\"']+)", path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)} loads {url} from elsewhere."


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    site = Path(sys.argv[1]).resolve()
    if not (site / "index.html").is_file():
        print(f"{site} holds no built site: expected index.html. Run `make docs`.")
        return 1
    found = list(problems(site))
    print(*found, f"{len(found)} problems in {len(list(site.rglob('*.html')))} pages.", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
