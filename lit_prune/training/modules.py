"""A LightningModule for causal language models."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from lit_prune.arguments import FLAG, FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, TEXT, choice, optional, pair
from lit_prune.errors import ArgumentValueError
from lit_prune.io.lightning_checkpoint import rebuild_from_checkpoint
from lit_prune.io.sources import load_model
from lit_prune.training.sharded import empty_model, read_shards, shard_model

IGNORED = -100

_BETAS = pair("two numbers from 0 to below 1", Annotated[float, Field(ge=0, lt=1)])


class CausalLMModule(pl.LightningModule):
    """Train and validate a causal language model on batches of ``input_ids`` (and optionally ``attention_mask``, ``labels``).

    Logs ``train_loss``, ``val_loss`` and ``val_perplexity`` (torchmetrics).

    Args:
        model: A directory in Hugging Face format, a hub name, a GGUF file, or ``package:NAME`` for a GGUF file inside an
            installed package.
        random_weights: Start from random weights in place of the pretrained ones; ``model`` may then be a config.json.
        dtype: Data type of the weights.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW, on matrices only.
        warmup_steps: Steps of linear warm-up.
        schedule: How the learning rate goes on after the warm-up: constant, or down to ``min_lr_factor`` along a cosine
            over all steps of the run.
        min_lr_factor: Where the cosine ends, as a fraction of the peak.
        betas: Betas of AdamW.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        attn_implementation: Attention implementation of transformers, ``sdpa`` or ``eager`` for instance.
        trust_remote_code: Whether code that lies beside the weights may run.
        shard: For models larger than a device, with ``ModelParallelStrategy``: shard the model by FSDP2, and read of every
            tensor only the part that belongs to the process. Needs a directory with safetensors files.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range, or ``shard`` is combined with ``random_weights``.
    """

    def __init__(
        self,
        model: str,
        random_weights: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        min_lr_factor: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        shard: bool = False,
    ) -> None:
        super().__init__()
        model = TEXT.check("model", model)
        random_weights = FLAG.check("random_weights", random_weights)
        dtype = choice("float32", "bfloat16", "float16").check("dtype", dtype)
        learning_rate = POSITIVE.check("learning_rate", learning_rate)
        weight_decay = NOT_NEGATIVE.check("weight_decay", weight_decay)
        warmup_steps = NATURAL.check("warmup_steps", warmup_steps)
        schedule = choice("constant", "cosine").check("schedule", schedule)
        min_lr_factor = FRACTION.check("min_lr_factor", min_lr_factor)
        betas = _BETAS.check("betas", betas)
        gradient_checkpointing = FLAG.check("gradient_checkpointing", gradient_checkpointing)
        attn_implementation = optional(TEXT).check("attn_implementation", attn_implementation)
        trust_remote_code = FLAG.check("trust_remote_code", trust_remote_code)
        shard = FLAG.check("shard", shard)
        if shard and random_weights:
            raise ArgumentValueError("shard=True reads pretrained weights; found random_weights=True.")
        self.save_hyperparameters()
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        language_model: Any = (
            empty_model(model, **options) if shard else load_model(model, random_weights=random_weights, **options)
        )
        if gradient_checkpointing:
            language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model: nn.Module = language_model.train()
        self.val_perplexity = Perplexity(ignore_index=IGNORED)

    def configure_model(self) -> None:
        """Shard the model, if that is asked for, and read the shards.

        Raises:
            ArgumentValueError: If ``shard`` and the Trainer's strategy do not fit each other.
        """
        # Lightning calls this for load_from_checkpoint, too, without a trainer
        strategy = None if self._trainer is None else self.trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy)
        if sharded != self.hparams["shard"]:
            # or Lightning's tear-down fails on parameters without memory, and its error is all that is seen
            del self.model
            raise ArgumentValueError(
                f"Expected shard=True with ModelParallelStrategy and shard=False without; found"
                f" shard={self.hparams['shard']} with {'no Trainer' if strategy is None else type(strategy).__name__}."
            )
        if sharded and any(p.is_meta for p in self.model.parameters()):
            assert self.device_mesh is not None
            shard_model(self.model, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)
            read_shards(self.model, self.hparams["model"])

    def forward(self, **batch: Tensor) -> Any:
        """Run the model."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The causal loss of a batch."""
        del batch_idx
        loss = self.model(**_with_labels(batch), use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the perplexity of a batch."""
        del batch_idx
        batch = _with_labels(batch)
        output = self.model(**batch, use_cache=False)
        self.val_perplexity.update(output.logits[:, :-1].float(), batch["labels"][:, 1:])
        self.log("val_loss", output.loss, batch_size=len(batch["input_ids"]), sync_dist=True)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same as validation."""
        self.validation_step(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut the model as the checkpoint's was, so that ``load_from_checkpoint`` takes checkpoints of pruned models."""
        rebuild_from_checkpoint(self, checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and the chosen schedule."""
        options = self.hparams
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options["weight_decay"]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options["learning_rate"], betas=tuple(options["betas"]))
        warmup, low = options["warmup_steps"], options["min_lr_factor"]
        total = self.trainer.estimated_stepping_batches if options["schedule"] == "cosine" else 0

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if options["schedule"] == "constant":
                return 1.0
            progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if "labels" in batch:
        return batch
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return {**batch, "labels": labels}
