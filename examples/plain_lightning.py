"""An existing Lightning project, as people write them, and the one line that prunes its model in the middle of the fit.

    python examples/plain_lightning.py

Everything but the two lines marked ``# lit_prune`` was there before: a LightningModule that wraps a transformers model,
a plain dataset, a Trainer.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.callbacks import PruningReport, StructuredPruning


class LanguageModel(L.LightningModule):
    """Predict the next token."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8
        )
        self.llama = LlamaForCausalLM(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss of a batch of token ids."""
        loss = self.llama(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.llama(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def sequences(count: int, seed: int) -> torch.Tensor:
    """Token sequences with a pattern to learn: each token is three times the last, plus one, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (count, 32), generator=generator)
    for position in range(1, 32):
        follows = torch.rand(count, generator=generator) < 0.8
        ids[:, position] = torch.where(follows, (3 * ids[:, position - 1] + 1) % 128, ids[:, position])
    return ids


if __name__ == "__main__":
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[
            StructuredPruning(pruning_ratio=0.3, epoch=1),
            PruningReport("outputs/plain_lightning"),
        ],  # lit_prune
    )
    trainer.fit(
        LanguageModel(),
        DataLoader(sequences(512, 0), batch_size=16, shuffle=True),
        DataLoader(sequences(64, 1), batch_size=16),
    )
