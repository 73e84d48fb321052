"""Steps that carry state from batch to batch, and hooks that ask loggers and callbacks, around the cut."""

from __future__ import annotations

import os

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lit_prune import PruningConfig, prune
from lit_prune.callbacks import StructuredPruning

pytestmark = pytest.mark.filterwarnings("ignore:.*of the parameters of.*:UserWarning")


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def loss(self, output, target):
        return functional.cross_entropy(output, target)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Counter(Plain):
    seen = 0

    def loss(self, output, target):
        self.seen += 1
        return min(1.0, self.seen / 100) * super().loss(output, target)


class Centre(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))

    def loss(self, output, target):
        loss = super().loss(output - self.centre, target)
        self.centre.mul_(0.9).add_(output.detach().mean(0), alpha=0.1)
        return loss


class Queue(Plain):
    def __init__(self):
        super().__init__()
        self.past = [torch.ones(8, 4)]

    def loss(self, output, target):
        loss = super().loss(output @ self.past[-1].T.detach(), target)
        self.past.append(output.detach())
        return loss


class Carried(Plain):
    def __init__(self):
        super().__init__()
        self.rnn, self.state = nn.GRU(4, 16, batch_first=True), None

    def loss(self, output, target):
        output, state = self.rnn(output[:, None].repeat(1, 3, 1), self.state)
        self.state = state.detach()
        return super().loss(output[:, -1], target)


def data(count=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 4, (count,), generator=generator)), batch_size=8)


def fit(module, *callbacks, **options):
    pruning = StructuredPruning(pruning_ratio=0.3, step=2, calibration_batches=2)
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning, *callbacks],
        **options,
    )
    trainer.fit(module, data(), data(8))
    return trainer


@pytest.mark.parametrize("kind", [Plain, Counter, Centre, Queue, Carried])
def test_a_step_that_carries_state_is_pruned(kind):
    module = kind()
    before = sum(p.numel() for p in module.parameters())
    fit(module)
    assert sum(p.numel() for p in module.parameters()) <= 0.75 * before


@pytest.mark.parametrize("kind", [Counter, Centre, Queue, Carried])
def test_finding_groups_without_lightning_leaves_the_state(kind):
    module = kind()
    batches = list(data())
    prune(module, batches, lambda b: module.training_step(b, 0), PruningConfig(pruning_ratio=0.3))
    assert len(module.net[0].weight) < 64


@pytest.mark.parametrize(
    "ask",
    [
        lambda module: os.path.join(module.trainer.log_dir, "x"),
        lambda module: os.path.join(module.logger.log_dir, "x"),
        lambda module: os.path.join(module.logger.save_dir, module.logger.name, str(module.logger.version)),
        lambda module: module.trainer.checkpoint_callback.dirpath,
        lambda module: isinstance(module.logger, CSVLogger) and isinstance(module.logger.root_dir, str),
    ],
)
def test_hooks_may_ask_loggers_and_callbacks_in_the_validation_around_the_cut(tmp_path, ask):
    class Asking(Plain):
        answers = ()

        def validation_step(self, batch, batch_idx):
            return None

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                Asking.answers += (ask(self),)

        def on_train_epoch_start(self):
            ask(self)

    trainer = fit(
        Asking(),
        ModelCheckpoint(dirpath=tmp_path),
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    # before and after the cut, and at the end of both epochs
    assert len(Asking.answers) == 4 and len(set(Asking.answers)) == 1 and Asking.answers[0]
    assert Asking.answers[0] == ask(trainer.lightning_module)


def test_an_average_starts_again_where_the_state_leaves_parts_out():
    class Filtered(Plain):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(4, 4).requires_grad_(False)

        def state_dict(self, *args, **kwargs):
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "teacher" not in k}

    module = Filtered()
    average = EMAWeightAveraging(decay=0.5)
    fit(module, average)
    assert len(module.net[0].weight) < 64
