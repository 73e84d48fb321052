"""Gates learned in the steps of real fits: weights stay, the run resumes, processes agree."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run, run_well
from test_ddp import Plain, trainer_of
from test_pruning import Module, corpus, fit, pruning
from torch.utils.data import DataLoader

from conftest import tiny
from lit_prune.callbacks import LearnedGates, Stage
from lit_prune.errors import ArgumentValueError, PruningError, UnsupportedModelError
from lit_prune.ranking.gate_scores import UNIT

pytestmark = pytest.mark.core


class Watch(pl.Callback):
    """Notes, after every batch, the step, the weights, the optimizer's state, and what is logged."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        [optimizer] = trainer.optimizers
        state = [v.clone() for s in optimizer.state.values() for v in s.values()]
        weights = [v.clone() for v in pl_module.state_dict().values()]
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gate")}
        modes = [m.training for m in pl_module.modules()]
        self.seen.append((trainer.global_step, weights, state, logged, modes))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("options", [{}, {"distillation": 0.5}, {"reconstruct": False}], ids=str)
def test_weights_and_optimizer_stay_bit_for_bit_until_the_cut(tmp_path, options, first):
    callback, gates, watch = pruning(importance="fisher", step=6), LearnedGates(steps=4, **options), Watch()
    order = [gates, callback] if first else [callback, gates]
    trainer, module = fit(tmp_path, *order, watch)
    [start] = [seen for seen in watch.seen if seen[0] == 6]
    learning = [seen for seen in watch.seen if 6 < seen[0] <= 10]
    assert len(learning) == 4
    for number, (_, weights, state, logged, modes) in enumerate(learning, 1):
        assert same(weights, start[1])
        assert same(state, start[2])
        assert logged["gate_steps"] == number
        assert {"gate_loss", "gates_changed"} <= logged.keys()
        # between batches the module is as Lightning left it
        assert modes == start[4]
    assert callback.stages_done == 1
    assert callback.plan.info["importance"] == "gates from fisher"
    after = [seen for seen in watch.seen if seen[0] > 10]
    assert sum(w.numel() for w in after[0][1]) < sum(w.numel() for w in start[1])
    # and weights train again
    assert not same(after[0][1], after[-1][1])
    assert trainer.global_step == 18
    assert "step" not in vars(module) and "training_step" not in vars(module)


def test_weights_may_train_along(tmp_path):
    watch = Watch()
    callback = pruning(importance="fisher", step=6)
    fit(tmp_path, callback, LearnedGates(steps=4, train_weights=True, reconstruct=False), watch)
    assert callback.stages_done == 1
    by_step = {seen[0]: seen for seen in watch.seen}
    assert not same(by_step[7][1], by_step[8][1])
    assert by_step[10][3]["gate_steps"] == 4


def test_batches_accumulate_to_a_step(tmp_path):
    """Two batches of two samples are one batch of four, and so are their gates."""

    class Two(Module):
        size = 4

        def __init__(self):
            super().__init__()
            self.dropout.p = 0.0

        def train_dataloader(self):
            return DataLoader(corpus(24, 0), batch_size=self.size)

    found = []
    for size, accumulate in ((4, 1), (2, 2)):
        module = Two()
        module.size = size
        loader = DataLoader(corpus(24, 0), batch_size=4)
        callback = pruning(importance="fisher", step=0, calibration_dataloader=loader, dry_run=True)
        fit(tmp_path, callback, LearnedGates(steps=3), module=module, accumulate_grad_batches=accumulate, max_epochs=1)
        found.append(torch.as_tensor(callback.table.importance))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-9)


def test_mixed_precision(tmp_path):
    callback = pruning(importance="fisher", step=2)
    fit(tmp_path, callback, LearnedGates(steps=2, distillation=1.0), precision="bf16-mixed", max_epochs=1)
    assert callback.stages_done == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"train_weights": True, "reconstruct": False}], ids=["frozen", "training"])
def test_activation_checkpointing_changes_nothing(tmp_path, options, reentrant):
    found = []
    for checkpointed in (False, True):
        module = Module()
        module.dropout.p = 0.0
        if checkpointed:
            module.inner["lm"].gradient_checkpointing_enable({"use_reentrant": reentrant})
        callback = pruning(importance="fisher", step=2, dry_run=True)
        fit(tmp_path, callback, LearnedGates(steps=3, **options), module=module, max_epochs=1)
        found.append(torch.as_tensor(callback.table.importance))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("skipped", [(), (0,), (0, 2)], ids=str)
def test_the_unit_of_the_loss_is_of_the_batches_that_have_one(tmp_path, skipped):
    """Calibration runs a batch twice for it, with the same number."""

    class Skips(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.training:
                seen.append(batch_idx)
            return None if batch_idx in skipped and not self.training else loss

    class Unit(pl.Callback):
        def on_train_batch_end(self, *_):
            units.update({state["scores"]["unit"]} if (state := gates.state_dict()["training"]) else ())

    seen, units = [], set()
    callback, gates = pruning(importance="magnitude", step=2, calibration_batches=3), LearnedGates(2, reconstruct=False)
    fit(tmp_path, callback, gates, Unit(), module=Skips(), max_epochs=1)
    assert "001122" in "".join(map(str, seen))
    assert len(units) == 1
    assert units != {UNIT}


@pytest.mark.parametrize("options", [{}, {"distillation": 0.5}, {"distillation": 1.0}], ids=str)
def test_a_step_that_returns_none_leaves_nothing_for_the_next(tmp_path, options):
    found = []
    for looks in (False, True):

        class Skips(Module):
            looks = False

            def __init__(self):
                super().__init__()
                self.dropout.p = 0.0

            def training_step(self, batch, batch_idx):
                if self.trainer.state.fn == "fit" and self.trainer.global_step >= 3 and batch_idx % 2:
                    if self.looks:
                        super().training_step(batch, batch_idx)
                    return None
                return super().training_step(batch, batch_idx)

        module = Skips()
        module.looks = looks
        callback = pruning(importance="fisher", step=3, dry_run=True)
        fit(tmp_path, callback, LearnedGates(steps=3, reconstruct=False, **options), module=module)
        found.append(torch.as_tensor(callback.table.importance))
    assert torch.equal(*found)


class TwoBranches(torch.nn.Module):
    """Two residual branches, the second of which every other pass in training leaves out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (torch.nn.Linear(8, 8) for _ in range(4))
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        x = x + self.b(torch.relu(self.a(x)))
        return x if self.training and self.passes % 2 else x + self.d(torch.relu(self.c(x)))


class DropsLayers(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = TwoBranches()

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.randn(24, 8), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_that_a_step_leaves_out_has_no_news(tmp_path, accumulate):
    callback = pruning(importance="fisher", step=1, validate=False, repair=None)
    gates = LearnedGates(steps=6, reconstruct=False, train_weights=True)
    fit(tmp_path, callback, gates, module=DropsLayers(), accumulate_grad_batches=accumulate)
    assert callback.stages_done == 1
    assert callback.plan.info["importance"] == "gates from fisher"


def test_a_schedule_learns_for_every_stage(tmp_path):
    watch = Watch()
    callback = pruning(importance="fisher", schedule=[Stage(0.1, step=3), Stage(0.2, step=9)])
    _, module = fit(tmp_path, callback, LearnedGates(steps=2), watch)
    assert callback.stages_done == 2
    sizes = {step: sum(w.numel() for w in weights) for step, weights, *_ in watch.seen}
    assert [step for step in range(2, 19) if sizes[step] < sizes[step - 1]] == [6, 12]
    assert callback.plan.info["parameters_after"] == sum(p.numel() for p in callback.model(module).parameters())


def test_a_fit_that_ends_before_is_cut_with_a_warning(tmp_path):
    callback = pruning(importance="fisher", step=15, validate=False)
    with pytest.warns(UserWarning, match=r"ended after 3 of the 50 steps"):
        _, module = fit(tmp_path, callback, LearnedGates(steps=50))
    assert callback.stages_done == 1
    left = sum(p.numel() for p in module.inner["lm"].parameters())
    assert left == callback.plan.info["parameters_after"]


def test_what_it_cannot_do_is_refused_before_training(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(PruningError, match="Manual optimizes by hand"):
        fit(tmp_path, pruning(), LearnedGates(), module=Manual())
    with pytest.raises(PruningError, match="expected one of them, found 0"):
        fit(tmp_path, LearnedGates())
    with pytest.raises(ArgumentValueError, match="importance='auto'"):
        fit(tmp_path, pruning(importance="auto"), LearnedGates())
    with pytest.raises(UnsupportedModelError, match="cannot be observed"):
        experts = tiny("mixtral", num_local_experts=3, num_experts_per_tok=2)
        fit(tmp_path, pruning(), LearnedGates(), module=Module(experts))
    with pytest.raises(ArgumentValueError, match="reconstruct=False"):
        LearnedGates(train_weights=True)
    with pytest.raises(ArgumentValueError, match="steps"):
        LearnedGates(steps=0)


def test_an_error_leaves_module_and_optimizer_as_they_were(tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 8 and not self.training and self.trainer.state.fn == "fit":
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    module, gates = Fails(), LearnedGates(steps=4, distillation=0.5)
    with pytest.raises(KeyError, match="mine"):
        fit(tmp_path, pruning(importance="fisher", step=6), gates, module=module)
    assert "training_step" not in vars(module)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert module.dropout.training
    assert gates.state_dict()["training"]["scores"]["steps"] == 2


class Repeatable(Module):
    """Draws nothing that a checkpoint does not hold; may be killed at its n-th training_step, calibration included."""

    def __init__(self, kill_at=None):
        super().__init__()
        self.dropout.p = 0.0
        Repeatable.steps, self.kill_at = 0, kill_at

    def training_step(self, batch, batch_idx):
        Repeatable.steps += 1
        if Repeatable.steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(corpus(24, 0), batch_size=4)


def train(folder, kill_at, resume):
    """Three epochs of six steps; gates are learned in steps 6 to 14, and an epoch ends in the middle of that."""
    pl.seed_everything(7, verbose=False)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_last=True, save_on_train_epoch_end=True)
    gates = LearnedGates(steps=8, refresh=3)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning(importance="fisher", epoch=1, validate=False), gates, saver],
    )
    module, last = Repeatable(kill_at), Path(folder, "last.ckpt")
    trainer.fit(module, ckpt_path=last if resume and last.exists() else None, weights_only=True)
    torch.save({"weights": module.state_dict(), "steps": Repeatable.steps}, Path(folder, "end.pt"))


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    run_well(train, str(whole), None, False, folder=whole)
    expected = torch.load(whole / "end.pt", weights_only=True)
    # a step before the first checkpoint, one within the phase, one after the checkpoint in its middle, one after the cut
    for kill_at in (10, 20, expected["steps"] - 8, expected["steps"] - 1):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        [(code, _)] = run(train, str(folder), kill_at, False, folder=folder)
        assert code == -signal.SIGKILL
        run_well(train, str(folder), None, True, folder=folder)
        end = torch.load(folder / "end.pt", weights_only=True)
        for key, value in expected["weights"].items():
            assert torch.equal(end["weights"][key], value), (kill_at, key)


def learn(folder, world):
    """Gates of a run of one or two processes with the same global batches."""
    pl.seed_everything(7, verbose=False)
    callback = pruning(importance="fisher", step=2, dry_run=True)
    trainer = trainer_of(world, callback, LearnedGates(steps=4, refresh=2), max_epochs=3)
    module = Plain()
    trainer.fit(module)
    importance = torch.as_tensor(callback.table.importance)
    torch.save(
        {"importance": importance, "weights": module.state_dict()}, Path(folder, f"{world}-{trainer.global_rank}.pt")
    )


def test_two_processes_learn_what_one_does(tmp_path):
    run_well(learn, str(tmp_path), 2, folder=tmp_path, processes=2)
    run_well(learn, str(tmp_path), 1, folder=tmp_path)
    first, second, alone = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("2-0", "2-1", "1-0"))
    assert torch.equal(first["importance"], second["importance"])
    torch.testing.assert_close(first["importance"], alone["importance"], rtol=1e-3, atol=1e-8)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-3, atol=1e-5)
