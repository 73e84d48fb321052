"""The life of the callback: stopped and resumed anywhere, several fits, several models, what a fit cannot do."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from test_pruning import corpus, pruning
from test_resume import MidEpoch, Repeatable, quiet

from conftest import tiny
from lit_prune.callbacks import Stage


class Small(MidEpoch):
    """Two layers, batches of 4 by a dataloader that can be resumed in the middle of an epoch; 6 batches an epoch."""

    def __init__(self):
        super().__init__()
        self.inner["lm"] = tiny("llama", num_hidden_layers=2)


def small(**options):
    return pruning(**{"calibration_batches": 2, "iterations": 1, "importance": "wanda", "repair": None, **options})


def same_weights(a, b):
    states = [{k: v for k, v in m.state_dict().items() if not k.startswith("accuracy")} for m in (a, b)]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# stopped and resumed


@pytest.mark.parametrize(
    ("limits", "every", "schedule"),
    [
        ({"max_epochs": 3}, 1, [Stage(0.2, epoch=1)]),
        ({"max_epochs": 3}, 3, [Stage(0.1, epoch=1), Stage(0.2, epoch=2)]),
        ({"max_steps": 18, "max_epochs": -1}, 3, [Stage(0.2, epoch=1)]),
        ({"max_epochs": 3, "accumulate_grad_batches": 6}, 1, [Stage(0.2, epoch=1)]),
    ],
)
def test_a_stage_by_epoch_comes_in_time_from_every_step_checkpoint(tmp_path, limits, every, schedule):
    """Lightning calls no on_train_epoch_start for the epoch after a checkpoint from an epoch's last batch."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    whole = Small()
    quiet(small(schedule=schedule), saver, enable_checkpointing=True, **limits).fit(whole)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        again, resumed = Small(), small(schedule=schedule)
        quiet(resumed, **limits).fit(again, ckpt_path=path, weights_only=True)
        assert resumed.stages_done == len(schedule), path.name
        assert again.losses == whole.losses[len(whole.losses) - len(again.losses) :], path.name
        assert same_weights(again, whole), path.name
