"""Commands that only read and write files: ``convert``, ``export`` and ``report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lit_prune._files import check_writable
from lit_prune.arguments import TEXT, Rule, mapping_of
from lit_prune.cli.printing import print_report, say
from lit_prune.groups import count_parameters
from lit_prune.io.conversion import convert_checkpoint
from lit_prune.io.gguf import check_output, save_gguf
from lit_prune.io.huggingface import save_pruned
from lit_prune.io.loading import load_pruned
from lit_prune.io.output_folder import check_replaceable
from lit_prune.io.sources import auto_class_of, gguf_file, load_image_processor, load_model, load_tokenizer
from lit_prune.plan import PruningPlan
from lit_prune.ranking.table import GroupTable
from lit_prune.reporting.page import write_report
from lit_prune.user_errors import reading

_METRICS: Rule[dict[str, Any]] = mapping_of(
    "metrics by stage and name, as report.json holds them",
    TEXT,
    mapping_of("metrics by name", TEXT, Rule("a number", Annotated[float, Field(allow_inf_nan=True)])),
)
_COSTS: Rule[dict[str, float]] = mapping_of(
    "what each phase took, as costs.json holds it", TEXT, Rule("a number", Annotated[float, Field(ge=0)])
)


def convert(
    checkpoint: Path,
    model: str,
    output: Path,
    tokenizer: str | None = None,
    name: str | None = None,
    self_contained: bool = False,
) -> None:
    """Turn a Lightning checkpoint of a run that pruned into a folder that transformers loads.

    Args:
        checkpoint: The checkpoint file.
        model: The model that the run began with: a directory in Hugging Face format, a hub name, a GGUF file, or
            package:NAME for a GGUF file inside an installed package.
        output: Folder to write to.
        tokenizer: Where its tokenizer, or image processor, comes from; where the model comes from if not given, and none if
            that has none.
        name: Name of the model within the LightningModule; found by the names of the weights if not given.
        self_contained: Write the modelling code beside the weights, so that transformers loads the model with
            trust_remote_code=True where lit_prune is not installed.
    """
    check_replaceable(output, [checkpoint, model, *([] if tokenizer is None else [tokenizer])])
    dense: Any = load_model(model, auto_class=auto_class_of(model))
    converted = convert_checkpoint(checkpoint, dense, name=name)
    load: Any = load_image_processor if dense.main_input_name == "pixel_values" else load_tokenizer
    try:
        found = load(tokenizer or model)
    except (OSError, ValueError):
        if tokenizer is not None:
            raise
        found = None
    save_pruned(converted, output, found, self_contained=self_contained)
    say(f"{count_parameters(converted):,} parameters written to {output}")


def export(
    model: Path,
    output: Path,
    dtype: Literal["f32", "f16", "q8_0"] = "f16",
    vocabulary: str | None = None,
    pre_tokenizer: str | None = None,
    verify: bool = False,
) -> None:
    """Write a pruned model as a GGUF file for llama.cpp.

    Args:
        model: A folder that apply or convert wrote.
        output: The GGUF file.
        dtype: How matrices are stored.
        vocabulary: GGUF file of the dense model (or package:NAME) to copy the vocabulary from; the tokenizer beside the
            model is converted if not given.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text; found out if not given.
        verify: Compare the weights with the checksums that were noted when they were saved.
    """
    check_output(output)
    tokenizer: Any = load_tokenizer(str(model)) if vocabulary is None else gguf_file(vocabulary)
    written = save_gguf(load_pruned(model, verify=verify), output, tokenizer, dtype=dtype, pre_tokenizer=pre_tokenizer)
    say(f"{written.stat().st_size / 1e6:,.1f} MB written to {written}")


def report(folder: Path) -> None:
    """Draw the pictures and the page of a report anew from the files in its folder.

    Args:
        folder: A folder with plan.json, and group_table.csv, report.json and costs.json if there are any.
    """
    made = PruningPlan.load(folder / "plan.json")
    check_writable(folder)
    table, metrics, costs = None, {}, {}
    if (file := folder / "group_table.csv").exists():
        with reading(f"The group table {str(file)!r}"):
            table = GroupTable.read(file)
    if (file := folder / "report.json").exists():
        with reading(f"The report {str(file)!r}"):
            metrics = _METRICS.check(str(file), json.loads(file.read_text(encoding="utf-8")))
    if (file := folder / "costs.json").exists():
        with reading(f"The costs {str(file)!r}"):
            costs = _COSTS.check(str(file), json.loads(file.read_text(encoding="utf-8")))
    write_report(folder, metrics, made, table, costs=costs)
    print_report(metrics, made, folder, costs)
