"""A classifier whose network and optimizer come from the configuration."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F


def mlp(widths: Sequence[int]) -> nn.Module:
    """A multilayer perceptron from 64 pixels to 10 classes, with hidden layers of these widths."""
    sizes = [64, *widths]
    hidden = [part for size in pairwise(sizes) for part in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))


class DigitsModule(L.LightningModule):
    """Train a network on classes."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        scores = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(scores, batch[1]))
        self.log("val_accuracy", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configuration's optimizer."""
        return self.optimizer(params=self.parameters())
