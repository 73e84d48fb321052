"""The LightningModule: what it logs and how it trains, against plain torch."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from local_assets import write_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from conftest import SMALL
from lit_prune.training import CausalLMModule


@pytest.fixture
def folder(tmp_path):
    return str(write_model(tmp_path / "model"))


def loader(sequences: int = 10, batch_size: int = 4) -> DataLoader:
    ids = torch.randint(0, SMALL["vocab_size"], (sequences, 12), generator=torch.Generator().manual_seed(5))
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)


def trainer(tmp_path, **options) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )


@torch.no_grad()
def token_losses(module, batch, ignored=None) -> torch.Tensor:
    """Cross-entropy of every predicted token, by torch."""
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["input_ids"][:, 1:].flatten(), reduction="none")
    return losses if ignored is None else losses[~ignored[:, 1:].flatten()]


def test_validation_logs_the_loss_and_the_perplexity_over_all_tokens(tmp_path, folder):
    module = CausalLMModule(folder)
    (logged,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    mean = torch.cat([token_losses(module.eval(), batch) for batch in loader()]).mean().item()
    assert logged["val_loss"] == pytest.approx(mean, rel=1e-6)
    assert logged["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_padding_counts_neither_in_the_loss_nor_in_the_perplexity(tmp_path, folder):
    ids = next(iter(loader()))["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    module = CausalLMModule(folder)
    batch = {"input_ids": ids, "attention_mask": mask}
    wanted = token_losses(module.eval(), batch, ignored=mask == 0).mean().item()
    rows = [{k: v[i] for k, v in batch.items()} for i in range(len(ids))]
    (logged,) = trainer(tmp_path).validate(module, DataLoader(rows, batch_size=4), verbose=False)
    assert logged["val_loss"] == pytest.approx(wanted, rel=1e-6)
    assert logged["val_perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)


def test_labels_of_the_batch_are_used(folder):
    module = CausalLMModule(folder)
    batch = next(iter(loader()))
    labels = batch["input_ids"].clone()
    labels[:, :8] = -100
    wanted = token_losses(module.eval(), batch, ignored=labels == -100).mean().item()
    assert module.training_step({**batch, "labels": labels}, 0).item() == pytest.approx(wanted, rel=1e-6)


def test_training_learns(tmp_path, folder):
    module = CausalLMModule(folder, learning_rate=3e-3)
    (before,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    trainer(tmp_path, max_epochs=10).fit(module, loader())
    (after,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert after["val_perplexity"] < 0.5 * before["val_perplexity"]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_warms_up_and_follows_the_schedule(tmp_path, folder, schedule):
    class Rates(pl.Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    rates.seen = []
    module = CausalLMModule(folder, learning_rate=0.01, warmup_steps=4, schedule=schedule, min_lr_factor=0.2)
    run = trainer(tmp_path, max_steps=12, callbacks=[rates])
    run.fit(module, loader())
    # what is seen after a step is the rate of the next one
    wanted = [0.01 * (step + 1) / 4 for step in range(1, 4)]
    wanted += [
        0.01 if schedule == "constant" else 0.01 * (0.2 + 0.8 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2)
        for step in range(4, 13)
    ]
    assert rates.seen == pytest.approx(wanted)


def test_matrices_decay_and_everything_is_optimised_once(tmp_path, folder):
    module = CausalLMModule(folder, weight_decay=0.3)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader())
    decay = {id(p): g["weight_decay"] for g in run.optimizers[0].param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in run.optimizers[0].param_groups) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name


def test_gradient_checkpointing_gives_the_same_gradients(folder):
    batch = next(iter(loader()))
    plain, saving = CausalLMModule(folder), CausalLMModule(folder, gradient_checkpointing=True)
    assert saving.model.is_gradient_checkpointing
    for module in (plain, saving):
        module.training_step(batch, 0).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_model_keeps_its_config(folder):
    module = CausalLMModule(folder, attn_implementation="eager")
    assert module.model.config.use_cache
    assert module.model.config._attn_implementation == "eager"
    module.training_step(next(iter(loader())), 0)
    assert module.model.config.use_cache


def test_a_checkpoint_loads_with_its_options(tmp_path, folder):
    module = CausalLMModule(folder, learning_rate=0.02)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams["learning_rate"] == 0.02
    for (name, a), (_, b) in zip(module.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "options", [{"learning_rate": 0.0}, {"weight_decay": -1.0}, {"warmup_steps": -1}, {"min_lr_factor": 1.5}]
)
def test_numbers_out_of_range_are_refused_before_the_model_is_loaded(options):
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        CausalLMModule("no-such-folder", **options)
