"""What the other files of this folder use of the pruning callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import nn

from lit_prune.callbacks.runs import Runs
from lit_prune.callbacks.schedule import Stage
from lit_prune.config import PruningConfig
from lit_prune.plan import PruningPlan
from lit_prune.ranking.table import GroupTable


class Pruning(Protocol):
    """A pruning callback; :class:`lit_prune.callbacks.StructuredPruning` says what each member is."""

    calibration_batches: int
    calibration_dataloader: Iterable[Any] | None
    config: PruningConfig
    costs: dict[str, float]
    dry_run: bool
    model_path: str | None
    output_dir: Path | None
    runs: Runs
    stages: tuple[Stage, ...]
    validate: bool

    @property
    def plan(self) -> PruningPlan | None:
        """The plan from the model that the run began with to the model as it is."""

    @property
    def table(self) -> GroupTable | None:
        """The group table of the last stage."""

    @property
    def stages_done(self) -> int:
        """How many stages of the schedule are done."""

    @property
    def state_key(self) -> str:
        """What the state is stored under in a checkpoint."""

    def model(self, pl_module: pl.LightningModule) -> nn.Module:
        """The model inside the LightningModule that is pruned."""

    def stage_config(self, stage: int = -1) -> PruningConfig:
        """The configuration of a stage of the schedule."""

    def notify(self, trainer: pl.Trainer, pl_module: pl.LightningModule, hook: str, *arguments: Any) -> None:
        """Call a hook around pruning on every callback that defines it."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain data."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""

    def check_resumable(self, trainer: pl.Trainer, state_dict: Mapping[str, Any]) -> None:
        """Refuse to go on from a checkpoint whose model has lost more than is asked for."""
