"""Checkpoints: rebuilding before weights load, and a killed process that goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from processes import run, run_well
from test_pruning import Module, corpus, fit, pruning
from torch.utils.data import DataLoader

import lit_prune
from conftest import tiny
from lit_prune import PlanError, callbacks, get_plan, rebuild_from_checkpoint
from lit_prune.callbacks import Stage
from lit_prune.training import CausalLMModule


class Repeatable(Module):
    """Draws nothing that a checkpoint does not hold; may be killed at its n-th training_step, calibration included."""

    def __init__(self, kill_at: int | None = None):
        super().__init__()
        self.dropout.p = 0.0
        Repeatable.steps = 0
        self.kill_at = kill_at

    def training_step(self, batch, batch_idx):
        # on the class, so that calibration, which puts back the module's attributes, is counted
        Repeatable.steps += 1
        if Repeatable.steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(corpus(24, 0), batch_size=4)


SCHEDULE = [Stage(0.1, epoch=1), Stage(0.2, epoch=3)]


def train(folder: str, kill_at: int | None, resume: bool) -> None:
    """What a process of the kill test runs: four epochs, two stages, a checkpoint after every epoch."""
    pl.seed_everything(7, verbose=False)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning(schedule=SCHEDULE, iterations=2), saver],
    )
    module = Repeatable(kill_at)
    last = Path(folder, "last.ckpt")
    trainer.fit(module, ckpt_path=last if resume and last.exists() else None, weights_only=True)
    torch.save({"weights": module.state_dict(), "steps": module.steps}, Path(folder, "end.pt"))


def test_a_killed_process_resumed_ends_with_the_same_weights_bit_for_bit(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    run_well(train, str(whole), None, False, folder=whole)
    expected = torch.load(whole / "end.pt", weights_only=True)
    # an epoch is 6 steps; a stage has a call to check modules, and each of its two iterations 3 calls to calibrate, which
    # record what compensation and repair need
    assert expected["steps"] == 4 * 6 + 2 * (1 + 2 * 3)
    points = {
        "first epoch": 3,
        "calibration": 8,
        "repair": 11,
        "after the cut": 15,
        "second calibration": 25,
        "end": 36,
    }
    for name, kill_at in points.items():
        folder = tmp_path / name
        folder.mkdir()
        [(code, _)] = run(train, str(folder), kill_at, False, folder=folder)
        assert code == -signal.SIGKILL
        assert not (folder / "end.pt").exists()
        run_well(train, str(folder), None, True, folder=folder)
        end = torch.load(folder / "end.pt", weights_only=True)
        assert end["steps"] < expected["steps"] or name == "first epoch"
        for key, value in expected["weights"].items():
            assert torch.equal(end["weights"][key], value), (name, key)


def train_counted(folder: str, kill_at: int | None) -> None:
    """Like :func:`train`; killed at the n-th call of any function of lit_prune and Lightning, wherever that is."""
    counted, calls = (str(Path(module.__file__).parent) for module in (lit_prune, callbacks, lightning)), 0
    folders = tuple(counted)

    def count(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    # a trace function that returns None is called for calls alone; a profile function is for returns and C functions, too
    sys.settrace(count)
    train(folder, None, False)
    sys.settrace(None)
    Path(folder, "calls.txt").write_text(str(calls))


@pytest.mark.parametrize("points", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_it_may_be_killed_anywhere(tmp_path, points):
    """In the middle of planning, surgery, or writing a checkpoint as well as between steps."""
    whole = tmp_path / "whole"
    whole.mkdir()
    run_well(train_counted, str(whole), None, folder=whole)
    expected = torch.load(whole / "end.pt", weights_only=True)["weights"]
    calls = int((whole / "calls.txt").read_text())
    generator = torch.Generator().manual_seed(points)
    for kill_at in torch.randint(1, calls, (points,), generator=generator).tolist():
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        [(code, _)] = run(train_counted, str(folder), kill_at, folder=folder)
        assert code == -signal.SIGKILL
        run_well(train, str(folder), None, True, folder=folder)
        end = torch.load(folder / "end.pt", weights_only=True)["weights"]
        for key, value in expected.items():
            assert torch.equal(end[key], value), (kill_at, calls, key)


class Stateful:
    """A dataloader that can be resumed in the middle of an epoch, as torchdata's can."""

    def __init__(self):
        self.batches = corpus(24, 0).split(4)
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]


class MidEpoch(Repeatable):
    def train_dataloader(self):
        return Stateful()


def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path):
    """With cuts in the middle of epochs, too, from before, just after and between them."""

    def callback():
        return pruning(schedule=[Stage(0.1, step=8), Stage(0.2, step=15)])

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _, whole = fit(tmp_path, callback(), saver, module=MidEpoch(), enable_checkpointing=True)
    assert len(whole.losses) == 18
    for step in (3, 8, 9, 14, 16):
        again = MidEpoch()
        quiet(callback(), max_epochs=3).fit(again, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert again.losses == whole.losses[step:], step
        for name, value in whole.state_dict().items():
            if not name.startswith("accuracy"):
                assert torch.equal(again.state_dict()[name], value), (step, name)


def quiet(*callbacks, **options) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


class Tested(Repeatable):
    __test__ = False

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.inner["lm"](input_ids=batch, labels=batch).loss)

    def predict_step(self, batch, batch_idx):
        return self.inner["lm"](input_ids=batch).logits

    test_dataloader = predict_dataloader = Module.val_dataloader


def test_validate_test_and_predict_rebuild_from_checkpoints_of_every_time(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    seen = {}

    class Recorder(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    fit(
        tmp_path,
        pruning(schedule=SCHEDULE),
        Recorder(),
        saver,
        module=Tested(),
        max_epochs=4,
        enable_checkpointing=True,
    )
    for epoch in range(4):
        path = tmp_path / f"epoch={epoch}.ckpt"
        for function in ("validate", "test", "predict"):
            trainer, module = quiet(pruning(schedule=SCHEDULE)), Tested()
            options = {} if function == "predict" else {"verbose": False}
            result = getattr(trainer, function)(module, ckpt_path=path, weights_only=True, **options)
            assert result
            for name, value in seen[epoch].items():
                assert torch.equal(module.state_dict()[name], value), (epoch, function, name)
            assert "load_checkpoint" not in vars(trainer.strategy)


def test_a_module_that_was_cut_does_not_take_a_dense_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback = pruning()
    trainer, module = fit(tmp_path, callback, saver, module=Tested(), max_epochs=2, enable_checkpointing=True)
    trainer.validate(module, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    with pytest.raises(PlanError, match=r"cut in another way.*no plan \(dense\)"):
        trainer.validate(module, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


class Loadable(Tested):
    def on_load_checkpoint(self, checkpoint):
        rebuild_from_checkpoint(self, checkpoint)


def test_load_from_checkpoint_needs_no_trainer(tmp_path):
    callback = pruning()
    trainer, module = fit(tmp_path, callback, module=Loadable(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    loaded = Loadable.load_from_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    assert get_plan(loaded.inner["lm"]).digest() == callback.plan.digest()
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    # and within a trainer that has no pruning callback
    assert quiet().validate(Loadable(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)


def test_the_module_of_train_py_loads_pruned_checkpoints(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader([{"input_ids": ids} for ids in corpus(8, 0)], batch_size=4)

    module = CausalLMModule(str(tmp_path), random_weights=True)
    trainer = quiet(pruning(epoch=0, validate=False), max_epochs=1)
    trainer.fit(module, Data())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in tiny("llama").parameters())


def test_a_dense_best_checkpoint_and_spent_patience_do_not_outlive_the_cut(tmp_path):
    """The loss is best before the cut: what is kept as best afterwards is of the pruned model all the same."""
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=1)
    patience = EarlyStopping("val_loss", patience=2)
    seen = []

    class Recorder(pl.Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            patience.wait_count = 1
            seen.append((saver.best_model_path, float(saver.best_model_score)))

        def on_pruning_end(self, trainer, pl_module, pruning):
            seen.append((saver.best_model_path, patience.wait_count))

    class StopsLearning(Module):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch < 4))]

    callback = pruning(pruning_ratio=0.4, epoch=4, repair=None, min_fraction=0.1)
    fit(
        tmp_path,
        callback,
        saver,
        patience,
        Recorder(),
        module=StopsLearning(),
        max_epochs=6,
        enable_checkpointing=True,
    )
    (dense, dense_score), (none, waited) = seen
    assert none == "" and waited == 0
    assert Path(dense).exists()
    assert saver.best_model_path not in ("", dense)
    assert float(saver.best_model_score) > dense_score
    state = torch.load(saver.best_model_path, weights_only=True)["callbacks"][callback.state_key]
    assert state["plan"] is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20% at epoch 1 (and, for what resumes, the same by two stages), with what it left."""
    folder = tmp_path_factory.mktemp("finished")
    callback = pruning(validate=False, epoch=1)
    trainer, module = fit(folder, callback, module=Tested(), max_epochs=2)
    trainer.save_checkpoint(folder / "20.ckpt")
    return folder / "20.ckpt", callback, module


DENSE = sum(p.numel() for p in tiny("llama").parameters())


def resumed(path, callback, module=None, epochs=5, **options):
    module = module or Tested()
    trainer = quiet(callback, max_epochs=epochs, **options)
    trainer.fit(module, ckpt_path=path, weights_only=True)
    return trainer, module


def ratio_of(module) -> float:
    return 1 - sum(p.numel() for p in module.inner["lm"].parameters()) / DENSE


@pytest.mark.parametrize(
    ("options", "when", "ratio", "cuts"),
    [
        ({"pruning_ratio": 0.4, "epoch": 3}, 3, 0.4, 1),
        # due since long: at once
        ({"pruning_ratio": 0.4, "epoch": 1}, 2, 0.4, 1),
        ({"pruning_ratio": 0.4, "step": 15}, 2, 0.4, 1),
        ({"schedule": [Stage(0.2, epoch=1), Stage(0.3, epoch=2), Stage(0.4, epoch=3)]}, 3, 0.4, 2),
        ({"schedule": [Stage(0.1, epoch=1), Stage(0.4, epoch=3)]}, 3, 0.4, 1),
        ({"pruning_ratio": 0.2, "epoch": 4}, None, 0.2, 0),
        ({"pruning_ratio": 0.2, "epoch": 1}, None, 0.2, 0),
    ],
    ids=str,
)
def test_a_run_resumes_with_another_schedule(finished, options, when, ratio, cuts):
    """What is gone counts, whatever the new schedule calls it; the ratio is of the model before the first cut."""
    path, first, _ = finished
    seen = []

    class Cuts(pl.Callback):
        def on_pruning_end(self, trainer, pl_module, pruning):
            seen.append(trainer.current_epoch)

    callback, watch, module = pruning(validate=False, **options), Cuts(), Tested()
    trainer = quiet(callback, watch, max_epochs=5)
    trainer.fit(module, ckpt_path=path, weights_only=True)
    assert len(seen) == cuts and (seen[-1] if seen else None) == when
    assert ratio - 0.012 < ratio_of(module) <= ratio
    assert callback.stages_done == len(callback.stages)
    # one plan for the first model
    assert get_plan(module.inner["lm"]).digest() == callback.plan.digest()
    for before, after in zip(first.plan.group_entries, callback.plan.group_entries, strict=False):
        if before.key == after.key:
            assert set(after.kept) <= set(before.kept)
    trainer.save_checkpoint(path.parent / "again.ckpt")
    lower = pruning(validate=False, pruning_ratio=0.15)
    with pytest.raises(PlanError, match=rf"pruned to a ratio of {ratio} of all parameters.* ends at 0\.15"):
        resumed(path.parent / "again.ckpt", lower)


def test_a_schedule_that_asks_for_less_is_refused_before_anything_changes_and_may_still_validate(finished):
    path, first, trained = finished
    module = Tested()
    with pytest.raises(PlanError, match=r"pruned to a ratio of 0\.2 .* ends at 0\.1: what is gone does not come back"):
        resumed(path, pruning(pruning_ratio=0.1, epoch=3), module)
    # 0.2 of all parameters
    with pytest.raises(PlanError, match=r"pruned to a ratio of 0\.\d+ of prunable parameters.* ends at 0\.25"):
        resumed(path, pruning(pruning_ratio=0.25, ratio_of="prunable", epoch=3), module)
    assert ratio_of(module) == 0
    for options in ({"pruning_ratio": 0.1, "epoch": 0}, {"pruning_ratio": 0.2, "epoch": 0}):
        callback = pruning(**options)
        quiet(callback).validate(module, ckpt_path=path, weights_only=True, verbose=False)
        assert callback.plan.digest() == first.plan.digest()
        assert torch.equal(module.inner["lm"].lm_head.weight, trained.inner["lm"].lm_head.weight)


@pytest.mark.parametrize("paths", [(None, "inner.lm"), ("inner.lm", None), ("inner.lm", "inner")], ids=str)
def test_another_path_to_the_same_model_does_not_cut_it_twice(tmp_path, paths):
    callback = pruning(validate=False, epoch=1, model_path=paths[0])
    trainer, _ = fit(tmp_path, callback, module=Tested(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    again = pruning(validate=False, epoch=1, model_path=paths[1])
    _, module = resumed(tmp_path / "it.ckpt", again, epochs=4)
    assert 0.188 < ratio_of(module) <= 0.2
    assert again.plan.digest() == callback.plan.digest() and again.stages_done == 1
    # and what is saved now names the path of now
    trainer = quiet(pruning(model_path=paths[1]))
    trainer.validate(Tested(), ckpt_path=tmp_path / "it.ckpt", weights_only=True, verbose=False)
    trainer.save_checkpoint(tmp_path / "new.ckpt", weights_only=True)
    (state,) = torch.load(tmp_path / "new.ckpt", weights_only=True)["lit_prune"]["states"]
    assert state["model_path"] == paths[1]
