"""``pytorch_lightning`` beside ``lightning.pytorch``: the same run, to the last bit, with the classes of either package."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import lightning.pytorch
import pytest
import torch
from processes import run_well
from test_pruning import corpus
from torch.utils.data import DataLoader

from conftest import tiny
from lit_prune import rebuild_from_checkpoint
from lit_prune.callbacks import Distillation, LearningRateRewarmup, LoRARecovery, PruningReport, StructuredPruning
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.strategies import check_strategy
from lit_prune.errors import UnsupportedStrategyError

pytorch_lightning = pytest.importorskip("pytorch_lightning")
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def module_of(package: ModuleType) -> torch.nn.Module:
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.lm = tiny("llama")

        def training_step(self, batch, batch_idx):
            loss = self.lm(input_ids=batch, labels=batch).loss
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.lm(input_ids=batch, labels=batch).loss)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)

        def on_load_checkpoint(self, checkpoint):
            rebuild_from_checkpoint(self, checkpoint)

    return Module()


class Data:
    """Mixed into the data module of either package."""

    def train_dataloader(self):
        return DataLoader(corpus(24, 0), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(corpus(8, 1), batch_size=4)


def callbacks_of(package: ModuleType, folder: Path, name: str) -> list:
    pruning = StructuredPruning("taylor", calibration_batches=3, output_dir=folder)
    if name == "scores":
        saver = package.callbacks.ModelCheckpoint(folder, filename="{epoch}", monitor="val_loss", save_top_k=-1)
        patience = package.callbacks.EarlyStopping("val_loss", patience=2)
        return [
            pruning,
            LearningRateRewarmup(4),
            Distillation(),
            PruningReport(folder, save_model=False),
            saver,
            patience,
        ]
    if name == "average":
        return [pruning, package.callbacks.EMAWeightAveraging(decay=0.8)]
    return [pruning, LoRARecovery(r=2)]


def trained(package: ModuleType, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A fit, a validation from its checkpoint, and the same fit resumed."""
    options = {
        "accelerator": "cpu",
        "logger": package.loggers.CSVLogger(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": name == "scores",
    }
    data = type("DataModule", (Data, package.LightningDataModule), {})()
    torch.manual_seed(7)
    module = module_of(package)
    trainer = package.Trainer(max_epochs=3, callbacks=callbacks_of(package, folder, name), **options)
    trainer.fit(module, data)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in tiny("llama").parameters())
    result = dict(module.state_dict())
    if name == "scores":
        pruning, saver = trainer.callbacks[0], trainer.checkpoint_callback
        # the scores of the dense model were forgotten at the cut
        assert "epoch=0" not in "".join(saver.best_k_models)
        path = folder / "epoch=1.ckpt"
        loaded = type(module).load_from_checkpoint(path, weights_only=True)
        measured = module_of(package)
        again = package.Trainer(callbacks=callbacks_of(package, folder, name), **options)
        again.validate(measured, data, ckpt_path=path, weights_only=True, verbose=False)
        for key, value in loaded.state_dict().items():
            assert torch.equal(measured.state_dict()[key], value), key
        assert "val_loss" in pruning.metrics["pruned"]
        result |= {f"loaded.{key}": value for key, value in loaded.state_dict().items()}
    return result


@pytest.mark.parametrize("name", ["scores", "average", "adapters"])
def test_runs_of_both_packages_are_equal(tmp_path, name):
    results = []
    for package in PACKAGES:
        folder = tmp_path / package
        folder.mkdir()
        results.append(trained(importlib.import_module(package), folder, name))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_classes_are_told_by_what_they_are_in_either_package():
    strategies = pytorch_lightning.strategies
    check_strategy(strategies.DDPStrategy())
    check_strategy(strategies.SingleDeviceStrategy())
    with pytest.raises(UnsupportedStrategyError, match="FSDP1"):
        check_strategy(strategies.FSDPStrategy.__new__(strategies.FSDPStrategy))
    with pytest.raises(UnsupportedStrategyError, match=r"'spawn'"):
        trainer = pytorch_lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
        check_strategy(trainer.strategy)

    class Mine(pytorch_lightning.callbacks.ModelCheckpoint):
        pass

    assert is_a(Mine(), lightning.pytorch.callbacks.ModelCheckpoint)
    assert not is_a(Mine(), lightning.pytorch.callbacks.EarlyStopping)
    assert not is_a(object(), lightning.pytorch.callbacks.EarlyStopping)


def two_processes(folder: str) -> None:
    for name in PACKAGES:
        package = importlib.import_module(name)
        package.seed_everything(7, verbose=False)
        trainer = package.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=2,
            strategy=package.strategies.DDPStrategy(process_group_backend="gloo"),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StructuredPruning("taylor", calibration_batches=2, iterations=1)],
        )
        module = module_of(package)
        trainer.fit(module, Data().train_dataloader(), Data().val_dataloader())
        torch.save(module.state_dict(), Path(folder, f"{name}-{trainer.global_rank}.pt"))


def test_two_processes_of_both_packages_are_equal(tmp_path):
    run_well(two_processes, str(tmp_path), folder=tmp_path, processes=2)
    one, *others = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in PACKAGES for rank in range(2))
    for other in others:
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
