"""Whole blocks that leave in the middle of a fit."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from test_pruning import Module, fit, pruning
from test_recovery import Taught
from test_schedule import Saved

from conftest import tiny
from lit_prune import UnsupportedModelError, get_plan
from lit_prune.callbacks import Distillation, PruningReport, Stage
from lit_prune.callbacks.distillation import distillation_loss, hidden_state_loss
from lit_prune.io.huggingface import convert_checkpoint, load_pruned
from lit_prune.reporting.plots import kept_figure

KINDS = ("attention", "mlp", "block")


def deep() -> torch.nn.Module:
    """Five layers, two of which add little, so that they are the first to leave."""
    model = tiny("llama", num_hidden_layers=5)
    with torch.no_grad():
        for layer, scale in ((1, 1e-3), (3, 2e-2)):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[layer].mlp.down_proj.weight.mul_(scale)
    return model


class Deep(Saved):
    def __init__(self):
        super().__init__()
        self.inner["lm"] = deep()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


def test_blocks_leave_at_two_stages_and_the_run_resumes_at_any_epoch(tmp_path):
    def callback():
        return pruning(schedule=[Stage(0.18, epoch=1), Stage(0.36, epoch=3)], kinds=KINDS, importance="fisher")

    whole, options = callback(), {"max_epochs": 5, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer, module = fit(tmp_path, whole, PruningReport(tmp_path / "out"), saver, module=Deep(), **options)
    model, optimizer = module.inner["lm"].eval(), trainer.optimizers[0]
    assert whole.plan == get_plan(model)
    assert whole.plan.removed_blocks == ("model.layers.1", "model.layers.3")
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert whole.plan.info["parameters_after"] == sum(p.numel() for p in model.parameters())
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(module.parameters())
    assert optimizer.state.keys() <= held
    # the table of the second stage calls the four layers that were left what they were in the dense model
    assert len(set(whole.table.layers.tolist())) == 4
    gone = next(iter({*range(5)} - {*whole.table.layers.tolist()}))
    assert f"model.layers.{gone}" in whole.plan.removed_blocks
    bars = {axis.get_title(loc="left").partition(":")[0]: axis for axis in kept_figure(whole.plan, whole.table).axes}
    dense, kept = bars["block"].containers
    assert [bar.get_height() for bar in dense] == [1] * 5
    assert sorted(bar.get_x() + bar.get_width() / 2 for bar in kept if not bar.get_height()) == [1, 3]
    ids = torch.arange(12)[None]
    assert torch.equal(load_pruned(tmp_path / "out" / "model")(ids).logits, model(ids).logits)
    for epoch in (0, 1, 2, 3):
        resumed = Deep()
        fit(tmp_path, callback(), module=resumed, checkpoint=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        for name, value in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (epoch, name)
    converted = convert_checkpoint(tmp_path / "epoch=4.ckpt", deep())
    assert torch.equal(converted(ids).logits, model(ids).logits)


def test_an_averaged_copy_loses_them_too(tmp_path):
    average = WeightAveraging()
    callback = pruning(kinds=("block",), pruning_ratio=0.4, importance="fisher")
    _, module = fit(tmp_path, callback, average, module=Deep())
    assert len(callback.plan.removed_blocks) == 2
    assert [e.kind for e in callback.plan.entries] == ["block"]
    assert len(module.inner["lm"].model.layers) == 3


def test_the_student_learns_from_the_layers_that_it_has(tmp_path):
    checked = []

    class Check(pl.Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            self.dense = copy.deepcopy(pl_module.inner["lm"])

        def on_before_backward(self, trainer, pl_module, loss):
            if not hasattr(self, "dense") or not pl_module.training:
                return
            batch, student = pl_module.batch, copy.deepcopy(pl_module.inner["lm"])
            student._forward_hooks.clear()
            student._forward_pre_hooks.clear()
            ours = student(**batch, labels=batch["input_ids"], output_hidden_states=True)
            theirs = self.dense(**batch, output_hidden_states=True)
            mask = batch["attention_mask"]
            kl = distillation_loss(ours.logits, theirs.logits, 2.0, mask)
            # behind the layers 0 and 2, and behind the last one and the norm
            taught = [theirs.hidden_states[layer + 1] for layer in (0, 2, 4)]
            hidden = hidden_state_loss(ours.hidden_states[1:], taught, mask)
            checked.append((loss.item(), (0.3 * ours.loss + 0.7 * kl + 0.1 * hidden).item()))

    module = Taught()
    module.inner["lm"] = deep()
    callback = pruning(kinds=("block",), pruning_ratio=0.4, importance="fisher", epoch=0)
    fit(tmp_path, callback, Distillation(weight=0.7, hidden_weight=0.1), Check(), module=module)
    assert callback.plan.removed_blocks == ("model.layers.1", "model.layers.3")
    assert checked
    for loss, expected in checked:
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_model_whose_blocks_cannot_leave_is_refused_before_training(tmp_path):
    model = deep()
    model.model.layers[3] = model.model.layers[1]
    module = Module(model)
    with pytest.raises(UnsupportedModelError, match="shared with another part"):
        fit(tmp_path, pruning(kinds=KINDS), module=module)
    assert module.losses == []
