"""The datamodule on local files, with a tokenizer whose tokens are told by hand."""

from __future__ import annotations

import json
import pydoc_data.topics

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from local_assets import EOS, UNKNOWN, chains, write_text, write_tokenizer

from lit_prune.io.text import EMBEDDED, load_texts
from lit_prune.training import TextDataModule

pytestmark = pytest.mark.core

# every document has words of its own: 10 documents of 3 words, tokens 2 to 31
DOCUMENTS = [f"w{3 * i + 2} w{3 * i + 3} w{3 * i + 4}" for i in range(10)]


@pytest.fixture
def tokenizer(tmp_path):
    return str(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def ready(tokenizer, dataset, **options) -> TextDataModule:
    data = TextDataModule(tokenizer, dataset, **{"block_size": 4, "val_fraction": 0.2, **options})
    data.setup("fit")
    return data


def tokens(loader) -> list[int]:
    return torch.cat([batch["input_ids"].flatten() for batch in loader]).tolist()


def write(folder, suffix):
    file = folder / f"text{suffix}"
    table = pa.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    if suffix == ".parquet":
        pa.parquet.write_table(table, file)
    elif suffix == ".csv":
        pa.csv.write_csv(table, file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        write_text(file, DOCUMENTS)
    return str(file)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_documents_are_joined_with_the_end_token_and_cut_into_blocks(tmp_path, tokenizer, suffix):
    data = ready(tokenizer, write(tmp_path, suffix), batch_size=3)
    for loader, count in ((data.train_dataloader(), 8), (data.val_dataloader(), 2)):
        batches = list(loader)
        assert sum(len(batch["input_ids"]) for batch in batches) == count
        assert all(set(batch) == {"input_ids"} and batch["input_ids"].dtype == torch.int64 for batch in batches)
        for block in torch.cat([batch["input_ids"] for batch in batches]).tolist():
            first = block[0]
            assert first % 3 == 2
            assert block == [first, first + 1, first + 2, EOS]


def test_what_does_not_fill_a_block_is_dropped_and_blocks_go_over_documents(tmp_path, tokenizer):
    files = [str(write_text(tmp_path / f"{name}.txt", DOCUMENTS[:5])) for name in "ab"]
    data = ready(tokenizer, files, block_size=7, max_val_blocks=1, batch_size=1)
    stream = tokens(data.train_dataloader())
    assert len(stream) == 8 * 4 // 7 * 7
    assert sorted(map(len, (b["input_ids"][0] for b in data.train_dataloader()))) == [7] * 4
    assert len(data.val_dataloader()) == 1


def test_validation_text_is_held_out_and_follows_the_seed(tmp_path, tokenizer):
    file = write(tmp_path, ".txt")

    def split(seed):
        data = ready(tokenizer, file, seed=seed)
        return set(tokens(data.train_dataloader())) - {EOS}, set(tokens(data.val_dataloader())) - {EOS}

    train, val = split(0)
    assert not train & val
    assert train | val == set(range(2, 32))
    assert split(0) == (train, val)
    assert any(split(seed) != (train, val) for seed in (1, 2, 3))


def test_a_dataset_that_has_a_validation_split_keeps_it(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    for split, texts in (("train", DOCUMENTS[:7]), ("validation", DOCUMENTS[7:])):
        rows = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        (tmp_path / "set" / f"{split}.jsonl").write_text(rows)
    data = ready(tokenizer, str(tmp_path / "set"), text_column="body")
    assert set(tokens(data.train_dataloader())) == {EOS, *range(2, 23)}
    assert tokens(data.val_dataloader()) == [t for n in (23, 26, 29) for t in (n, n + 1, n + 2, EOS)]
    assert tokens(data.test_dataloader()) == tokens(data.val_dataloader())


def test_training_is_shuffled_validation_is_not(tmp_path, tokenizer):
    data = ready(tokenizer, str(write_text(tmp_path / "t.txt", chains(200))), val_batch_size=2)
    torch.manual_seed(0)
    first, second = tokens(data.train_dataloader()), tokens(data.train_dataloader())
    assert first != second
    assert sorted(first) == sorted(second)
    assert tokens(data.val_dataloader()) == tokens(data.val_dataloader())
    assert len(next(iter(data.val_dataloader()))["input_ids"]) == 2


def test_limits_bound_the_blocks(tmp_path, tokenizer):
    data = ready(tokenizer, write(tmp_path, ".txt"), max_train_blocks=3, max_val_blocks=1, batch_size=1)
    assert (len(data.train_dataloader()), len(data.val_dataloader())) == (3, 1)


def test_the_embedded_corpus_is_that_of_the_standard_library(tokenizer):
    assert load_texts(EMBEDDED)["train"]["text"] == [text for _, text in sorted(pydoc_data.topics.topics.items())]
    data = ready(tokenizer, EMBEDDED, block_size=64, val_fraction=0.1)
    assert set(tokens(data.val_dataloader())) == {EOS, UNKNOWN}
    assert len(data.train_dataloader()) > 5 * len(data.val_dataloader())


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "has 0 documents"),
        (["", "", ""], {}, "expected at least one block"),
        (DOCUMENTS[:1], {}, "1 documents; expected at least 2"),
        (DOCUMENTS, {"block_size": 64}, "fewer than 64 tokens.*Lower block_size"),
        (DOCUMENTS, {"text_column": "body"}, r"columns \['text'\]; expected 'body'"),
        (DOCUMENTS, {"train_split": "all"}, r"splits \['train'\]; expected 'all'"),
    ],
)
def test_data_that_cannot_work_are_refused(tmp_path, tokenizer, texts, options, message):
    file = tmp_path / "t.txt"
    file.write_text("\n".join(texts))
    with pytest.raises(ValueError, match=message):
        ready(tokenizer, str(file), **options)


def test_files_that_cannot_be_read_are_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        ready(tokenizer, str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match=r"files of one format"):
        ready(tokenizer, [write(tmp_path, ".txt"), write(tmp_path, ".csv")])


@pytest.mark.parametrize(
    "options",
    [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"block_size": 1}, {"batch_size": 0}, {"max_val_blocks": 0}],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        TextDataModule("unused", **options)
