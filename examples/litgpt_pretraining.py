"""Pretrain a small LitGPT model from scratch, and prune it gradually meanwhile along a cubic schedule.

    pip install 'lit_prune[all]' && pip install --no-deps litgpt    # which asks for older releases of others
    python examples/litgpt_pretraining.py

The text is what every Python ships: the topics of its documentation, about 465 kB, read byte by byte. Nothing is downloaded.
"""

from pydoc_data.topics import topics

import lightning as L
import litgpt
import torch
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader

from lit_prune.callbacks import CubicSchedule, LearningRateRewarmup, PruningReport, StructuredPruning

LENGTH = 64


class Pretraining(L.LightningModule):
    """Predict the next byte."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "n_layer": 3,
            "n_embd": 96,
            "n_head": 8,
            "n_query_groups": 4,
            "head_size": 12,
            "intermediate_size": 256,
        }
        tokens = {"vocab_size": 256, "padded_vocab_size": 256, "block_size": LENGTH}
        config = litgpt.Config.from_name("Llama-3.2-1B", **sizes, **tokens)
        self.model = litgpt.GPT(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Cross-entropy in nats a byte."""
        return chunked_cross_entropy(self.model(batch[:, :-1]), batch[:, 1:])

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    blocks = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    held_out = torch.arange(len(blocks)) % 40 == 0
    schedule = CubicSchedule(start=40, end=100, stages=3, unit="step")
    trainer = L.Trainer(
        max_steps=160,
        val_check_interval=40,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[
            StructuredPruning(pruning_ratio=0.3, schedule=schedule, calibration_batches=4, uniform=True),
            LearningRateRewarmup(steps=10),
            PruningReport("outputs/litgpt_pretraining"),
        ],
    )
    trainer.fit(
        Pretraining(),
        DataLoader(blocks[~held_out], batch_size=16, shuffle=True),
        DataLoader(blocks[held_out], batch_size=64),
    )
    # all layers are equally wide, so the result is an ordinary LitGPT folder
    print(litgpt.Config.from_file("outputs/litgpt_pretraining/model/model_config.yaml"))
