"""The text of benchmarks/quality.py: what calibrates, what choices are tuned on, and what is reported."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.io.sources import load_model, load_tokenizer

LENGTH = 512
PRECISIONS = ("32-true", "bf16-mixed")
# which domains a part is measured on; "python" is the documentation that the standard library ships
PARTS = {"tuning": ("wikitext",), "reporting": ("wikitext", "python")}


class Text:
    """A text in three parts of equal length, in its order: calibration, tuning, reporting.

    Args:
        text: The text.
        tokenizer: The model's tokenizer.
        windows: How many windows, evenly spaced, measure a domain.
        length: Tokens of a window.
    """

    def __init__(self, text: str, tokenizer: Any, windows: int, length: int = LENGTH) -> None:
        self._tokenizer, self._windows, self._length = tokenizer, windows, length
        ids = self._ids(text)
        third = len(ids) // 3
        self._calibration, self._tuning, self._reporting = (ids[i * third : (i + 1) * third] for i in range(3))

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def calibration(self, count: int, length: int, seed: int) -> list[Tensor]:
        """Sequences that do not overlap, each of shape (1, length), drawn from the first part."""
        starts = torch.randperm(len(self._calibration) // length, generator=torch.Generator().manual_seed(seed))[:count]
        return [self._calibration[None, s : s + length] for s in (starts * length).tolist()]

    def measured(self, part: str) -> dict[str, Tensor]:
        """The windows of a part's domains, each of shape (windows, length)."""
        found = {"wikitext": self._tuning if part == "tuning" else self._reporting}
        if "python" in PARTS[part]:
            found["python"] = self._ids("\n\n".join(topics.values()))
        return {domain: self._spaced(ids) for domain, ids in found.items()}

    def _spaced(self, ids: Tensor) -> Tensor:
        whole = len(ids) // self._length
        chosen = torch.linspace(0, whole - 1, min(self._windows, whole)).long()
        return ids[: whole * self._length].view(whole, self._length)[chosen]


def reported(options: argparse.Namespace) -> tuple[Any, Tensor, list[Tensor]]:
    """The model in float32, the reporting windows of WikiText, and the calibration sequences in batches of 8, as options say."""
    model = load_model(options.model, dtype=torch.float32).eval()
    text = Text(options.text.read_text(), load_tokenizer(options.model), options.windows)
    batches = torch.cat(text.calibration(options.sequences, options.length, 0)).split(8)
    return model, text.measured("reporting")["wikitext"], list(batches)


def computing(precision: str) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass, named as Lightning names precisions."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


# weights are cast once where gradients are off, in every pass in inference mode
@torch.no_grad()
def losses(model: nn.Module, windows: Sequence[Tensor], precision: str = "32-true") -> list[float]:
    """Mean negative log-likelihood a predicted token, in nats, of every window."""
    found = []
    with computing(precision):
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            found.append(round(torch.nn.functional.cross_entropy(logits, window[1:]).item(), 6))
    return found
