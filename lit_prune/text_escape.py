"""Text of the user, names of runs, models, metrics and files, made safe for where it is shown."""

from __future__ import annotations

import html
import re
import unicodedata

from rich.text import Text

# they turn the direction of what follows, and hide what a line says
_DIRECTIONS = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKDOWN = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")


def one_line(value: object) -> str:
    r"""The text in one line, with control characters and escape sequences written out, ``\x1b`` for instance."""
    spaced = " ".join(re.split(r"[\n\r\t\v\f\u0085\u2028\u2029]+", str(value)))
    return "".join(_written_out(c) if _is_control(c) else c for c in spaced)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


def _written_out(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def for_console(value: object) -> Text:
    """The text for a terminal; nothing in it is taken for markup of rich."""
    return Text(one_line(value))


def for_markdown(value: object) -> str:
    """The text for a line or a table cell of Markdown; nothing in it is taken for Markdown or HTML."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", html.escape(one_line(value), quote=False))


def for_html(value: object) -> str:
    """The text for HTML, between tags or in an attribute."""
    return html.escape(one_line(value))


def for_plot(value: object) -> str:
    """The text for a label of matplotlib; a dollar sign in it begins no formula."""
    return one_line(value).replace("$", r"\$")
