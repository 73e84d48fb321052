"""Text of the user is shown as it is, wherever it is shown: no markup, escape sequence, table cell or formula comes of it."""

from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console

from conftest import tiny
from lit_prune import GroupTable, PruningConfig, PruningPlan, apply_plan, find_group_sets, make_plan
from lit_prune.io.huggingface import model_card, to_pretrained
from lit_prune.reporting.page import report_table, write_report
from lit_prune.text_escape import for_console, for_html, for_markdown, for_plot, one_line

NASTY = [
    "[link=http://x]click[/link]",
    "[/nope]",
    "[red]x[/]",
    "\x1b]0;owned\x07\x1b[2J",
    "a|b",
    "`code`",
    "line\nbreak",
    "<script>alert(1)</script>",
    "$\\frac{",
    "$^$",
    "\u202egnp.exe",
    "**bold** _it_ ~x~",
    "\udcff",
    "\x00",
    "![img](http://x/p.png)",
    ":smile:",
    "=1+1",
]


@pytest.mark.parametrize("text", NASTY)
def test_the_console_shows_it_and_does_nothing_else(text):
    metrics = {text: {text: 1.0, "parameters": 2.0}, "last": {text: 2.0}}
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200, color_system="truecolor")
    console.print(report_table(metrics))
    console.print(for_console(text), soft_wrap=True)
    printed = shown.getvalue()
    # nothing but rich's own styles is left of escape sequences, and the text is there in full
    own = [part for part in printed.split("\x1b")[1:] if not part.startswith("[") or part.startswith("[2J")]
    assert not own
    assert not set(printed) & set("\x00\x07\u202e\udcff")
    assert one_line(text) in printed.splitlines()
    assert printed.count(one_line(text)) >= 3 or len(one_line(text)) > 30


@pytest.mark.parametrize("text", NASTY)
def test_one_line_is_one_line_and_names_stay_apart(text):
    assert len(one_line(text).splitlines()) == 1
    assert one_line(text).isprintable()
    one_line(text).encode("utf-8")
    assert len({one_line(t) for t in NASTY}) == len(NASTY)


@pytest.mark.parametrize("text", NASTY)
def test_the_model_card_shows_it_in_its_cell(text):
    model = tiny()
    sets = find_group_sets(model)
    plan = PruningPlan.from_kept(sets, [list(range(s.size - 1)) for s in sets], {"importance": text})
    apply_plan(model, plan)
    card = model_card(to_pretrained(model), {"dense": {text: 1.0}, text: {text: 2.0}})
    bare = "card of plain text"
    plain = model_card(to_pretrained(model), {"dense": {bare: 1.0}, bare: {bare: 2.0}})
    # the same lines and cells as with a harmless name
    assert len(card.splitlines()) == len(plain.splitlines())
    cells = [[row.replace("\\|", "").count("|") for row in c.splitlines()] for c in (card, plain)]
    assert cells[0] == cells[1]
    assert "<script" not in card
    assert not re.search(r"(?<!\\)\]\(", card)
    card.encode("utf-8")


def test_markdown_escapes_what_has_a_meaning_and_nothing_else():
    assert for_markdown("taylor_2nd, 0.2 (x) a-b") == "taylor_2nd, 0.2 (x) a-b"
    assert for_markdown("a|b `c` <b> _x_ [y](z)") == r"a\|b \`c\` &lt;b&gt; \_x\_ \[y\](z)"
    assert for_html("\"<'&\n") == "&quot;&lt;&#x27;&amp; "
    assert for_plot("$x$") == r"\$x\$"


def test_page_pictures_and_files_are_written(tmp_path):
    text = "$\\frac{ <script> \udcff\x00 a\nb |"
    model = tiny(num_hidden_layers=1)
    table, plan = make_plan(model, find_group_sets(model), None, PruningConfig("magnitude"))
    plan = PruningPlan(plan.entries, info={**plan.info, "importance": text, text: 1})
    timeline = [{"step": s, "stage": stage, f"val_{text}": 1.0 + s} for s, stage in enumerate(["dense", "pruned"])]
    table.keys = tuple((name, f"{kind}{text.encode('ascii', 'ignore').decode()}") for name, kind in table.keys)
    write_report(tmp_path, {"dense": {text: 1.0}, text: {text: 2.0}}, plan, table, timeline)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert {"kept.png", "importance.png", "scores.png", "timeline.png"} <= {p.name for p in tmp_path.iterdir()}


def test_a_table_of_any_names_is_read_back_as_it_was(tmp_path):
    model = tiny()
    table, _ = make_plan(model, find_group_sets(model), None, PruningConfig("magnitude"))
    names = ["=1+1", "a,b", 'a"b', "[/x]", "<b>", "@x"]
    keys = tuple((f"{names[i % len(names)]}{i}", kind) for i, (_, kind) in enumerate(table.keys))
    table.keys = keys
    table.to_csv(tmp_path / "table.csv")
    assert GroupTable.read(tmp_path / "table.csv").keys == keys
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {name for name, _ in keys}
