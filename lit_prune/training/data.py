"""A LightningDataModule that packs text into blocks of tokens."""

from __future__ import annotations

from typing import Any

import datasets
import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lit_prune.arguments import COUNT, FLAG, NATURAL, RATIO, TEXT, Rule, count, either, optional, sequence_of
from lit_prune.errors import ArgumentValueError
from lit_prune.io.sources import load_tokenizer
from lit_prune.io.text import EMBEDDED, load_texts, pack

# of a text to pack: with one token there is nothing to predict
BLOCK_SIZE = count(2, 2**31 - 1)
FILES: Rule[Any] = either(
    "a path or name, or a list of at least one path", TEXT, sequence_of("paths", TEXT, empty=False)
)
# numpy's generators take no negative seed, and none above this
SEED = count(0, 2**32 - 1)


class TextDataModule(pl.LightningDataModule):
    """Text from a `datasets` name or from files, tokenised and packed into blocks without padding.

    Args:
        tokenizer: Where the tokenizer comes from: the same values as ``model`` of the module.
        dataset: ``python-docs`` for the topics of the standard library's documentation (465 kB of English that every
            Python ships), the name of a dataset, or a text, JSON, CSV or Parquet file (several: a list).
        subset: Configuration name of the dataset, if it has several.
        text_column: Column that holds the text.
        train_split: Split to train on.
        val_split: Split to validate on. If ``None``, or if the dataset has no such split, ``val_fraction`` of the
            documents are held out.
        val_fraction: Fraction of the documents to hold out, in (0, 1).
        block_size: Tokens of a block.
        batch_size: Blocks of a batch.
        val_batch_size: Blocks of a validation batch; ``batch_size`` if ``None``.
        max_train_blocks: Train on so many blocks at most.
        max_val_blocks: Validate on so many blocks at most.
        num_workers: Worker processes of the dataloaders.
        seed: Seed of the choice of held-out documents.
        trust_remote_code: Whether code that lies beside the tokenizer may run.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range.
    """

    def __init__(
        self,
        tokenizer: str,
        dataset: str | list[str] = EMBEDDED,
        subset: str | None = None,
        text_column: str = "text",
        train_split: str = "train",
        val_split: str | None = "validation",
        val_fraction: float = 0.1,
        block_size: int = 128,
        batch_size: int = 4,
        val_batch_size: int | None = None,
        max_train_blocks: int | None = None,
        max_val_blocks: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        tokenizer = TEXT.check("tokenizer", tokenizer)
        dataset = FILES.check("dataset", dataset)
        subset = optional(TEXT).check("subset", subset)
        text_column = TEXT.check("text_column", text_column)
        train_split = TEXT.check("train_split", train_split)
        val_split = optional(TEXT).check("val_split", val_split)
        val_fraction = RATIO.check("val_fraction", val_fraction)
        block_size = BLOCK_SIZE.check("block_size", block_size)
        batch_size = COUNT.check("batch_size", batch_size)
        val_batch_size = optional(COUNT).check("val_batch_size", val_batch_size)
        max_train_blocks = optional(COUNT).check("max_train_blocks", max_train_blocks)
        max_val_blocks = optional(COUNT).check("max_val_blocks", max_val_blocks)
        num_workers = NATURAL.check("num_workers", num_workers)
        seed = SEED.check("seed", seed)
        trust_remote_code = FLAG.check("trust_remote_code", trust_remote_code)
        self.save_hyperparameters()
        self._blocks: dict[str, datasets.Dataset] = {}

    def setup(self, stage: str) -> None:
        """Load, split, tokenise and pack."""
        del stage
        if self._blocks:
            return
        options = self.hparams
        texts = self._texts()
        tokenizer = load_tokenizer(options["tokenizer"], trust_remote_code=options["trust_remote_code"])
        for name, limit in (("train", options["max_train_blocks"]), ("val", options["max_val_blocks"])):
            blocks = pack(texts[name], tokenizer, options["text_column"], options["block_size"])
            if len(blocks) == 0:
                raise ArgumentValueError(
                    f"The {name} split of {options['dataset']!r} has {len(texts[name])} documents and fewer than"
                    f" {options['block_size']} tokens; expected at least one block. Lower block_size or bring more text."
                )
            self._blocks[name] = blocks if limit is None else blocks.select(range(min(limit, len(blocks))))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``{"input_ids": (batch, block_size)}``."""
        return self._loader("train", self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the held-out blocks, in order."""
        return self._loader("val", self.hparams["val_batch_size"] or self.hparams["batch_size"], shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """The same as validation."""
        return self.val_dataloader()

    def _loader(self, name: str, batch_size: int, *, shuffle: bool) -> DataLoader:
        workers = self.hparams["num_workers"]
        return DataLoader(
            self._blocks[name],
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def _texts(self) -> dict[str, datasets.Dataset]:
        options = self.hparams
        loaded = load_texts(options["dataset"], options["subset"])
        if options["train_split"] not in loaded:
            raise ArgumentValueError(
                f"{options['dataset']!r} has the splits {list(loaded)}; expected {options['train_split']!r}."
            )
        train = loaded[options["train_split"]]
        if options["text_column"] not in train.column_names:
            raise ArgumentValueError(
                f"{options['dataset']!r} has the columns {train.column_names}; expected {options['text_column']!r}."
            )
        if options["val_split"] in loaded:
            return {"train": train, "val": loaded[options["val_split"]]}
        if len(train) < 2:
            raise ArgumentValueError(
                f"{options['dataset']!r} has {len(train)} documents; expected at least 2 to hold some out, or a val_split."
            )
        split = train.train_test_split(options["val_fraction"], seed=options["seed"])
        return {"train": split["train"], "val": split["test"]}
