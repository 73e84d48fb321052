"""The callback in real fits."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from conftest import SMALL, tiny
from lit_prune import BudgetError, CalibrationError, GroupTable, PruningPlan, UnsupportedModelError, find_group_sets
from lit_prune.callbacks import StructuredPruning

pytestmark = pytest.mark.core


def corpus(sequences: int, seed: int) -> torch.Tensor:
    """Token sequences with a structure to learn: each token follows from the one before, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (sequences, 12), generator=generator)
    for position in range(1, 12):
        copied = torch.rand(sequences, generator=generator) < 0.8
        ids[:, position] = torch.where(copied, (3 * ids[:, position - 1] + 1) % SMALL["vocab_size"], ids[:, position])
    return ids


class Module(pl.LightningModule):
    """A user's module: the model is nested, the step logs, updates a metric, draws random numbers and drops out."""

    def __init__(self, model=None, frozen=False, **overrides):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"lm": model if model is not None else tiny("llama", **overrides)})
        self.dropout = torch.nn.Dropout(0.1)
        self.accuracy = torchmetrics.MeanMetric()
        self.losses: list[float] = []
        self.draws: list[float] = []
        if frozen:
            self.inner.requires_grad_(False)
            self.extra = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        hidden = self.dropout(self.inner["lm"].model.embed_tokens(batch))
        output = self.inner["lm"](inputs_embeds=hidden, labels=batch)
        self.accuracy(output.loss.detach())
        self.log("train_loss", output.loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", self.accuracy)
        if not getattr(self, "quiet", False) and self.training:
            self.losses.append(output.loss.item())
            self.draws.append(torch.rand(()).item() + random.random() + np.random.rand())
        return output.loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner["lm"](input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]

    def train_dataloader(self):
        return DataLoader(corpus(24, 0), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(corpus(8, 1), batch_size=4)


def fit(tmp_path, *callbacks, module=None, checkpoint=None, **options):
    pl.seed_everything(7, verbose=False)
    module = module or Module()
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            **options,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")
        trainer.fit(module, ckpt_path=checkpoint)
    return trainer, module


def pruning(**options) -> StructuredPruning:
    return StructuredPruning(**{"importance": "taylor", "pruning_ratio": 0.2, "calibration_batches": 3, **options})


@pytest.mark.parametrize("importance", ["taylor", "taylor_2nd", "wanda", "magnitude", "random"])
def test_one_callback_prunes_and_the_same_fit_recovers(tmp_path, importance):
    callback = pruning(importance=importance, epoch=2, output_dir=tmp_path)
    trainer, module = fit(tmp_path, callback, max_epochs=8)
    model = module.inner["lm"]
    before = callback.plan.info["parameters_before"]
    after = sum(p.numel() for p in model.parameters())
    assert 0.19 < (before - after) / before <= 0.2
    assert callback.table.removed_cost == before - after
    assert set(callback.metrics) == {"dense", "pruned"}
    assert callback.metrics["pruned"]["val_loss"] != callback.metrics["dense"]["val_loss"]
    assert trainer.callback_metrics["val_loss"] < callback.metrics["pruned"]["val_loss"]
    assert trainer.global_step == 8 * 6
    assert PruningPlan.load(tmp_path / "plan.json") == callback.plan
    written = GroupTable.read(tmp_path / "group_table.csv")
    assert np.array_equal(written.kept, callback.table.kept)
    assert np.array_equal(written.score, callback.table.score)
    optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    assert trainer.optimizers[0].state[model.model.layers[0].mlp.up_proj.weight]["step"] == 48


@pytest.mark.parametrize("point", [{"epoch": 1}, {"step": 8}])
@pytest.mark.parametrize("importance", ["taylor_2nd", "wanda"])
def test_calibration_leaves_no_trace(tmp_path, point, importance):
    """Every loss, random number and logged value of a dry run equals, bit for bit, those of a run without the callback."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    plain_logger, dry_logger = (CSVLogger(tmp_path, name=name) for name in ("plain", "dry"))
    plain_trainer, plain = fit(tmp_path, logger=plain_logger, **options)
    callback = pruning(importance=importance, dry_run=True, **point)
    dry_trainer, dry = fit(tmp_path, callback, logger=dry_logger, **options)
    assert callback.table is not None and callback.table.removed_cost > 0
    assert dry.losses == plain.losses and len(plain.losses) == 18
    assert dry.draws == plain.draws
    assert dry_trainer.global_step == plain_trainer.global_step
    for name, value in plain.state_dict().items():
        assert torch.equal(dry.state_dict()[name], value), name
    read = [Path(logger.log_dir, "metrics.csv").read_text() for logger in (plain_logger, dry_logger)]
    assert read[0] == read[1]


def test_losses_before_the_cut_equal_those_without_the_callback(tmp_path):
    _, plain = fit(tmp_path)
    _, pruned = fit(tmp_path, pruning(epoch=1))
    assert pruned.losses[:6] == plain.losses[:6]
    assert pruned.losses[6:] != plain.losses[6:]


def test_a_dataloader_with_its_own_generator_and_workers_keeps_its_order(tmp_path):
    class WithGenerator(Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            if self.training:
                self.seen.append(batch.clone())
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            generator = torch.Generator().manual_seed(5)
            return DataLoader(
                corpus(24, 0), batch_size=4, shuffle=True, generator=generator, num_workers=1, persistent_workers=True
            )

    _, plain = fit(tmp_path, module=WithGenerator())
    _, dry = fit(tmp_path, pruning(dry_run=True, step=8), module=WithGenerator())
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, dry.seen, strict=True))


def test_calibration_data_may_come_from_another_dataloader(tmp_path):
    other = DataLoader(corpus(8, 9), batch_size=2)
    tables = []
    for loader in (None, other):
        callback = pruning(calibration_dataloader=loader, calibration_batches=4)
        fit(tmp_path, callback, max_epochs=2)
        tables.append(callback.table.importance)
    assert not np.allclose(*tables)


def test_other_callbacks_are_told(tmp_path):
    class Listener(Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            self.start = sum(p.numel() for p in pl_module.parameters()), pruning.plan

        def on_pruning_end(self, trainer, pl_module, pruning):
            self.end = sum(p.numel() for p in pl_module.parameters()), pruning.plan

    listener = Listener()
    callback = pruning()
    fit(tmp_path, callback, listener, max_epochs=2)
    assert listener.start[1] is None and listener.end[1] is callback.plan
    assert listener.end[0] == listener.start[0] - callback.table.removed_cost


def test_a_checkpoint_after_the_cut_rebuilds_the_smaller_model(tmp_path):
    callback = pruning()
    trainer, module = fit(tmp_path, callback, max_epochs=2)
    path = tmp_path / "pruned.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert PruningPlan.from_dict(checkpoint["callbacks"][callback.state_key]["plan"]) == callback.plan
    _, full = fit(tmp_path, pruning(), max_epochs=4)

    pl.seed_everything(7, verbose=False)
    again = Module()
    resumed = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning()],
    )
    expected = resumed.validate(module, verbose=False)
    assert resumed.validate(again, ckpt_path=path, verbose=False, weights_only=True) == expected
    resumed.fit(Module(), ckpt_path=path, weights_only=True)
    assert resumed.global_step == 24
    assert find_group_sets(resumed.lightning_module)[0].size == find_group_sets(module)[0].size
    assert len(full.losses) == 24


# bad input


def test_bad_arguments_are_refused_at_once():
    for ratio in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            StructuredPruning(pruning_ratio=ratio)
    with pytest.raises(
        ValueError, match=r"importance must name criteria out of taylor, taylor_2nd, .*; found 'tailor'"
    ):
        StructuredPruning("tailor")
    with pytest.raises(ValueError, match="one and not both"):
        StructuredPruning(epoch=1, step=3)
    with pytest.raises(ValueError, match="0 or more"):
        StructuredPruning(epoch=-1)
    with pytest.raises(ValueError, match="calibration_batches"):
        StructuredPruning(calibration_batches=0)
    with pytest.raises(ValueError, match="statistics must be one of 'streaming', 'elementwise'; found 'lazy'"):
        StructuredPruning(statistics="lazy")
    with pytest.raises(ValueError, match="normalize must be one of"):
        StructuredPruning(normalize="max")
    with pytest.raises(ValueError, match="ratio_of"):
        StructuredPruning(ratio_of="most")
    with pytest.raises(CalibrationError, match="empty"):
        StructuredPruning(calibration_dataloader=DataLoader([]))


def test_what_cannot_work_is_refused_before_training(tmp_path):
    for callback, error, message in (
        (pruning(pruning_ratio=0.9), BudgetError, "may be removed"),
        (pruning(protect=(7,)), ValueError, "layers 0 to 2"),
        (pruning(kinds=("heads",)), ValueError, "attention, mlp"),
    ):
        module = Module()
        with pytest.raises(error, match=message):
            fit(tmp_path, callback, module=module)
        assert module.losses == []

    class Unsupported(Module):
        def __init__(self):
            super().__init__(model=torch.nn.BatchNorm1d(2))

    with pytest.raises(UnsupportedModelError, match="ModuleDict has no weights of two or more dimensions"):
        fit(tmp_path, pruning(), module=Unsupported())


def test_several_models_need_a_path(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.teacher = tiny("llama")

    with pytest.raises(UnsupportedModelError, match=r"2 supported models .*'inner.lm' .*'teacher'"):
        fit(tmp_path, pruning(), module=Two())
    module = Two()
    fit(tmp_path, pruning(model_path="inner.lm"), module=module)
    assert sum(p.numel() for p in module.inner.parameters()) < sum(p.numel() for p in module.teacher.parameters())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_is_named_and_nothing_is_cut(tmp_path, bad):
    class Poisoned(Module):
        calibrating = 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.training:
                self.calibrating += 1
                # the count is put back after the check of what modules compute
                if self.calibrating == 2:
                    weight = self.inner["lm"].model.layers[1].mlp.down_proj.weight
                    extra = weight.flatten()[:1].detach() * 0 + torch.nan if bad == "loss" else _infinite(weight)
                    loss = loss + extra.sum()
            return loss

    def _infinite(weight):
        return (weight - weight.detach()).flatten()[:1].abs().sqrt()

    module = Poisoned()
    message = "loss of calibration batch 1 is nan" if bad == "loss" else "layers.1.mlp.down_proj.weight.*batch 1"
    with pytest.raises(CalibrationError, match=message):
        fit(tmp_path, pruning(), module=module)
    assert len(module.losses) == 6
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in Module().parameters())
    assert all(not p._post_accumulate_grad_hooks for p in module.parameters())
    assert all(not m._forward_pre_hooks for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())


def test_frozen_parameters_are_refused_with_a_gradient_criterion(tmp_path):
    class Frozen(Module):
        def __init__(self):
            super().__init__(frozen=True)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.extra

    with pytest.raises(CalibrationError, match=r"frozen.*wanda"):
        fit(tmp_path, pruning(), module=Frozen())
    module = Frozen()
    callback = pruning(importance="wanda")
    fit(tmp_path, callback, module=module)
    assert callback.table.removed_cost > 0


class StopsEarly(Module):
    """Asks the Trainer to stop after its first epoch, which nobody can know before."""

    def on_train_epoch_end(self):
        self.trainer.should_stop = True


def test_a_point_that_is_never_reached_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="scheduled for epoch 2, but training ended after epoch 1"):
        fit(tmp_path, pruning(epoch=2), module=StopsEarly())
