"""Distillation of models of many kinds: what it copies, what it compares, and what it refuses before the cut."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from test_pruning import fit, pruning
from torch import nn
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

from lit_prune.callbacks import Distillation
from lit_prune.callbacks.distillation import _fingerprint


class Task(pl.LightningModule):
    """A model that is trained by the loss that it computes of batches of keyword arguments."""

    def __init__(self, model, rows):
        super().__init__()
        self.model, self.rows = model, rows

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4)


def images(labels):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": label} for label in labels]


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(config)


def test_a_model_with_buffers_of_integers_teaches(tmp_path):
    rows = images(torch.arange(24) % 4)
    trainer, _ = fit(
        tmp_path, pruning(epoch=1), Distillation(directory=tmp_path), module=Task(resnet(), rows), max_epochs=2
    )
    assert trainer.callback_metrics["distillation_loss"] > 0
    assert (tmp_path / "teacher.safetensors").exists()


class Stateful(nn.Module):
    """A parameter and a buffer of any data type; extra state that is no tensor."""

    def __init__(self, buffer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("buffer", buffer)

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_the_fingerprint_reads_buffers_of_any_data_type(dtype):
    values = [torch.tensor(v).to(dtype) for v in ([1, 0, 1], [1, 0, 1], [1, 1, 1])]
    first, same, other = (_fingerprint(Stateful(v)) for v in values)
    assert first == same != other
