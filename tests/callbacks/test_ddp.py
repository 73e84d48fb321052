"""Two processes over gloo against one process with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from test_pruning import Module, corpus, fit, pruning
from torch.utils.data import DataLoader, SequentialSampler

from lit_prune import PruningPlan
from lit_prune.errors import UnsupportedStrategyError


class Plain(Module):
    """No dropout and no shuffling: what a step sees depends on the global batch alone."""

    per_process = 4
    sequences = 24

    def __init__(self, **options):
        super().__init__(**options)
        self.dropout.p = 0.0

    def train_dataloader(self):
        data = corpus(self.sequences, 0)
        return DataLoader(data, batch_size=self.per_process, sampler=SequentialSampler(data))


class Global(Plain):
    """The batches of two processes in one."""

    per_process = 8


def run(folder: Path, importance: str, different: bool) -> None:
    """What each process of the test runs."""
    pl.seed_everything(7, verbose=False)
    torch.set_num_threads(1)
    callback = pruning(importance=importance, calibration_batches=3)
    if different and os.environ.get("LOCAL_RANK") == "1":
        callback = pruning(importance="random", seed=5)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    module = Plain()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    trainer.fit(module)
    callback.plan.save(folder / f"plan{trainer.global_rank}.json")
    torch.save(module.state_dict(), folder / f"weights{trainer.global_rank}.pt")


def launch(folder: Path, importance: str = "taylor", different: bool = False) -> subprocess.CompletedProcess[str]:
    code = f"import test_ddp, pathlib; test_ddp.run(pathlib.Path({str(folder)!r}), {importance!r}, {different})"
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here), str(here.parent))), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("importance", ["taylor_2nd", "wanda"])
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, importance):
    done = launch(tmp_path, importance)
    assert done.returncode == 0, done.stderr[-3000:]
    plans = [PruningPlan.load(tmp_path / f"plan{rank}.json") for rank in (0, 1)]
    assert plans[0].digest() == plans[1].digest()
    weights = [torch.load(tmp_path / f"weights{rank}.pt", weights_only=True) for rank in (0, 1)]
    parameters = [name for name in weights[0] if name.startswith("inner")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in parameters)
    if importance == "wanda":
        module = Global()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
        callback = pruning(importance=importance, calibration_batches=3)
        fit(tmp_path, callback, module=module, max_epochs=2)
        assert callback.plan.digest() == plans[0].digest()
        for name in parameters:
            torch.testing.assert_close(weights[0][name], module.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_different_plans_are_an_error_on_every_process_and_not_a_hang(tmp_path):
    done = launch(tmp_path, "magnitude", different=True)
    assert done.returncode != 0
    assert "different plans" in done.stderr


def test_a_strategy_that_shards_is_refused_before_training(tmp_path):
    from lightning.pytorch.strategies import FSDPStrategy

    class Sharding(FSDPStrategy):
        """Stands where FSDP would, on a machine without a GPU."""

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = Sharding
    with pytest.raises(UnsupportedStrategyError, match="found Sharding"):
        pruning().on_fit_start(trainer, Module())
