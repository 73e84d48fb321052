"""Text from files or a `datasets` name, and packing it into blocks of tokens."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from lit_prune.errors import ArgumentValueError
from lit_prune.user_errors import reading

EMBEDDED = "python-docs"
_FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_texts(dataset: str | Sequence[str], subset: str | None = None) -> dict[str, datasets.Dataset]:
    """Load the embedded corpus, local files or a dataset by its name, by split.

    Raises:
        FileNotFoundError: If a local file does not exist.
        ArgumentValueError: If they cannot be read, have no known format, or different ones.
    """
    if dataset == EMBEDDED:
        topics = pydoc_data.topics.topics
        return {"train": datasets.Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})}
    files = [dataset] if isinstance(dataset, str) else list(dataset)
    if isinstance(dataset, str) and Path(dataset).suffix not in _FORMATS and not Path(dataset).is_file():
        with reading(f"The dataset {dataset!r}"):
            return dict(datasets.load_dataset(dataset, subset))
    empty = [file for file in files if Path(file).is_file() and Path(file).stat().st_size == 0]
    if empty:
        raise ArgumentValueError(f"{empty[0]!r} is empty: it has 0 documents.")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"No file at {missing[0]!r}; expected a text, JSON, CSV or Parquet file.")
    formats = {_FORMATS.get(Path(file).suffix) for file in files}
    if len(formats) != 1 or None in formats:
        raise ArgumentValueError(f"Expected files of one format out of {sorted(_FORMATS)}; found {files}.")
    with reading(f"The text {dataset!r}"):
        return dict(datasets.load_dataset(formats.pop(), data_files={"train": files}))


def pack(documents: datasets.Dataset, tokenizer: Any, text_column: str, block_size: int) -> datasets.Dataset:
    """Tokenise documents, join them, and cut the stream into blocks of ``block_size`` tokens; what is left over is dropped.

    Returns:
        A dataset in torch format with the column ``input_ids``, rows of shape ``(block_size,)``.

    Raises:
        ArgumentValueError: If there is no such column, or it holds no text.
    """
    kind = documents.features.get(text_column) if documents.features else None
    if len(documents) and not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "null")):
        raise ArgumentValueError(
            f"The data have the columns {documents.column_names}; expected text in one named {text_column!r}; found"
            f" {'none of that name' if kind is None else kind}."
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[text_column] if text]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        stream = [token for ids in encoded for token in (*ids, *end)]
        whole = len(stream) // block_size * block_size
        return {"input_ids": [stream[i : i + block_size] for i in range(0, whole, block_size)]}

    blocks = documents.map(
        tokenize,
        batched=True,
        batch_size=max(1, len(documents)) if len(documents) < 10_000 else 10_000,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))}),
        keep_in_memory=len(documents) < 10_000,
        desc="Packing",
    )
    return blocks.with_format("torch")
