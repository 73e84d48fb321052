"""The group table of a 70B model in a real offline run: a summary of each layer and a Parquet artifact, in bounded memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from lightning.pytorch.loggers import WandbLogger
from test_loggers import offline, runs  # noqa: F401
from test_pruning import fit, pruning

from lit_prune import GroupTable
from lit_prune.callbacks import PruningReport, wandb_tables
from lit_prune.callbacks.wandb_tables import SUMMARY_COLUMNS, TABLE_ROWS, layer_summary, log_tables
from lit_prune.ranking.table import COLUMNS

LAYERS, HEADS, CHANNELS = 80, 8, 28672  # Llama 3 70B: 2,294,400 groups


def table_of(layers: int, heads: int, channels: int) -> GroupTable:
    """A table of a model of this size with random importance, from which the lower half of every layer left."""
    sets = [
        (f"model.layers.{i}.{p}", k, i) for i in range(layers) for p, k in (("self_attn", "attention"), ("mlp", "mlp"))
    ]
    sizes = np.array([heads if kind == "attention" else channels for _, kind, _ in sets])
    importance = np.random.default_rng(0).random(int(sizes.sum()))
    return GroupTable(
        keys=tuple((name, kind) for name, kind, _ in sets),
        layers=np.array([layer for *_, layer in sets]),
        offsets=np.concatenate([[0], sizes.cumsum()]),
        importance=importance,
        cost=np.repeat(np.where(sizes == heads, 100, 3), sizes),
        kept=importance > 0.5,
    )


def artifact_file(artifact, name: str) -> Path:
    """Where an offline run keeps a file of an artifact until it is uploaded, under a name of its own."""
    (entry,) = [e for e in artifact.manifest.contents if e.path == name]
    return Path(entry.local_path)


def logged_by_layer(run) -> tuple[list[str], list[list[object]]]:
    content = json.loads((run.file.parent / "files" / run.last("pruning/kept_by_layer")["path"]).read_text())
    return content["columns"], content["data"]


@pytest.mark.usefixtures("offline")
def test_the_table_of_a_70b_model_is_logged_in_seconds_and_without_a_list_of_its_rows(tmp_path):
    table = table_of(LAYERS, HEADS, CHANNELS)
    logger = WandbLogger(save_dir=tmp_path)
    assert logger.experiment.id
    tracemalloc.start()
    before, started = pa.default_memory_pool().max_memory(), time.process_time()
    log_tables(logger, table, step=0)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = len(table)
    assert rows == 2_294_400
    # a list of all rows takes more than 8 columns x 8 bytes of pointers and 56 bytes of list a row, before what they hold
    assert peak < 100 * rows
    assert pa.default_memory_pool().max_memory() - before < 250 * rows
    assert seconds < 30
    (run,) = runs(tmp_path)
    assert not any("pruning/group_table" in row for row in run.history)
    artifact = run.artifacts[f"pruning-groups-{run.id}"]
    assert artifact.type == "pruning-groups" and json.loads(artifact.metadata) == {"rows": rows}
    file = artifact_file(artifact, "group_table.parquet")
    read = pa.parquet.read_table(file)
    assert read.column_names == list(COLUMNS) and len(read) == rows
    again = GroupTable.from_arrow(read)
    assert again.keys == table.keys
    np.testing.assert_array_equal(again.importance, table.importance)
    np.testing.assert_array_equal(again.kept, table.kept)
    columns, data = logged_by_layer(run)
    assert columns == list(SUMMARY_COLUMNS) and len(data) == 2 * LAYERS
    assert sum(row[columns.index("kept")] for row in data) == table.kept.sum()
    assert sum(row[columns.index("removed_parameters")] for row in data) == table.removed_cost
    assert sum(row[columns.index("parameters")] for row in data) == table.cost.sum()


def test_a_layers_scores_are_those_of_its_rows():
    table = table_of(3, 4, 32)
    rows = table.to_arrow().to_pylist()
    for summary in layer_summary(table):
        row = dict(zip(SUMMARY_COLUMNS, summary, strict=True))
        mine = [r for r in rows if (r["kind"], r["layer"]) == (row["kind"], row["layer"])]
        scores = sorted(r["score"] for r in mine)
        assert (row["groups"], row["kept"]) == (len(mine), sum(r["kept"] for r in mine))
        assert row["removed_parameters"] == sum(r["cost"] for r in mine if not r["kept"])
        assert (row["lowest_score"], row["highest_score"]) == pytest.approx((scores[0], scores[-1]))
        assert row["median_score"] == pytest.approx((scores[len(mine) // 2 - 1] + scores[len(mine) // 2]) / 2)


def test_experts_share_a_row_and_encoder_and_decoder_do_not():
    table = table_of(4, 2, 8)
    names = ["layers.0.experts.0", "layers.0.experts.1", "encoder.block.0.mlp", "decoder.block.0.mlp"]
    table.keys = tuple((name, "mlp") for name in names) + tuple((f"other.{i}.mlp", "mlp") for i in range(1, 5))
    table.layers = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    rows = layer_summary(table)
    assert [(row[0], row[3]) for row in rows[:3]] == [
        ("layers mlp 0", 10),
        ("encoder.block mlp 0", 2),
        ("decoder.block mlp 0", 8),
    ]
    assert sum(row[3] for row in rows) == len(table)


@pytest.mark.parametrize("rows", [0, TABLE_ROWS])
@pytest.mark.usefixtures("offline")
def test_a_real_run_keeps_its_plan_and_rows_above_and_below_the_size(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(wandb_tables, "TABLE_ROWS", rows)
    callback = pruning()
    fit(tmp_path, callback, PruningReport(tmp_path / "out", save_model=False), logger=WandbLogger(save_dir=tmp_path))
    (run,) = runs(tmp_path)
    plan = run.artifacts[f"pruning-plan-{run.id}"]
    named = {e.path for e in plan.manifest.contents}
    assert (f"pruning-groups-{run.id}" in run.artifacts) == (rows == 0)
    assert any("pruning/group_table" in row for row in run.history) == (rows > 0)
    assert named == {"plan.json", "report.html", "group_table.parquet" if rows == 0 else "group_table.csv"}
    if rows == 0:
        read = GroupTable.from_arrow(pa.parquet.read_table(artifact_file(plan, "group_table.parquet")))
        assert read.removed_cost == callback.table.removed_cost
