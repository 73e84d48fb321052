"""The pictures and the page: what they show, and that a real browser shows them."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from conftest import tiny
from lit_prune import PruningConfig, find_group_sets, make_plan
from lit_prune.reporting.page import html_report, write_report
from lit_prune.reporting.plots import importance_figure, pictures, score_figure, timeline_figure

pytestmark = pytest.mark.core

FIGURES = {
    "dense": {"parameters": 1000.0, "val_perplexity": 26.0},
    "recovered": {"parameters": 700.0, "val_perplexity": 35.0},
}
TIMELINE = [
    {"step": 0, "stage": "dense", "val_loss": 3.3, "val_perplexity": 27.0},
    {"step": 10, "stage": "dense", "val_loss": 3.2, "val_perplexity": 26.0},
    {"step": 10, "stage": "pruned", "val_loss": 4.1, "val_perplexity": 60.0},
    {"step": 20, "stage": "recovery", "val_loss": 3.6, "val_perplexity": 35.0},
]


@pytest.fixture(scope="module")
def planned():
    model = tiny(num_hidden_layers=4, intermediate_size=100)
    return make_plan(model, find_group_sets(model), None, PruningConfig("magnitude", pruning_ratio=0.3))


def test_the_heat_map_has_a_row_a_layer_and_the_cut_of_each(planned):
    table, _ = planned
    figure = importance_figure(table, columns=50)
    kinds = list(dict.fromkeys(kind for _, kind in table.keys))
    for axis, kind in zip(figure.axes, kinds, strict=False):
        places = [i for i, key in enumerate(table.keys) if key[1] == kind]
        shown = axis.images[0].get_array()
        width = min(50, int(table.sizes[places[0]]))
        assert shown.shape == (4, width)
        assert (np.diff(shown, axis=1) <= 0).all()
        kept = [len(table.kept_groups()[i]) / table.sizes[i] for i in places]
        borders = [segment[0][0] for segment in axis.collections[0].get_segments()]
        assert borders == pytest.approx([width * k - 0.5 for k in kept])


def test_the_distribution_counts_every_group_once_and_shows_the_cut(planned):
    table, _ = planned
    figure = score_figure(table)
    kinds = list(dict.fromkeys(kind for _, kind in table.keys))
    for axis, kind in zip(figure.axes, kinds, strict=True):
        mine = table.kind_of_row == kind
        removed, kept = (sum(bar.get_height() for bar in container) for container in axis.containers)
        assert removed == (mine & ~table.kept).sum()
        assert kept == (mine & table.kept).sum()
        assert axis.lines[0].get_xdata()[0] == pytest.approx(np.log10(table.score[~table.kept].max()))


def test_the_timeline_has_every_measurement_and_the_cut():
    axis = timeline_figure(TIMELINE, "val_perplexity").axes[0]
    assert axis.lines[0].get_xydata().tolist() == [[p["step"], p["val_perplexity"]] for p in TIMELINE]
    assert [line.get_xdata()[0] for line in axis.lines[1:]] == [10]


def test_there_is_a_picture_for_what_there_is(planned):
    table, plan = planned
    assert list(pictures(plan, table, TIMELINE)) == ["kept", "importance", "scores", "timeline"]
    assert list(pictures(plan, table)) == ["kept", "importance", "scores"]
    assert list(pictures(plan, None)) == []


def test_the_page_escapes_what_it_shows_and_asks_for_nothing(planned):
    _, plan = planned
    page = html_report({"<dense>": {"parameters": 1.0}}, plan, {"kept": b"\x89PNG"}, title="<script>alert(1)</script>")
    assert "<script" not in page and "&lt;dense&gt;" in page
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert "http:" not in page and "https:" not in page
    assert plan.digest() in page


def test_a_real_browser_that_has_no_network_shows_the_page(planned, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    table, plan = planned
    write_report(tmp_path, FIGURES, plan, table, TIMELINE)
    common = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    common += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    address = (tmp_path / "report.html").as_uri()
    shot = [f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,2600", "--hide-scrollbars"]
    subprocess.run([chromium, *common, *shot, address], check=True, capture_output=True, timeout=120)
    seen = imread(tmp_path / "page.png")[..., :3]
    assert seen.shape[:2] == (2600, 1000)
    for colour in ((0x2A, 0x6F, 0x97), (0xC8, 0x55, 0x3D)):  # bars of what was kept, and of what was removed
        near = np.abs(seen - np.array(colour) / 255).max(axis=-1) < 0.02
        assert near.sum() > 500
    dumped = subprocess.run(
        [chromium, *common, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert dumped.count("<img") == 4
    assert "1.346" in dumped  # the last perplexity over the first
