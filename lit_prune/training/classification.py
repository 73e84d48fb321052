"""A LightningModule and a LightningDataModule for classifiers of text, and their command line.

python -m lit_prune.training.classification fit --config configs/bert_classifier.yaml
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from lit_prune.arguments import COUNT, FLAG, NATURAL, NOT_NEGATIVE, POSITIVE, RATIO, TEXT, count, optional
from lit_prune.errors import ArgumentValueError
from lit_prune.io.sources import load_tokenizer
from lit_prune.training.command_line import PruningCLI, run
from lit_prune.training.data import FILES, SEED, load_texts


class TextClassifierModule(pl.LightningModule):
    """Train and validate a text classifier of transformers; logs ``train_loss``, ``val_loss`` and ``val_accuracy``.

    Args:
        model: A directory in Hugging Face format, or a hub name.
        num_labels: Number of classes.
        random_weights: Start from random weights in place of the pretrained ones.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range.
    """

    def __init__(
        self,
        model: str,
        num_labels: int = 2,
        random_weights: bool = False,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        model = TEXT.check("model", model)
        num_labels = count(2, 2**31 - 1).check("num_labels", num_labels)
        random_weights = FLAG.check("random_weights", random_weights)
        learning_rate = POSITIVE.check("learning_rate", learning_rate)
        weight_decay = NOT_NEGATIVE.check("weight_decay", weight_decay)
        self.save_hyperparameters()
        classifier: Any = (
            AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model, num_labels=num_labels))
            if random_weights
            else AutoModelForSequenceClassification.from_pretrained(model, num_labels=num_labels)
        )
        self.model = classifier.train()
        self.val_accuracy = MulticlassAccuracy(num_labels, average="micro")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch of ``input_ids``, ``attention_mask`` and ``labels``."""
        del batch_idx
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy of a batch."""
        del batch_idx
        output = self.model(**batch)
        self.val_accuracy(output.logits, batch["labels"])
        self.log("val_loss", output.loss, batch_size=len(batch["labels"]), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        options = self.hparams
        return torch.optim.AdamW(self.parameters(), lr=options["learning_rate"], weight_decay=options["weight_decay"])


class LabelledTextDataModule(pl.LightningDataModule):
    """Texts with labels from a `datasets` name or from files, padded to the longest of a batch.

    Args:
        tokenizer: Where the tokenizer comes from.
        dataset: The name of a dataset, or a JSON, CSV or Parquet file (several: a list).
        subset: Configuration name of the dataset, if it has several.
        text_column: Column that holds the text.
        label_column: Column that holds the class, an integer.
        val_fraction: Fraction held out if the dataset has no split ``validation``.
        max_length: Tokens of a text at most.
        batch_size: Texts of a batch.
        num_workers: Worker processes of the dataloaders.
        seed: Seed of the choice of what is held out.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range.
    """

    def __init__(
        self,
        tokenizer: str,
        dataset: str | list[str],
        subset: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        val_fraction: float = 0.1,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        tokenizer = TEXT.check("tokenizer", tokenizer)
        dataset = FILES.check("dataset", dataset)
        subset = optional(TEXT).check("subset", subset)
        text_column = TEXT.check("text_column", text_column)
        label_column = TEXT.check("label_column", label_column)
        val_fraction = RATIO.check("val_fraction", val_fraction)
        max_length = COUNT.check("max_length", max_length)
        batch_size = COUNT.check("batch_size", batch_size)
        num_workers = NATURAL.check("num_workers", num_workers)
        seed = SEED.check("seed", seed)
        self.save_hyperparameters()
        self._splits: dict[str, Any] = {}
        self._collate: Any = None

    def setup(self, stage: str) -> None:
        """Load, split and tokenise.

        Raises:
            ArgumentValueError: If the dataset lacks a column.
        """
        del stage
        if self._splits:
            return
        options = self.hparams
        loaded = load_texts(options["dataset"], options["subset"])
        text, label = options["text_column"], options["label_column"]
        missing = {text, label} - set(loaded["train"].column_names)
        if missing:
            raise ArgumentValueError(
                f"{options['dataset']!r} has the columns {loaded['train'].column_names}; expected {sorted(missing)}, too."
            )
        if "validation" in loaded:
            splits = {"train": loaded["train"], "val": loaded["validation"]}
        else:
            parts = loaded["train"].train_test_split(options["val_fraction"], seed=options["seed"])
            splits = {"train": parts["train"], "val": parts["test"]}
        tokenizer = load_tokenizer(options["tokenizer"])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(batch[text], truncation=True, max_length=options["max_length"])
            return {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": batch[label],
            }

        for name, split in splits.items():
            self._splits[name] = split.map(encode, batched=True, remove_columns=split.column_names, desc="Tokenising")
        self._collate = DataCollatorWithPadding(tokenizer)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``input_ids``, ``attention_mask`` (both ``(batch, tokens)``) and ``labels`` (``(batch,)``)."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The held-out texts, in order."""
        return self._loader("val", shuffle=False)

    def _loader(self, name: str, *, shuffle: bool) -> DataLoader:
        options = self.hparams
        return DataLoader(
            self._splits[name],
            batch_size=options["batch_size"],
            shuffle=shuffle,
            num_workers=options["num_workers"],
            collate_fn=self._collate,
        )


def main(arguments: list[str] | None = None) -> PruningCLI:
    """Run the command line with ``arguments``, or those of the process."""
    return run("classification", TextClassifierModule, LabelledTextDataModule, arguments)


if __name__ == "__main__":
    main()
