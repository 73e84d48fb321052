"""Prune image classifiers in the middle of their training: a small ResNet and a Vision Transformer of timm.

    pip install 'lit_prune[examples]'
    python examples/images.py

The images are the 1,797 scans of handwritten digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits,
8 x 8 pixels), enlarged to 32 x 32. Nothing is downloaded. The two callbacks are all that lit_prune needs.
"""

import lightning as L
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_prune.callbacks import PruningReport, StructuredPruning

MODELS = {
    "resnet": lambda: timm.create_model("resnet10t", in_chans=1, num_classes=10),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=6
    ),
}


class ImageClassifier(L.LightningModule):
    """Any network that gives class scores."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy of a batch of images and classes."""
        images, classes = batch
        return F.cross_entropy(self.network(images), classes)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, classes = batch
        scores = self.network(images)
        self.log("val_loss", F.cross_entropy(scores, classes))
        self.log("val_accuracy", (scores.argmax(1) == classes).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Three quarters of the digits to train on, one to validate."""
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=32, mode="bilinear")
    split = train_test_split(range(len(images)), stratify=digits.target, random_state=0)
    parts = [TensorDataset(images[rows], torch.tensor(digits.target)[rows]) for rows in split]
    return DataLoader(parts[0], batch_size=64, shuffle=True), DataLoader(parts[1], batch_size=256)


if __name__ == "__main__":
    for name, build in MODELS.items():
        L.seed_everything(0)
        trainer = L.Trainer(
            max_epochs=6,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            callbacks=[
                StructuredPruning(pruning_ratio=0.5, epoch=4, calibration_batches=8),
                PruningReport(f"outputs/images/{name}"),  # a table on the console, pictures and the model in the folder
            ],
        )
        trainer.fit(ImageClassifier(build()), *loaders())
