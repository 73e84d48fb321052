"""Gradual pruning, and resuming from any of its stages."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_pruning import Module, fit, pruning

from conftest import tiny
from lit_prune import PlanError, PruningPlan, apply_plan, find_group_sets, get_plan
from lit_prune.callbacks import CubicSchedule, Stage


def test_the_cubic_schedule_is_that_of_zhu_and_gupta():
    stages = CubicSchedule(start=2, end=8, stages=4).resolve(0.4)
    assert [s.epoch for s in stages] == [2, 4, 6, 8]
    expected = [0.4 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3, 4)]
    assert [s.ratio for s in stages] == pytest.approx(expected)
    assert stages[-1].ratio == 0.4
    assert [s.step for s in CubicSchedule(0, 3, 2, "step").resolve(0.2)] == [0, 3]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Stage(0.1),
        lambda: Stage(0.1, epoch=1, step=1),
        lambda: Stage(1.5, epoch=1),
        lambda: CubicSchedule(3, 3, 2),
        lambda: CubicSchedule(0, 5, 1),
        lambda: pruning(schedule=[]),
        lambda: pruning(schedule=[Stage(0.2, epoch=1), Stage(0.1, epoch=2)]),
        lambda: pruning(schedule=[Stage(0.1, epoch=1), Stage(0.2, step=20)]),
        lambda: pruning(schedule=[Stage(0.1, epoch=1)], epoch=2),
    ],
)
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="found"):
        bad()


@pytest.mark.parametrize(
    "schedule", [[Stage(0.1, epoch=1), Stage(0.2, epoch=2)], CubicSchedule(start=3, end=12, stages=3, unit="step")]
)
def test_stages_compose_into_one_plan_of_the_whole_ratio(tmp_path, schedule):
    callback = pruning(schedule=schedule, pruning_ratio=0.2, repair=None)
    _, module = fit(tmp_path, callback)
    model = module.inner["lm"]
    dense = tiny("llama")
    total = sum(p.numel() for p in dense.parameters())
    assert callback.stages_done == len(callback.stages)
    assert 0.19 < 1 - sum(p.numel() for p in model.parameters()) / total <= 0.2
    assert callback.plan.digest() == get_plan(model).digest()
    apply_plan(dense, callback.plan)
    dense.load_state_dict(model.state_dict())
    ids = torch.arange(10)[None]
    assert torch.equal(dense.eval()(ids).logits, model.eval()(ids).logits)


class Saved(Module):
    """Draws nothing that a checkpoint does not hold, so that a resumed run can equal an uninterrupted one."""

    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0

    def train_dataloader(self):
        loader = super().train_dataloader()
        return torch.utils.data.DataLoader(loader.dataset, batch_size=4)


def test_a_run_resumed_before_between_or_after_the_stages_ends_with_the_same_weights(tmp_path):
    def callbacks():
        return (
            pruning(schedule=[Stage(0.1, epoch=1), Stage(0.2, epoch=3)]),
            ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        )

    options = {"max_epochs": 5, "enable_checkpointing": True}
    _, whole = fit(tmp_path, *callbacks(), module=Saved(), **options)
    for epoch in (0, 1, 2, 3):
        trainer = pl.Trainer(
            max_epochs=5,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[callbacks()[0]],
        )
        module = Saved()
        trainer.fit(module, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), (epoch, name)


def test_a_model_that_was_pruned_before_the_run_resumes_too(tmp_path):
    def pruned_module():
        module = Saved()
        group_sets = find_group_sets(module)
        kept = [list(range(s.size - (s.kind == "mlp"))) for s in group_sets]
        apply_plan(module.inner["lm"], PruningPlan.from_kept(group_sets, kept))
        return module

    trainer, module = fit(tmp_path, pruning(), module=pruned_module(), max_epochs=2)
    path = tmp_path / "again.ckpt"
    trainer.save_checkpoint(path)
    expected = trainer.validate(module, verbose=False)
    fresh = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[pruning()])
    assert fresh.validate(pruned_module(), ckpt_path=path, verbose=False) == expected
    with pytest.raises(PlanError, match="the model given has no plan"):
        fresh.validate(Saved(), ckpt_path=path, verbose=False)


def test_repair_lowers_the_loss_just_after_the_cut(tmp_path):
    losses = {}
    for repair in (None, "least_squares"):
        callback = pruning(repair=repair, pruning_ratio=0.3, epoch=4, calibration_batches=6)
        fit(tmp_path, callback, max_epochs=5)
        losses[repair] = callback.metrics["pruned"]["val_loss"]
    assert losses["least_squares"] < losses[None]
