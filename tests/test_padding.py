"""Padding changes nothing: neither statistics, importances, shares nor refitted weights, whatever form a batch has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architecture_cases import BART_SMALL, T5_SMALL, encoder, hugging
from torch import Tensor, nn
from torch.nn import functional

from conftest import SMALL, uneven_kept, unsettled
from lit_prune import find_group_sets, find_model
from lit_prune.importance import get_criterion, group_importance
from lit_prune.plan import PruningPlan
from lit_prune.repair import least_squares, unexplained_shares
from lit_prune.statistics import collect_statistics

LENGTHS = torch.tensor([12, 9, 11, 7, 12, 10])
TARGETS = torch.tensor([8, 12, 5, 9, 11, 12])


def sequences(lengths: Tensor, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, SMALL["vocab_size"], (int(n),), generator=generator) for n in lengths]


def padded(rows: list[Tensor], left: int = 0, right: int = 0, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths and their mask, with more padding at one end or the other; rows lie at the other end."""
    width = max(len(r) for r in rows) + left + right
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    return ids, mask


def causal(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    ids, mask = padded(sequences(LENGTHS), left, right, fill=3)
    labels = ids.masked_fill(mask == 0, -100)
    # the first token of a row would be predicted from padding
    labels[torch.arange(len(ids)), mask.argmax(1)] = -100
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def translated(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    ids, mask = padded(sequences(LENGTHS), left, right)
    targets, shown = padded(sequences(TARGETS, 1), left, right)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": targets,
        "decoder_attention_mask": shown,
        "labels": targets.masked_fill(shown == 0, -100),
    }


class Tagger(nn.Module):
    """An ``nn.TransformerEncoder`` whose mask is of padding, and is made of that of tokens."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(SMALL["vocab_size"], 32)
        layer = nn.TransformerEncoderLayer(32, 4, 24, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(32, SMALL["vocab_size"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor) -> Any:
        hidden = self.embedding(input_ids)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        logits = self.head(hidden if self.batch_first else hidden.transpose(0, 1))
        return logits, functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Pair(nn.Module):
    """An ``nn.Transformer`` with its batch along the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SMALL["vocab_size"], 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 24, dropout=0.0)
        self.head = nn.Linear(32, SMALL["vocab_size"])

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels):
        hidden = self.transformer(
            self.embedding(input_ids).transpose(0, 1),
            self.embedding(decoder_input_ids).transpose(0, 1),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.shape[1]),
            src_key_padding_mask=attention_mask == 0,
            memory_key_padding_mask=attention_mask == 0,
            tgt_key_padding_mask=decoder_attention_mask == 0,
        )
        logits = self.head(hidden.transpose(0, 1))
        return logits, functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


BOTH = ({"left": 5}, {"right": 7})
RIGHT = ({"right": 7},)


@dataclasses.dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    paddings: tuple[dict[str, int], ...] = BOTH
    # sums of another length round differently
    dtype: torch.dtype = torch.float64


FAMILIES = {
    "llama": Family(lambda: hugging("llama")("sdpa"), causal),
    # its softmax is in float32
    "llama, eager": Family(lambda: hugging("llama")("eager"), causal, dtype=torch.float32),
    "mixtral": Family(
        lambda: hugging("mixtral", num_hidden_layers=2, num_experts_per_tok=2, num_local_experts=3)("sdpa"),
        causal,
        dtype=torch.float32,
    ),
    "bert": Family(lambda: encoder("bert", "AutoModelForMaskedLM")("sdpa"), causal),
    "bert, eager": Family(lambda: encoder("bert", "AutoModelForMaskedLM")("eager"), causal),
    "t5": Family(lambda: hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL)("sdpa"), translated),
    "t5, eager": Family(lambda: hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL)("eager"), translated),
    # its positions are absolute, and no argument
    "bart": Family(lambda: hugging("bart", "AutoModelForSeq2SeqLM", BART_SMALL)("sdpa"), translated, RIGHT),
    "nn.TransformerEncoder": Family(lambda: Tagger(True), causal),
    "nn.TransformerEncoder, positions first": Family(lambda: Tagger(False), causal),
    "nn.Transformer": Family(Pair, translated, RIGHT),
}


def made(family: Family) -> nn.Module:
    torch.manual_seed(0)
    return unsettled(family.build()).to(family.dtype)


def loss_of(result: Any) -> Tensor:
    return result.loss if hasattr(result, "loss") else result[1]


def measured(root: nn.Module, batches: list[Any], forward: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Everything that calibration says of a model, by name."""
    model = find_model(root)[1]
    group_sets = find_group_sets(model)
    criteria = [get_criterion(name) for name in ("fisher", "wanda")]
    terms = [t for c in criteria for t in c.terms]
    statistics = collect_statistics(
        model, group_sets, batches, lambda b: loss_of(forward(b)), terms, activations=True, root=root
    )
    found = {}
    for name, activation in statistics.activations.items():
        found[f"{name} count"] = torch.tensor(activation.count)
        found.update({f"{name} {key}": value / activation.count for key, value in activation.sums.items()})
    parameters = dict(model.named_parameters())
    for name, criterion in zip(("fisher", "wanda"), criteria, strict=True):
        scores = group_importance(criterion, parameters, group_sets, statistics)
        found.update({f"{name} {s.name} {s.kind}": i / i.mean() for s, i in zip(group_sets, scores, strict=True)})
    shares = unexplained_shares(model, group_sets, batches, forward, root=root)
    found.update({f"share {name}": value for name, value in shares.items()})
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    weights = least_squares(model, group_sets, plan, batches, forward, root=root)
    found.update({f"refit {name}": value for name, value in weights.items()})
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("count"):
            assert int(found[name]) == int(value), name
        else:
            scale = float(value.abs().max())
            torch.testing.assert_close(
                found[name] / scale, value / scale, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}"
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    family = FAMILIES[name]
    model = made(family)
    expected = measured(model, [family.batch()], lambda b: model(**b))
    assert any(key.startswith("refit") for key in expected)
    atol = 1e-5 if family.dtype == torch.float64 else 1e-3
    for padding in family.paddings:
        assert_same(measured(model, [family.batch(**padding)], lambda b: model(**b)), expected, atol)
