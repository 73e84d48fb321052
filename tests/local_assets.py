"""A tiny model, a tokenizer whose tokens can be told by hand, and text, on disk as a user without a network has them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import SMALL, tiny

EOS = 0
UNKNOWN = 1


def write_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer: ``w5`` is token 5, everything else is unknown."""
    vocabulary = {"<eos>": EOS, "<unk>": UNKNOWN, **{f"w{i}": i for i in range(2, SMALL["vocab_size"])}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


def write_model(folder: Path, model_type: str = "llama", **overrides: object) -> Path:
    """A tiny random model and its tokenizer in Hugging Face format."""
    tiny(model_type, **overrides).save_pretrained(folder)
    return write_tokenizer(folder)


def chains(documents: int, words: int = 20, seed: int = 0) -> list[str]:
    """Documents with a structure to learn: after ``w<n>`` mostly comes ``w<3n+1 modulo the vocabulary>``."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(documents):
        ids = [int(torch.randint(2, SMALL["vocab_size"], (), generator=generator))]
        while len(ids) < words:
            followed = (3 * ids[-1] + 1) % SMALL["vocab_size"]
            stray = int(torch.randint(2, SMALL["vocab_size"], (), generator=generator))
            ids.append(followed if followed > 1 and float(torch.rand((), generator=generator)) < 0.9 else stray)
        texts.append(" ".join(f"w{i}" for i in ids))
    return texts


def write_text(file: Path, texts: list[str]) -> Path:
    """A text file, a document a line."""
    file.write_text("\n".join(texts) + "\n")
    return file
