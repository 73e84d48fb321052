"""Calibration and held-out batches for the model of a command, from text or images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_prune.architectures.positions import token_positions
from lit_prune.arguments import (
    BIGGEST,
    COUNT,
    INTEGER,
    NATURAL,
    TEXT,
    check_fields,
    count,
    either,
    optional,
    sequence_of,
)
from lit_prune.errors import ArgumentValueError, PruningError
from lit_prune.io.images import image_files, read_images
from lit_prune.io.sources import CAUSAL, HEADLESS, IMAGES, MASKED, SEQUENCES
from lit_prune.io.text import load_texts, pack
from lit_prune.objectives import LABELS, Batch, masked_tokens

_TEXT_COLUMN, _LABEL_COLUMN = "text", "label"


@dataclass(frozen=True)
class Calibration:
    """What calibration runs on, text or images, and how much of it.

    Args:
        text: A text, JSON, CSV or Parquet file, or several as a list; python-docs for the documentation that every Python
            ships. A causal language model gets it joined and cut into sequences, an encoder one document after the other. Data
            with a column label train a classifier of text by it.
        images: Folder of images, for a model of images; with a folder for each class, named as the model names its classes or
            by their numbers, these are the labels.
        batches: Number of calibration batches.
        batch_size: Sequences or images of a batch.
        block_size: Tokens of a sequence, at most.
        held_out: Sequences from the end of the text, or images, to measure on, before and after; 0 measures nothing.
        seed: Seed of the choice of calibration sequences, and of what is masked or drawn.
    """

    text: str | list[str] = "python-docs"
    images: str | None = None
    batches: int = 32
    batch_size: int = 1
    block_size: int = 128
    held_out: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ArgumentTypeError: If one is of another type.
            ArgumentValueError: If one is out of its range.
        """
        files = either("a path or name, or a list of at least one path", TEXT, sequence_of("paths", TEXT, empty=False))
        counts = {"batches": COUNT, "batch_size": COUNT, "block_size": count(2, BIGGEST), "held_out": NATURAL}
        check_fields(self, {"text": files, "images": optional(TEXT), **counts, "seed": INTEGER})

    @property
    def needed(self) -> int:
        """Number of sequences or images that calibration takes."""
        return self.batches * self.batch_size


def reads_images(model: Any, auto_class: str) -> bool:
    """Whether a model is one of images."""
    return auto_class == IMAGES or (auto_class == HEADLESS and model.main_input_name == "pixel_values")


def calibration_inputs(
    model: Any, auto_class: str, processor: Any, options: Calibration
) -> tuple[list[Batch], list[Batch]]:
    """Calibration batches, and held-out ones of a sequence or image each, on the CPU.

    Args:
        model: The model.
        auto_class: The Auto class that it was loaded by.
        processor: Its tokenizer, or its image processor.
        options: Where they come from.

    Raises:
        ArgumentValueError: If the data cannot be read, or do not suit the model.
        FileNotFoundError: If they are missing.
        PruningError: If there are too few.
    """
    if reads_images(model, auto_class):
        return _images(model, processor, options)
    if options.images is not None:
        raise ArgumentValueError(
            f"images={options.images!r} was given, and a {type(model).__name__} reads {model.main_input_name}: give"
            " --calibration.text."
        )
    if auto_class != HEADLESS and model.main_input_name != "input_ids":
        raise ArgumentValueError(
            f"A {type(model).__name__} reads {model.main_input_name}; expected a model of text or images."
        )
    if auto_class == CAUSAL:
        return _blocks(model, processor, options)
    return _documents(model, auto_class, processor, options)


def _split(count: int, options: Calibration, what: str, *, mixed: bool) -> tuple[list[int], list[int]]:
    """Positions of what is calibrated on, drawn by the seed, and of what is held out, from the end."""
    if count < options.needed + options.held_out:
        raise PruningError(
            f"{what}; expected {options.needed} for calibration and {options.held_out} held out. Bring more, or lower them."
        )
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(count, generator=generator) if mixed else torch.arange(count)
    usable = count - options.held_out
    chosen = order[:usable][torch.randperm(usable, generator=generator)[: options.needed]]
    return chosen.tolist(), order[usable:].tolist()


def _batched(positions: Sequence[int], size: int, make: Callable[[Sequence[int]], Batch]) -> list[Batch]:
    return [make(positions[i : i + size]) for i in range(0, len(positions), size)]


def _blocks(model: Any, tokenizer: Any, options: Calibration) -> tuple[list[Batch], list[Batch]]:
    blocks: Tensor = pack(_loaded(options), tokenizer, _TEXT_COLUMN, options.block_size)[:]["input_ids"]
    found = f"{options.text} makes {len(blocks)} sequences of {options.block_size} tokens"
    chosen, held_out = _split(len(blocks), options, found, mixed=False)
    _check_tokens(model, blocks, options)

    def make(positions: Sequence[int]) -> Batch:
        return {"input_ids": blocks[list(positions)]}

    return _batched(chosen, options.batch_size, make), _batched(held_out, 1, make)


def _loaded(options: Calibration) -> Any:
    loaded = load_texts(options.text)
    return loaded.get("train") or next(iter(loaded.values()))


def _check_tokens(model: Any, ids: Tensor, options: Calibration) -> None:
    """Refuse what the embeddings have no row for.

    Raises:
        ArgumentValueError: If a token or a position is beyond them.
    """
    rows = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= rows:
        raise ArgumentValueError(
            f"The tokenizer gives token {int(ids.max())}, and the model has embeddings of {rows} tokens: they do not belong"
            " together."
        )
    positions = token_positions(model, model.config.get_text_config())
    if positions is not None and 0 < positions < ids.shape[-1]:
        raise ArgumentValueError(
            f"block_size={options.block_size} gives sequences of {ids.shape[-1]} tokens, and the model has {positions}"
            " positions. Lower --calibration.block_size."
        )


def _documents(model: Any, auto_class: str, tokenizer: Any, options: Calibration) -> tuple[list[Batch], list[Batch]]:
    data = _loaded(options)
    if _TEXT_COLUMN not in data.column_names:
        raise ArgumentValueError(
            f"The data have the columns {data.column_names}; expected text in one named {_TEXT_COLUMN!r}."
        )
    texts = data[:][_TEXT_COLUMN]
    rows = [row for row, text in enumerate(texts) if isinstance(text, str) and text.strip()]
    found = f"{options.text} holds {len(rows)} documents with text"
    chosen, held_out = _split(len(rows), options, found, mixed=False)
    labelled = auto_class == SEQUENCES and _LABEL_COLUMN in data.column_names
    labels = _classes(data[:][_LABEL_COLUMN], model.config) if labelled else None
    if labelled and labels is None:
        raise ArgumentValueError(
            f"The column {_LABEL_COLUMN!r} of {options.text} must hold classes of the model, numbers below"
            f" {model.config.num_labels} or names out of {sorted(model.config.label2id)[:10]}."
        )
    mask_id: Any = getattr(tokenizer, "mask_token_id", None)
    if auto_class == MASKED and mask_id is None:
        raise ArgumentValueError("The tokenizer has no mask token, which a masked language model is calibrated with.")
    if tokenizer.pad_token_id is None:
        raise ArgumentValueError("The tokenizer has no padding token; texts of several lengths cannot make a batch.")
    generator = torch.Generator().manual_seed(options.seed)

    def make(positions: Sequence[int]) -> Batch:
        members = [rows[p] for p in positions]
        encoded = tokenizer(
            [texts[r] for r in members],
            truncation=True,
            max_length=options.block_size,
            padding=True,
            return_tensors="pt",
            return_attention_mask=True,
            verbose=False,
        )
        batch = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
        _check_tokens(model, batch["input_ids"], options)
        if auto_class == MASKED:
            batch = masked_tokens(batch, tokenizer.all_special_ids, mask_id, generator)
        if labels is not None:
            batch[LABELS] = torch.tensor([labels[r] for r in members])
        return batch

    return _batched(chosen, options.batch_size, make), _batched(held_out, 1, make)


def _classes(names: Sequence[Any], config: Any) -> list[int] | None:
    """The classes of a model by names or numbers; ``None`` if one is unknown."""
    known: Mapping[Any, int] = {**{str(i): i for i in range(config.num_labels)}, **(config.label2id or {})}
    found = [known.get(str(name)) for name in names]
    return None if any(number is None for number in found) else [int(number) for number in found if number is not None]


def _images(model: Any, processor: Any, options: Calibration) -> tuple[list[Batch], list[Batch]]:
    if options.images is None:
        raise ArgumentValueError(
            f"A {type(model).__name__} reads images: give --calibration.images, a folder of images, or of a folder for each"
            " class."
        )
    files = image_files(options.images)
    found = f"{options.images} holds {len(files)} images"
    chosen, held_out = _split(len(files), options, found, mixed=True)
    labels = _classes([name for _, name in files], model.config) if hasattr(model.config, "num_labels") else None

    def make(positions: Sequence[int]) -> Batch:
        paths: list[Path] = [files[p][0] for p in positions]
        batch = {"pixel_values": read_images(paths, processor)}
        if labels is not None:
            batch[LABELS] = torch.tensor([labels[p] for p in positions])
        return batch

    return _batched(chosen, options.batch_size, make), _batched(held_out, 1, make)
