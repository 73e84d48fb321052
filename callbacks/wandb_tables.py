"""The group table for Weights & Biases: a summary of each layer, and all rows as a table, or as a Parquet file if it is large."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from lit_prune.ranking.table import GroupTable

# as many rows as Weights & Biases shows of a table; beyond, it keeps them and draws the first ones alone
TABLE_ROWS = 10_000

SUMMARY_COLUMNS = (
    "place",
    "kind",
    "layer",
    "groups",
    "kept",
    "parameters",
    "removed_parameters",
    "lowest_score",
    "median_score",
    "highest_score",
)


def is_large(table: GroupTable) -> bool:
    """Whether a table has more than :data:`TABLE_ROWS` rows, so that it is logged as a Parquet file."""
    return len(table) > TABLE_ROWS


def layer_summary(table: GroupTable) -> list[list[Any]]:
    """The rows of a summary with the columns :data:`SUMMARY_COLUMNS`: one for each kind of group in each layer.

    The experts of a layer share a row. ``parameters`` counts what the layer's groups hold, ``removed_parameters`` what was
    removed of it; scores are importance divided by cost, of all groups of the row.

    Args:
        table: The group table.
    """
    members: dict[tuple[str, str, int], list[int]] = {}
    for position, ((name, kind), layer) in enumerate(zip(table.keys, table.layers, strict=True)):
        # encoder and decoder both have a layer 0: tell them by what stands before the first number
        stack = re.split(r"\.\d+(?:\.|$)", name)[0]
        members.setdefault((stack, kind, int(layer)), []).append(position)
    stacks = {stack for stack, _, _ in members}
    score, leaving = table.score, table.leaving
    rows: list[list[Any]] = []
    for (stack, kind, layer), positions in members.items():
        parts = [slice(table.offsets[p], table.offsets[p + 1]) for p in positions]
        scores = np.concatenate([score[part] for part in parts])
        spread = [float(v) for v in np.quantile(scores, [0, 0.5, 1])] if len(scores) else [None] * 3
        place = f"{kind} {layer}" if len(stacks) == 1 else f"{stack} {kind} {layer}"
        counts = (
            sum(part.stop - part.start for part in parts),
            sum(table.kept[part].sum() for part in parts),
            sum(table.cost[part].sum() for part in parts),
            sum(table.cost[part][leaving[part]].sum() for part in parts),
        )
        rows.append([place, kind, layer, *map(int, counts), *spread])
    return rows


def log_tables(logger: WandbLogger, table: GroupTable, step: int) -> None:
    """Log what each layer kept as a table and a bar chart, and the rows of the group table.

    Up to :data:`TABLE_ROWS` rows are a ``wandb.Table``; a larger table is the file ``group_table.parquet`` of an artifact
    of the type ``pruning-groups``, and no Python object is made for a row.
    """
    import wandb

    by_layer = wandb.Table(columns=list(SUMMARY_COLUMNS), data=layer_summary(table))
    chart = wandb.plot.bar(by_layer, "place", "kept", title="Groups kept")
    logger.log_metrics({"pruning/kept_by_layer": by_layer, "pruning/kept_chart": chart}, step=step)  # type: ignore[dict-item]
    if is_large(table):
        run = logger.experiment
        artifact = wandb.Artifact(f"pruning-groups-{run.id}", type="pruning-groups", metadata={"rows": len(table)})
        add_parquet(artifact, table)
        run.log_artifact(artifact)
        return
    columns = table.to_arrow()
    names = columns.column_names
    rows = [list(row) for row in zip(*(columns[name].to_pylist() for name in names), strict=True)]
    logger.log_metrics({"pruning/group_table": wandb.Table(columns=names, data=rows)}, step=step)  # type: ignore[dict-item]


def add_parquet(artifact: Any, table: GroupTable) -> None:
    """Add ``group_table.parquet`` to a ``wandb.Artifact``, which keeps a copy until it is uploaded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "group_table.parquet"
        table.to_parquet(file)
        artifact.add_file(str(file))
