"""Prune image classifiers in the middle of their training: a small ResNet and a Vision Transformer of timm.

    pip install 'lit_prune[examples]'
    python examples/images.py

The images are the 1,797 scans of handwritten digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits,
8 x 8 pixels), enlarged to 16 x 16. Nothing is downloaded. The two callbacks are all that lit_prune needs.
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
    "resnet": ("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 16}),
    "vit": (
        "vit_tiny_patch16_224",
        # timm's usual weights, of size 0.02, are too small for layers this narrow to learn from in a few epochs
        {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "weight_init": "jax"},
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
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=16, mode="bilinear")
    split = train_test_split(range(len(images)), stratify=digits.target, random_state=0)
    parts = [TensorDataset(images[rows], torch.tensor(digits.target)[rows]) for rows in split]
    return DataLoader(parts[0], batch_size=64, shuffle=True), DataLoader(parts[1], batch_size=256)


if __name__ == "__main__":
    for name, (architecture, sizes) in MODELS.items():
        L.seed_everything(0)
        trainer = L.Trainer(
            max_epochs=6,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
            enable_checkpointing=False,
            callbacks=[
                StructuredPruning(pruning_ratio=0.4, epoch=3, calibration_batches=4),
                PruningReport(f"outputs/images/{name}"),  # a table on the console, pictures and the model in the folder
            ],
        )
        trainer.fit(ImageClassifier(timm.create_model(architecture, in_chans=1, num_classes=10, **sizes)), *loaders())
