"""What a report gives to Weights & Biases: pictures, tables, artifacts; and how a run goes on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import WandbLogger

from lit_prune.callbacks.wandb_tables import add_parquet, is_large
from lit_prune.errors import PruningError
from lit_prune.plan import PruningPlan
from lit_prune.ranking.table import GroupTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def wandb_run(checkpoint: str | Path) -> dict[str, Any]:
    """Arguments for ``WandbLogger`` that continue the run which wrote a checkpoint.

    Args:
        checkpoint: A checkpoint of a run with :class:`PruningReport` and a ``WandbLogger``.

    Returns:
        ``id`` and ``resume``.

    Raises:
        PruningError: If the checkpoint carries no run.

    Example::

        trainer = L.Trainer(logger=WandbLogger(project="pruning", **wandb_run("last.ckpt")), callbacks=[...])
        trainer.fit(module, ckpt_path="last.ckpt")
    """
    states = torch.load(checkpoint, map_location="cpu", weights_only=True).get("callbacks", {}).values()
    ids = [s["wandb_run"] for s in states if isinstance(s, Mapping) and s.get("wandb_run")]
    if not ids:
        raise PruningError(f"{checkpoint} carries no Weights & Biases run; expected one written with PruningReport.")
    return {"id": ids[0], "resume": "allow"}


def log_pictures(logger: WandbLogger, drawn: Mapping[str, Figure], step: int) -> None:
    """Log the pictures, each by its name under ``pruning/``."""
    import wandb

    images = {f"pruning/{name}": wandb.Image(figure) for name, figure in drawn.items()}
    if images:
        logger.log_metrics(images, step=step)  # type: ignore[arg-type]


def log_plan(
    logger: WandbLogger, folder: Path, plan: PruningPlan, table: GroupTable | None, dense_artifact: str | None
) -> dict[str, Any]:
    """Log the plan as an artifact, with the group table and the page beside it.

    Args:
        logger: The logger.
        folder: Where the report wrote its files.
        plan: The plan.
        table: The group table, if it is at hand; a large one is added as Parquet in place of the CSV file.
        dense_artifact: Name of the artifact that the dense model came from.

    Returns:
        Where a model comes from that was cut by the plan, for the metadata of its artifact.
    """
    import wandb

    run = logger.experiment
    described = {"digest": plan.digest(), "dense_model": dense_artifact, **plan.info}
    artifact = wandb.Artifact(f"pruning-plan-{run.id}", type="pruning-plan", metadata=described)
    names = ["plan.json", "report.html"]
    if table is not None and is_large(table):
        add_parquet(artifact, table)
    else:
        names.append("group_table.csv")
    for name in names:
        if (folder / name).exists():
            artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
    return {"plan": artifact.name, "plan_digest": plan.digest(), "dense_model": dense_artifact}


def log_model(logger: WandbLogger, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Log a folder with a pruned model as an artifact."""
    import wandb

    run = logger.experiment
    model = wandb.Artifact(f"pruned-model-{run.id}", type="model", metadata=dict(metadata))
    model.add_dir(str(folder))
    run.log_artifact(model)
