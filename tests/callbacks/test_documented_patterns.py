"""Training patterns of Lightning's documentation, each run with and without the callback.

With the callback the losses before the cut are those of the run without it, bit for bit, and the model after it is the
right one: a dense run in which the removed groups are set to zero at the moment of the cut, and which never calls surgery,
ends with the same weights (see test_matrix.py).
"""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    RichProgressBar,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader, grad_norm
from pytorch_optimizer import SAM, Lion, Lookahead
from schedulefree import AdamWScheduleFree
from test_matrix import Mask
from test_pruning import corpus, fit, pruning
from test_resume import Repeatable
from torch import nn
from torch.utils.data import DataLoader

from conftest import tiny
from lit_prune import PruningError, apply_plan, find_group_sets, get_plan


class Pattern(Repeatable):
    """The module that the patterns vary; it notes the loss of every training step."""

    lr = 0.01

    def __init__(self):
        super().__init__()
        self.seen: list[float] = []

    def loss(self, batch):
        loss = self.inner["lm"](input_ids=batch, labels=batch).loss
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner["lm"](input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def halves(module):
    named = list(module.named_parameters())
    return [p for n, p in named if "attn" in n], [p for n, p in named if "attn" not in n]


# manual optimization


class Manual(Pattern):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()


class ManualReturns(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class ManualSeveral(Manual):
    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self.loss(batch)
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()

    def configure_optimizers(self):
        attention, rest = halves(self)
        return torch.optim.SGD(attention, lr=0.01, momentum=0.9), torch.optim.SGD(rest, lr=0.005)


class ManualAlternating(ManualSeveral):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)


class ManualAccumulating(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if (batch_idx + 1) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()


class ManualScheduler(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)]


class ManualClosure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class TruncatedBackpropagation(Manual):
    """Several backward passes and steps in one training step."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for part in batch.split(6, dim=1):
            loss = self.loss(part)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


# what configure_optimizers may return


class OptimizerList(Pattern):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01)]


class OptimizerDict(Pattern):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class OptimizerAndSchedulers(Pattern):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), "interval": "step"}
        ]


class NamedParameters(Pattern):
    def configure_optimizers(self):
        return torch.optim.SGD(self.named_parameters(), lr=0.01, momentum=0.9)


class NoOptimizer(Pattern):
    def configure_optimizers(self):
        return None


# hooks around backward and the step


class LooksAtGradients(Pattern):
    norms: list[float]

    def on_after_backward(self):
        assert all(p.grad is not None for p in self.inner["lm"].parameters())

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self.inner["lm"], norm_type=2))


class OwnBackward(Pattern):
    def backward(self, loss, *args, **kwargs):
        (2 * loss).backward(*args, **kwargs)


class OwnOptimizerStep(Pattern):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


class OwnZeroGrad(Pattern):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class EpochOutputs(Pattern):
    """Lightning's way to work with the outputs of an epoch since 2.0."""

    def __init__(self):
        super().__init__()
        self.outputs = []
        self.means = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        assert len(self.outputs) == 6
        self.means.append(torch.stack(self.outputs).mean())
        self.outputs.clear()


class SetInHooks(Pattern):
    """training_step reads what the module's own hooks set."""

    def on_train_epoch_start(self):
        self.scale = 1.0 + self.current_epoch

    def on_train_batch_start(self, batch, batch_idx):
        self.shift = batch_idx

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.transferred = batch
        return batch

    def training_step(self, batch, batch_idx):
        assert torch.equal(self.transferred, batch)
        return self.scale * self.loss(batch) + 0.0 * self.shift


class SkipsBatches(Pattern):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 2 else self.loss(batch)


class Hyperparameters(Pattern):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()


class ExampleInput(Pattern):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(1, 12, dtype=torch.long)

    def forward(self, ids):
        return self.inner["lm"](input_ids=ids).logits


# references to parameters


class ParameterList(Pattern):
    """A penalty on parameters that the module collected once, and its own clipping of their gradients."""

    def __init__(self):
        super().__init__()
        self.__dict__["matrices"] = [p for p in self.inner["lm"].parameters() if p.dim() == 2]

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + 1e-3 * sum(p.square().sum() for p in self.matrices)

    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.matrices, 0.5)


class ParameterHooks(Pattern):
    """The first layer is frozen by hooks on its parameters' gradients."""

    def __init__(self):
        super().__init__()
        for parameter in self.inner["lm"].model.layers[0].parameters():
            parameter.register_hook(torch.zeros_like)


# batches


class Combined(Pattern):
    mode = "min_size"

    def train_dataloader(self):
        loaders = {"a": super().train_dataloader(), "b": DataLoader(corpus(16, 2), batch_size=4)}
        return CombinedLoader(loaders, self.mode)

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        if isinstance(batch, dict):
            return sum(self.loss(part) for part in batch.values() if part is not None)
        return self.loss(batch)


def combined(mode):
    return type("Combined", (Combined,), {"mode": mode})


class OneLoader(Pattern):
    """Frozen features: only a head is trained besides the model, by a loss of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.inner["lm"].model(input_ids=batch).last_hidden_state
        return self.loss(batch) + self.head(hidden).square().mean()


# CombinedLoader's mode "sequential" is refused by Trainer.fit itself
PATTERNS = {
    "manual": (Manual, {}),
    "manual, loss returned": (ManualReturns, {}),
    "manual, several optimizers": (ManualSeveral, {}),
    "manual, alternating optimizers": (ManualAlternating, {}),
    "manual, accumulation": (ManualAccumulating, {}),
    "manual, scheduler": (ManualScheduler, {}),
    "manual, closure": (ManualClosure, {}),
    "manual, truncated backpropagation": (TruncatedBackpropagation, {}),
    "list of optimizers": (OptimizerList, {}),
    "dict of optimizer and scheduler": (OptimizerDict, {}),
    "optimizers and schedulers": (OptimizerAndSchedulers, {}),
    "named parameters": (NamedParameters, {}),
    "hooks that look at gradients": (LooksAtGradients, {}),
    "own backward": (OwnBackward, {}),
    "own optimizer_step": (OwnOptimizerStep, {}),
    "own optimizer_zero_grad": (OwnZeroGrad, {}),
    "outputs of an epoch": (EpochOutputs, {}),
    "state set in hooks": (SetInHooks, {}),
    "skipped batches": (SkipsBatches, {}),
    "save_hyperparameters": (Hyperparameters, {}),
    "example_input_array": (ExampleInput, {}),
    "list of parameters": (ParameterList, {}),
    "hooks on parameters": (ParameterHooks, {}),
    "CombinedLoader, min_size": (combined("min_size"), {}),
    "CombinedLoader, max_size": (combined("max_size"), {}),
    "CombinedLoader, max_size_cycle": (combined("max_size_cycle"), {}),
    "a head beside the model": (OneLoader, {}),
    "ModelSummary, DeviceStatsMonitor, Timer, LearningRateMonitor": (
        OptimizerDict,
        {
            "logger": True,
            "more": lambda: [ModelSummary(2), DeviceStatsMonitor(cpu_stats=False), Timer(), LearningRateMonitor()],
        },
    ),
    "RichProgressBar": (Pattern, {"enable_progress_bar": True, "more": lambda: [RichProgressBar(leave=False)]}),
}


def run(tmp_path, kind, options, *callbacks, module=None):
    options = dict(options)
    more = options.pop("more", list)()
    if options.get("logger"):
        options["logger"] = CSVLogger(tmp_path)
    return fit(tmp_path, *callbacks, *more, module=module or kind(), **{"max_epochs": 2, **options})


def assert_same_weights(pruned, dense, tolerance=1e-4):
    """Relative to how far training moved the weights, so that an equality that says nothing is noticed."""
    start = tiny("llama")
    apply_plan(start, get_plan(pruned))
    for (key, value), expected, first in zip(
        pruned.state_dict().items(), dense.state_dict().values(), start.state_dict().values(), strict=True
    ):
        moved = (expected.double() - first).norm()
        assert (value.double() - expected.double()).norm() <= tolerance * moved + 1e-6 * first.norm(), key


@pytest.mark.parametrize("name", PATTERNS)
def test_a_documented_pattern(tmp_path, name):
    kind, options = PATTERNS[name]
    _, plain = run(tmp_path, kind, options)
    callback = pruning(repair=None, epoch=1)
    _, module = run(tmp_path, kind, options, callback)
    steps = len(plain.seen) // 2
    assert module.seen[:steps] == plain.seen[:steps]
    assert len(module.seen) == len(plain.seen)
    assert callback.stages_done == 1
    _, dense = run(tmp_path, kind, options, Mask(callback.plan, epoch=1))
    apply_plan(dense.inner["lm"], callback.plan)
    assert_same_weights(module.inner["lm"], dense.inner["lm"])
    torch.testing.assert_close(torch.tensor(module.seen), torch.tensor(dense.seen), rtol=1e-4, atol=1e-4)
    if kind is EpochOutputs:
        torch.testing.assert_close(module.means, dense.means, rtol=1e-4, atol=1e-4)


def test_no_optimizer_at_all(tmp_path):
    callback = pruning(epoch=1)
    _, module = run(tmp_path, NoOptimizer, {}, callback)
    assert sum(p.numel() for p in module.parameters()) == callback.plan.info["parameters_after"]


# a network of several


class Adversarial(pl.LightningModule):
    """A generator and a discriminator, stepped in turns by hand, as in Lightning's examples."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"lm": tiny("llama")})
        self.dis = nn.Linear(64, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        self.toggle_optimizer(generator)
        logits = self.inner["lm"](input_ids=batch).logits
        loss = nn.functional.softplus(-self.dis(logits)).mean()
        self.seen.append(loss.item())
        self.manual_backward(loss)
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(discriminator)
        fake = self.inner["lm"](input_ids=batch).logits.detach()
        real = nn.functional.one_hot(batch, 64).float()
        loss = nn.functional.softplus(self.dis(fake)).mean() + nn.functional.softplus(-self.dis(real)).mean()
        self.seen.append(loss.item())
        self.manual_backward(loss)
        discriminator.step()
        discriminator.zero_grad()
        self.untoggle_optimizer(discriminator)

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.inner.parameters(), lr=0.01, momentum=0.9),
            torch.optim.SGD(self.dis.parameters(), lr=0.01),
        )

    def train_dataloader(self):
        return DataLoader(corpus(24, 0), batch_size=4)


class ActorCritic(Adversarial):
    """Automatic optimization of one loss over two networks, one of which has a frozen copy as target."""

    automatic_optimization = True

    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(64, 1)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        logits = self.inner["lm"](input_ids=batch).logits
        value = self.critic(logits)
        loss = (value - self.target(logits).detach()).square().mean() - value.mean()
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


@pytest.mark.parametrize("kind", [Adversarial, ActorCritic])
@pytest.mark.parametrize("importance", ["fisher", "taylor", "wanda"])
def test_other_networks_beside_the_pruned_one(tmp_path, kind, importance):
    _, plain = run(tmp_path, kind, {})
    callback = pruning(importance=importance, repair=None, epoch=1, model_path="inner.lm")
    _, module = run(tmp_path, kind, {}, callback)
    steps = len(plain.seen) // 2
    assert module.seen[:steps] == plain.seen[:steps]
    _, dense = run(tmp_path, kind, {}, Mask(callback.plan, epoch=1))
    apply_plan(dense.inner["lm"], callback.plan)
    assert_same_weights(module.inner["lm"], dense.inner["lm"])
    for name in ("dis", "critic"):
        if hasattr(module, name):
            torch.testing.assert_close(getattr(module, name).weight, getattr(dense, name).weight, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in getattr(module, "target", nn.Module()).parameters())


# fine-tuning callbacks


class WithBackbone(Pattern):
    def __init__(self):
        super().__init__()
        self.backbone = self.inner["lm"].model
        self.head = nn.Linear(32, 64)

    def training_step(self, batch, batch_idx):
        logits = self.head(self.backbone(input_ids=batch).last_hidden_state)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01, momentum=0.9)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.005)


def backbone_finetuning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda _: 1.0)


@pytest.mark.parametrize("finetuning", [Unfreeze, backbone_finetuning])
@pytest.mark.parametrize("epoch", [1, 3])
def test_finetuning_callbacks(tmp_path, finetuning, epoch):
    """The cut comes while the backbone is frozen, or after it was set free."""
    before = {}

    class Snapshot(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                before.update(copy.deepcopy(pl_module.backbone.state_dict()))

    options = {"max_epochs": 5}
    _, plain = run(tmp_path, WithBackbone, options, finetuning())
    callback = pruning(importance="wanda", repair=None, epoch=epoch, model_path="backbone")
    trainer, module = run(tmp_path, WithBackbone, options, finetuning(), callback, Snapshot())
    assert module.seen[: 6 * epoch] == plain.seen[: 6 * epoch]
    assert sum(p.numel() for p in module.backbone.parameters()) == callback.plan.info["parameters_after"]
    optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in module.backbone.parameters()} <= optimized
    after = module.backbone.state_dict()
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


# the Trainer's other ways


@pytest.mark.parametrize(
    "way", ["tuner, learning rate", "tuner, batch size", "callback, learning rate", "callback, batch size"]
)
def test_finders(tmp_path, way):
    class Found(Pattern):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return DataLoader(corpus(24, 0), batch_size=self.batch_size)

    module = Found()
    callback = pruning(repair=None, epoch=1)
    if way.startswith("tuner"):
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            callbacks=[callback],
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
        tuner = Tuner(trainer)
        if "rate" in way:
            tuner.lr_find(module, num_training=10)
        else:
            tuner.scale_batch_size(module, max_trials=2, steps_per_trial=1)
        assert callback.stages_done == 0
        trainer.fit(module)
    else:
        finder = (
            LearningRateFinder(num_training_steps=10)
            if "rate" in way
            else BatchSizeFinder(max_trials=2, steps_per_trial=1)
        )
        run(tmp_path, Found, {"enable_checkpointing": True}, callback, finder, module=module)
    assert callback.stages_done == 1
    assert sum(p.numel() for p in module.parameters()) == callback.plan.info["parameters_after"]


def test_fast_dev_run(tmp_path):
    callback = pruning(step=0)
    run(tmp_path, Pattern, {"fast_dev_run": True}, callback)
    assert callback.stages_done == 1


def test_fit_twice_and_test(tmp_path):
    class Tested(Pattern):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.inner["lm"](input_ids=batch, labels=batch).loss)

    callback = pruning(epoch=1)
    trainer, module = run(tmp_path, Tested, {}, callback)
    size = sum(p.numel() for p in module.parameters())
    (first,) = trainer.test(module, DataLoader(corpus(8, 3), batch_size=4), verbose=False)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    (second,) = trainer.test(module, DataLoader(corpus(8, 3), batch_size=4), verbose=False)
    assert sum(p.numel() for p in module.parameters()) == size
    assert callback.stages_done == 1
    assert second["test_loss"] < first["test_loss"]


# optimizers that are not torch's own SGD or AdamW


class WithLBFGS(Pattern):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2, history_size=3)


class WithSAM(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.first_step(zero_grad=True)
        self.manual_backward(self.inner["lm"](input_ids=batch, labels=batch).loss)
        optimizer.second_step(zero_grad=True)

    def configure_optimizers(self):
        return SAM(self.parameters(), base_optimizer=torch.optim.SGD, lr=0.01, momentum=0.9)


class WithLookahead(Pattern):
    def configure_optimizers(self):
        return Lookahead(torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9), k=4)


class WithScheduleFree(Pattern):
    def configure_optimizers(self):
        return AdamWScheduleFree(self.parameters(), lr=0.003)

    def on_train_epoch_start(self):
        self.optimizers().train()


class WithLion(Pattern):
    def configure_optimizers(self):
        return Lion(self.parameters(), lr=1e-3)


class WithAdafactor(Pattern):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=1e-2)


class WithMuon(Pattern):
    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() == 2]
        rest = [p for p in self.parameters() if p.dim() != 2]
        return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


OPTIMIZERS = [WithLBFGS, WithSAM, WithLookahead, WithScheduleFree, WithLion, WithAdafactor, WithMuon]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_or_is_refused_before_any_work(tmp_path, kind):
    _, plain = run(tmp_path, kind, {"max_epochs": 4})
    callback = pruning(repair=None, epoch=2)
    module = kind()
    try:
        run(tmp_path, kind, {"max_epochs": 4}, callback, module=module)
    except PruningError as error:
        assert "ptimizer" in str(error) or "LBFGS" in str(error)  # noqa: PT017
        assert get_plan(module.inner["lm"]) is None
        return
    half = len(plain.seen) // 2
    assert module.seen[:half] == plain.seen[:half]
    model = module.inner["lm"]
    start = copy.deepcopy(kind().inner["lm"])
    apply_plan(start, callback.plan)
    for (name, value), first in zip(model.state_dict().items(), start.state_dict().values(), strict=True):
        assert not torch.equal(value, first), name


def test_wandb_watch_keeps_its_gradients(tmp_path, monkeypatch):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen: dict[int, set[str]] = {}
    module = Pattern()
    logger = WandbLogger(save_dir=tmp_path, project="patterns")
    logger.watch(module, log="all", log_freq=1)
    run_ = logger.experiment
    original = run_._log

    def note(data, *args, **kwargs):
        found = {key for key in data if key.startswith(("gradients/", "parameters/"))}
        if found:
            seen.setdefault(module.current_epoch, set()).update(found)
        return original(data, *args, **kwargs)

    monkeypatch.setattr(run_, "_log", note)
    run(tmp_path, Pattern, {"log_every_n_steps": 1}, pruning(repair=None, epoch=1), module=module)
    wandb.finish()
    assert any(key.startswith("gradients/") for key in seen.get(0, ()))
    assert seen[0] == seen[1]
    assert find_group_sets(module.inner["lm"])
