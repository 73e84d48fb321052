"""What the examples of W&B share: the digits that scikit-learn ships, and a small Vision Transformer of transformers for them."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification


def vit() -> PreTrainedModel:
    """A Vision Transformer with 160,000 random weights, for images of 8 x 8."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


class DigitClassifier(L.LightningModule):
    """An image classifier of transformers."""

    def __init__(self, model: PreTrainedModel, lr: float = 2e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        output = self.model(**batch)
        self.log("val_loss", output.loss)
        self.log("val_accuracy", (output.logits.argmax(1) == batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Three quarters of the 1,797 scans to train on, one to validate."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, torch.tensor(digits.target), strict=True)]
    train, held_out = train_test_split(rows, stratify=digits.target, random_state=0)
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=450)
