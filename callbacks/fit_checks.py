"""What is refused at the start of a fit, before any work is done."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_prune.architectures.registry import find_group_sets, has_groups
from lit_prune.architectures.weight_checks import check_parameters
from lit_prune.budgeting import check_before_fit
from lit_prune.callbacks.output import check_output
from lit_prune.callbacks.protocol import Pruning
from lit_prune.callbacks.ranks import ranks_of
from lit_prune.detection import check_traceable
from lit_prune.distributed import shards


def check_fit(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check the output folder, the model and the budget of the last stage.

    Args:
        pruning: The pruning callback.
        trainer: The trainer, at the start of a fit.
        pl_module: The module that holds the model.

    Raises:
        PruningError: If the folder cannot be written to, the model cannot be pruned, or the budget cannot be reached.
    """
    if pruning.output_dir is not None:
        check_output(trainer, pruning.output_dir)
    model = pruning.model(pl_module)
    if not has_groups(model):
        # its groups are found at the first stage, by running a batch
        check_traceable(model, blocks=pruning.config.limits.blocks)
        return
    limits = pruning.config.limits
    group_sets = find_group_sets(model, blocks=limits.blocks, hidden=limits.hidden)
    shards.check_layout(model, group_sets)
    check_parameters(model, group_sets, pl_module)
    check_before_fit(model, group_sets, pruning.stage_config(), ranks_of(trainer))
