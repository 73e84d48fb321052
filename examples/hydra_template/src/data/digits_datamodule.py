"""The digits that scikit-learn ships."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset


class DigitsDataModule(L.LightningDataModule):
    """1,797 scans of handwritten digits, 8 x 8 pixels, three quarters of them to train on."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Split the scans."""
        digits = load_digits()
        images, classes = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        rows = train_test_split(range(len(images)), stratify=digits.target, random_state=0)
        self.parts = [TensorDataset(images[part], classes[part]) for part in rows]

    def train_dataloader(self) -> DataLoader:
        """Training batches."""
        return DataLoader(self.parts[0], batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """One batch of all others."""
        return DataLoader(self.parts[1], batch_size=len(self.parts[1]))
