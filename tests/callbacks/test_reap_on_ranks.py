"""The criterion reap over two processes: an expert's mean is over the tokens of both, however they are spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_well
from test_ddp import Plain, trainer_of
from test_pruning import pruning

from conftest import tiny

pytestmark = pytest.mark.core


def rank_experts(folder, world):
    callback = pruning(importance="reap", kinds=["expert"], step=0, dry_run=True, min_fraction=0.0, normalize=None)
    trainer = trainer_of(world, callback, max_epochs=1)
    trainer.fit(Plain(tiny("mixtral", num_local_experts=4, num_experts_per_tok=1, intermediate_size=32)))
    torch.save(torch.as_tensor(callback.table.importance), Path(folder, f"{world}-{trainer.global_rank}.pt"))


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    run_well(rank_experts, str(tmp_path), 2, folder=tmp_path, processes=2)
    run_well(rank_experts, str(tmp_path), 1, folder=tmp_path)
    first, second, alone = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("2-0", "2-1", "1-0"))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-7)
