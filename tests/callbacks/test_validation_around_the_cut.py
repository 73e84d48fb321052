"""The validation around the cut asks a Trainer for nothing that it does not have, and leaves no trace."""

from __future__ import annotations

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_lifecycle import Small, same_weights, small
from test_pruning import corpus
from test_resume import quiet
from torch.utils.data import DataLoader, IterableDataset

from lit_prune.callbacks import PruningReport, Stage


class NoLoader(Small):
    """Defines validation_step, and no loader for it."""

    val_dataloader = pl.LightningModule.val_dataloader


class NoStep(Small):
    validation_step = pl.LightningModule.validation_step


class Silent(Small):
    def validation_step(self, batch, batch_idx):
        pass


class Empty(Small):
    def val_dataloader(self):
        return []


NOTHING = {
    "no loader": (NoLoader, {}, "there is no validation dataloader"),
    "no loader, no sanity check": (NoLoader, {"num_sanity_val_steps": 0}, "there is no validation dataloader"),
    "no step": (NoStep, {}, "the module has no validation_step"),
    "limit": (Small, {"limit_val_batches": 0}, "limit_val_batches is 0"),
    "barebones": (Small, {"barebones": True}, "validation_step logged none"),
    "nothing logged": (Silent, {}, "validation_step logged none"),
    "no batches": (Empty, {}, "validation_step logged none"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_without_anything_to_validate_there_are_no_metrics(caplog, name):
    kind, options, reason = NOTHING[name]
    if "barebones" in options:
        options = {"barebones": True, "enable_checkpointing": None, "logger": None, "enable_progress_bar": None}
        options |= {"enable_model_summary": None, "log_every_n_steps": None}
    quiet(max_epochs=2, **options).fit(plain := kind())
    callback = small(epoch=1)
    with caplog.at_level("INFO"):
        quiet(callback, max_epochs=2, **options).fit(module := kind())
    assert module.losses[:6] == plain.losses[:6] and len(module.losses) == len(plain.losses)
    assert callback.stages_done == 1 and callback.metrics == {}
    for stage in ("dense", "pruned"):
        assert f"No validation metrics of the {stage} model: {reason}." in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (NoLoader, {}, "there is no validation dataloader"),
        (Small, {"validate": False}, "StructuredPruning has validate=False"),
    ],
)
def test_the_report_says_why_there_are_no_metrics(tmp_path, capsys, kind, options, reason):
    report = PruningReport(tmp_path, save_model=False)
    quiet(small(epoch=0, **options), report, max_epochs=1).fit(kind())
    assert set(json.loads((tmp_path / "report.json").read_text())["pruned"]) == {"parameters", "megabytes"}
    assert f"No validation metrics: {reason}." in capsys.readouterr().out
    assert f"No validation metrics: {reason}." in (tmp_path / "report.html").read_text()


class Several(Small):
    def val_dataloader(self):
        return [DataLoader(corpus(8, seed), batch_size=4) for seed in (1, 2)]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


class Lengthless(IterableDataset):
    def __init__(self, seed, sequences):
        self.ids = corpus(sequences, seed)

    def __iter__(self):
        return iter(self.ids)


class Streams(Small):
    def train_dataloader(self):
        return DataLoader(Lengthless(0, 24), batch_size=4)

    def val_dataloader(self):
        return DataLoader(Lengthless(1, 12), batch_size=4)


class Shuffled(Small):
    """Draws what to validate on, and in which order, anew for every loader."""

    def val_dataloader(self):
        data = corpus(16, int(torch.randint(9, ())))
        return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))


class InDataModule(pl.LightningDataModule):
    train_dataloader, val_dataloader = Small.train_dataloader, Small.val_dataloader


LOOPS = {
    "sanity check off": (Small, {"num_sanity_val_steps": 0}),
    "sanity check on": (Small, {"num_sanity_val_steps": -1}),
    "several loaders": (Several, {}),
    "iterables": (Streams, {}),
    "interval over an iterable": (Streams, {"val_check_interval": 2}),
    "interval across epochs": (Small, {"val_check_interval": 4, "check_val_every_n_epoch": None}),
    "rare": (Shuffled, {"check_val_every_n_epoch": 3, "num_sanity_val_steps": 0}),
    "reloaded": (Shuffled, {"reload_dataloaders_every_n_epochs": 1}),
    "reloaded, no sanity check": (Shuffled, {"reload_dataloaders_every_n_epochs": 2, "num_sanity_val_steps": 0}),
    "limited": (Small, {"limit_val_batches": 1}),
    "by time": (Small, {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None}),
    "overfit": (Small, {"overfit_batches": 2}),
}


class Record(pl.Callback):
    """What a fit validates, when, and what it logs there."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen.append((trainer.global_step, trainer.sanity_checking, batch_idx, dataloader_idx, batch.tolist()))

    def on_validation_end(self, trainer, pl_module):
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        self.seen.append(
            (copy.deepcopy(progress.state_dict()), {k: float(v) for k, v in trainer.callback_metrics.items()})
        )


@pytest.mark.parametrize(
    ("name", "point"),
    [*((name, {"epoch": 1}) for name in LOOPS), ("iterables", {"step": 8}), ("interval across epochs", {"step": 8})],
)
def test_validation_around_the_cut_leaves_no_trace(name, point):
    kind, options = LOOPS[name]
    runs = []
    for callbacks in ([], [small(dry_run=True, **point)]):
        pl.seed_everything(7, verbose=False)
        module, record = kind(), Record()
        trainer = quiet(*callbacks, record, max_epochs=3, **options)
        trainer.fit(module)
        loop = trainer.fit_loop.epoch_loop.val_loop
        runs.append((module.losses, record.seen, module.draws, loop.batch_progress.state_dict()))
    assert callbacks[0].stages_done == 1
    assert runs[0] == runs[1]
    assert any(key.startswith("val_loss") for key in callbacks[0].metrics["dense"])


def test_every_loader_is_in_the_metrics_and_a_data_module_is_asked(tmp_path):
    callback = small(epoch=1)
    quiet(callback, max_epochs=2).fit(Several())
    assert set(callback.metrics["pruned"]) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}

    class Bare(NoLoader):
        train_dataloader = pl.LightningModule.train_dataloader

    inside, outside = small(epoch=1), small(epoch=1)
    quiet(inside, max_epochs=2).fit(Bare(), InDataModule())
    quiet(outside, max_epochs=2).fit(Small())
    assert inside.metrics == outside.metrics and set(inside.metrics) == {"dense", "pruned"}


def test_validating_before_a_fit_changes_nothing(tmp_path):
    callback, module = small(epoch=1), NoLoader()
    trainer = quiet(callback, max_epochs=2)
    trainer.validate(module, DataLoader(corpus(8, 1), batch_size=4), verbose=False)
    trainer.fit(module)
    assert callback.stages_done == 1 and callback.metrics == {}


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(tmp_path, step):
    """The validation loop comes out of a checkpoint in the state in which it was left, and is not continued there."""
    schedule = [Stage(0.1, epoch=1), Stage(0.2, epoch=2)]
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_epochs": 3, "val_check_interval": 5, "check_val_every_n_epoch": None}
    whole, again = small(schedule=schedule), small(schedule=schedule)
    quiet(whole, saver, **options, enable_checkpointing=True).fit(expected := Small())
    quiet(again, **options).fit(module := Small(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
    assert again.metrics == whole.metrics and same_weights(module, expected)
