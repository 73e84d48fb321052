"""Perplexity of a pruned model in llama.cpp over that in transformers, and what of it is the rounding of the weights alone.

llama.cpp is the prebuilt one of the package xllamacpp. Every file is measured on the same windows of the second half of
the text; ratios are paired token by token, with their standard error. Files that llama.cpp's own quantiser made can be
named, too.

    lit-prune export pruned pruned.f32.gguf --dtype f32
    lit-prune export pruned pruned.q8_0.gguf --dtype q8_0
    python benchmarks/gguf_quality.py pruned pruned.f32.gguf pruned.q8_0.gguf --text wikitext2-valid.txt
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from results import write_json
from rich.console import Console
from rich.table import Table

from lit_prune.io.sources import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from llama_cpp import LlamaCpp


@torch.no_grad()
def in_transformers(model: Any, windows: list[list[int]]) -> np.ndarray:
    """Log probability of every token but the first of each window."""
    found: list[float] = []
    for window in windows:
        scores = model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
        found += scores.gather(1, torch.tensor(window[1:])[:, None])[:, 0].tolist()
    return np.array(found)


def in_llama_cpp(file: Path, windows: list[list[int]], threads: int) -> np.ndarray:
    """The same; not a number for tokens that are part of a character, which the server does not report."""
    served = LlamaCpp(file, context=max(map(len, windows)) + 1, threads=threads)

    def one(before: list[int], following: int) -> float:
        try:
            return served.log_probability(before, following)
        except KeyError:
            return math.nan

    return np.array([one(w[: i + 1], w[i + 1]) for w in windows for i in range(len(w) - 1)])


def rounded(model: Any) -> Any:
    """A copy of the model whose matrices went through q8_0; activations are as they were."""
    model, kind = copy.deepcopy(model), gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                width = parameter.shape[1]
                filled = np.pad(parameter.numpy(), ((0, 0), (0, -width % 32)))
                values = gguf.quants.dequantize(gguf.quants.quantize(filled, kind), kind)[:, :width]
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model in Hugging Face format, or package:NAME")
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files of it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a window that are predicted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = options.text.read_text(encoding="utf-8")
    ids = load_tokenizer(options.model)(text[len(text) // 2 :], verbose=False)["input_ids"]
    apart = len(ids) // options.windows
    if apart <= options.tokens:
        parser.error(f"the text's second half has {len(ids)} tokens; expected {options.windows} windows of more")
    windows = [ids[i * apart : i * apart + options.tokens + 1] for i in range(options.windows)]
    model = load_model(options.model).eval()
    reference = in_transformers(model, windows)
    measured = {
        "transformers, float32": reference,
        "transformers, weights rounded to q8_0": in_transformers(rounded(model), windows),
    }
    measured |= {f"llama.cpp, {file.name}": in_llama_cpp(file, windows, options.threads) for file in options.files}
    table = Table("", "tokens", "perplexity", "ratio", "standard error")
    rows = {}
    for name, values in measured.items():
        told = np.isfinite(values)
        difference = (reference - values)[told]
        rows[name] = {
            "tokens": int(told.sum()),
            "perplexity": math.exp(-values[told].mean()),
            "ratio": math.exp(difference.mean()),
            "standard_error": float(difference.std() / math.sqrt(len(difference))),
        }
        table.add_row(
            name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in rows[name].values())
        )
    Console().print(table)
    if options.output is not None:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
