"""What modules and callbacks of a fit hold of the model: it follows the cut, or is refused by name before calibration."""

from __future__ import annotations

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
from test_matrix import Base
from test_pruning import fit, pruning
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conftest import tiny
from lit_prune import apply_plan, get_plan
from lit_prune.errors import OptimizerStateError, PruningError, ReferenceHeldError, UnsupportedCallbackError

GATE = "model.layers.0.mlp.gate_proj.weight"


def refused(tmp_path, module, kind, match, *callbacks, step=1):
    """The fit ends with the error at the cut, before any batch of calibration, and the model is whole."""
    forwards = []
    module.inner["lm"].register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(kind, match=match):
        fit(
            tmp_path,
            pruning(step=step, validate=False, model_path="inner.lm"),
            *callbacks,
            module=module,
            limit_val_batches=0,
        )
    assert len(forwards) == step
    assert get_plan(module.inner["lm"]) is None
    whole = tiny("llama").parameters()
    assert all(p.shape == q.shape for p, q in zip(module.inner["lm"].parameters(), whole, strict=True))


class Penalty(Base):
    """Keeps a list of its parameters, for a penalty and its own clipping."""

    def __init__(self):
        super().__init__()
        self.decayed = list(self.inner.parameters())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-2 * sum(p.square().sum() for p in self.decayed)

    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.decayed, 0.5)


class WalkedPenalty(Penalty):
    """Takes them anew every time."""

    def __init__(self):
        super().__init__()
        del self.decayed

    @property
    def decayed(self):
        return list(self.inner.parameters())

    @decayed.setter
    def decayed(self, value):
        pass

    @decayed.deleter
    def decayed(self):
        pass


def test_a_list_of_parameters_follows(tmp_path):
    _, module = fit(tmp_path, pruning(), module=Penalty())
    _, expected = fit(tmp_path, pruning(), module=WalkedPenalty())
    for key, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


class Averages(pl.Callback):
    """Holds the parameters themselves and averages what they are, from the start of the last epoch on."""

    def on_train_start(self, trainer, pl_module):
        self.held = dict(pl_module.named_parameters())

    def on_train_epoch_start(self, trainer, pl_module):
        self.sums = {n: torch.zeros_like(p) for n, p in self.held.items()} if trainer.current_epoch == 2 else {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, value in self.sums.items():
            value += self.held[name].detach()


def test_a_callback_that_holds_parameters_follows(tmp_path):
    averages = Averages()
    _, module = fit(tmp_path, pruning(), averages, module=Base())
    assert all(p is averages.held[n] for n, p in module.named_parameters())
    assert all(value.shape == averages.held[n].shape and value.any() for n, value in averages.sums.items())


class ByHand(Base):
    """An exponential average by hand, in a mapping by name, of the model's names or the module's."""

    def __init__(self, take):
        super().__init__()
        self.average = take(self)


COPIES = {
    "by the module's names": lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
    "by the model's names": lambda m: {n: p.detach().clone() for n, p in m.inner["lm"].named_parameters()},
    "by parameter": lambda m: {p: p.detach().clone() for p in m.parameters()},
    "in a list": lambda m: [p.detach().clone() for p in m.parameters()],
    "state dict": lambda m: copy.deepcopy(m.inner["lm"].state_dict()),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_by_hand_in_the_module_are_refused_by_name(tmp_path, kind):
    refused(tmp_path, ByHand(COPIES[kind]), ReferenceHeldError, r"ByHand\.average .*old sizes.*on_pruning_end")


@pytest.mark.parametrize("kind", COPIES)
def test_copies_by_hand_in_a_callback_are_refused_by_name(tmp_path, kind):
    class Keeps(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.average = COPIES[kind](pl_module)

    refused(tmp_path, Base(), UnsupportedCallbackError, r"Keeps\.average holds .*on_pruning_end", Keeps())

    class Knows(Keeps):
        def on_pruning_end(self, trainer, pl_module, pruning):
            self.on_train_start(trainer, pl_module)

    fit(tmp_path, pruning(step=1, validate=False), Knows(), module=Base(), max_epochs=1)


class Averaged(Base):
    def __init__(self, hidden):
        super().__init__()
        average = AveragedModel(self.inner["lm"])
        self.average = [average] if hidden else average


@pytest.mark.parametrize("hidden", [False, True])
def test_an_average_in_the_module_is_refused_and_a_teacher_is_not(tmp_path, hidden):
    refused(tmp_path, Averaged(hidden), PruningError, "Averaged holds a AveragedModel")
    module = Base()
    teacher = copy.deepcopy(module.inner["lm"]).requires_grad_(False)
    module.teacher = [teacher] if hidden else teacher
    fit(tmp_path, pruning(step=1, model_path="inner.lm"), module=module, max_epochs=1, limit_val_batches=0)
    assert sum(p.numel() for p in teacher.parameters()) > sum(p.numel() for p in module.inner.parameters())


def test_a_hook_with_a_mask_of_the_old_size_is_refused_by_name(tmp_path):
    module = Base()
    mask = torch.ones(24, 32)
    module.inner["lm"].get_parameter(GATE).register_hook(lambda g: g * mask)
    refused(tmp_path, module, ReferenceHeldError, rf"hook of the parameter '{GATE}'.*variable 'mask'")


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    class Foreign(Base):
        def configure_optimizers(self):
            self.other = [tiny("llama")]
            return [
                torch.optim.SGD(self.inner.parameters(), lr=0.1),
                torch.optim.SGD(self.other[0].parameters(), lr=0.1),
            ]

        automatic_optimization = False

    refused(tmp_path, Foreign(), OptimizerStateError, r"SGD holds .* none of which is in the Foreign", step=0)


class Frozen(Base):
    """Half of the first layer is kept as it is, by hooks; the other half of the gradients is doubled."""

    def __init__(self):
        super().__init__()
        layer = self.inner["lm"].model.layers[0]
        for p in layer.mlp.parameters():
            p.register_hook(torch.zeros_like)
        for p in layer.self_attn.parameters():
            p.register_hook(lambda g: 2 * g)


def test_what_hooks_freeze_stays_frozen(tmp_path):
    callback = pruning(repair=None, importance="magnitude")
    _, module = fit(tmp_path, callback, module=Frozen())
    model, fresh = module.inner["lm"], Frozen().inner["lm"]
    apply_plan(fresh, callback.plan)
    for (name, p), q in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(p, q[1]) == ("layers.0.mlp" in name), name


class InBackward(Base):
    """Steps every parameter within the backward pass, as the tutorial and GaLore's layer-wise mode do."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.stepped = 0
        self.by_parameter = {p: torch.optim.SGD([p], lr=0.01, momentum=0.9) for p in self.inner.parameters()}
        for p in self.inner.parameters():
            p.register_post_accumulate_grad_hook(self.step_one)

    def step_one(self, parameter):
        self.stepped += 1
        self.by_parameter[parameter].step()
        self.by_parameter[parameter].zero_grad()

    def configure_optimizers(self):
        return None

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.inner["lm"](input_ids=batch, labels=batch).loss)


class AtOnce(Base):
    """The same steps by one optimizer."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("importance", ["taylor", "fisher"])
def test_an_optimizer_stepped_within_the_backward_pass_goes_on(tmp_path, importance):
    callback, other = pruning(importance=importance), pruning(importance=importance)
    _, module = fit(tmp_path, callback, module=InBackward())
    _, plain = fit(tmp_path, other, module=AtOnce())
    assert module.stepped == 18 * len(list(module.inner.parameters()))
    assert callback.plan == other.plan
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_wandb_watch_keeps_all_its_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    keys: list[set[str]] = []

    class Watcher(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            keys.append(set())

    module = Base()
    run = wandb.init(dir=tmp_path, project="watched")
    log = run._log
    monkeypatch.setattr(run, "_log", lambda data, *a, **k: (keys[-1].update(data), log(data, *a, **k)))
    try:
        run.watch(module.inner["lm"], log="all", log_freq=1)
        fit(tmp_path, Watcher(), pruning(), module=module, limit_val_batches=0, limit_train_batches=2)
    finally:
        run.unwatch(module.inner["lm"])
        run.finish()
    names = {f"gradients/{n}" for n, _ in module.inner["lm"].named_parameters()}
    assert len(keys) == 6
    assert len(names) == 30
    for number, logged in enumerate(keys):
        # wandb numbers the models that a process watches
        assert {re.sub(r"/graph_\d+", "/", k) for k in logged if k.startswith("gradients/")} == names, number
