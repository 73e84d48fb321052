"""Prune a model from the command line, convert, export and look at it, with no training to run."""

from __future__ import annotations

import inspect
import json
import re
import statistics as numbers
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jsonargparse import ArgumentParser
from pydantic import Field
from rich.console import Console

from lit_prune._files import check_writable, write_text
from lit_prune.arguments import (
    NATURAL,
    TEXT,
    Rule,
    mapping_of,
)
from lit_prune.config import PruningConfig
from lit_prune.groups import count_parameters
from lit_prune.io.conversion import convert_checkpoint
from lit_prune.io.huggingface import save_pruned, to_pretrained, write_pruned
from lit_prune.io.loading import load_pruned
from lit_prune.io.output_folder import check_replaceable, replacing_folder
from lit_prune.plan import PruningPlan, get_plan
from lit_prune.ranking.registry import criteria
from lit_prune.ranking.table import GroupTable
from lit_prune.reporting.page import cost_table, report_table, write_report
from lit_prune.reporting.throughput import tokens_per_second
from lit_prune.session import Calibration, Session
from lit_prune.text_escape import for_console
from lit_prune.user_errors import DEBUG, DEBUG_HELP, check_groups, errors_as_sentences, reading
from lit_prune.version import __version__

PROGRAM = "lit-prune"
REPORT = "pruning"
_METRICS: Rule[dict[str, Any]] = mapping_of(
    "metrics by stage and name, as report.json holds them",
    TEXT,
    mapping_of("metrics by name", TEXT, Rule("a number", Annotated[float, Field(allow_inf_nan=True)])),
)
_COSTS: Rule[dict[str, float]] = mapping_of(
    "what each phase took, as costs.json holds it", TEXT, Rule("a number", Annotated[float, Field(ge=0)])
)


DEFAULT_CALIBRATION = Calibration()
DEFAULT_PRUNING = PruningConfig()
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def plan(
    model: str,
    output: Path,
    calibration: Calibration = DEFAULT_CALIBRATION,
    pruning: PruningConfig = DEFAULT_PRUNING,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Decide what to cut, and save no model: writes the plan, the group table, pictures and a page to look at.

    Args:
        model: A directory in Hugging Face format, a hub name, a GGUF file, or package:NAME for a GGUF file inside an
            installed package.
        output: Folder to write to.
        calibration: The calibration text.
        pruning: Options of a pruning: criterion, ratio, limits and repair.
        device: Where to compute, cpu or cuda:0 for instance; auto takes the first GPU if there is one.
        dtype: Data type of the weights; auto takes that of the files.
    """
    check_writable(output)
    limits = pruning.limits
    session = Session(model, calibration, device, dtype, blocks=limits.blocks, hidden=limits.hidden)
    dense = session.metrics()
    table, made = session.prune(pruning)
    metrics = {"dense": dense, "planned": {"parameters": float(made.info["parameters_after"])}}
    costs = session.costs.numbers()
    write_report(output, metrics, made, table, costs=costs)
    _print(metrics, output, costs)


def apply(
    model: str,
    output: Path,
    plan: Path | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
    pruning: PruningConfig = DEFAULT_PRUNING,
    device: str = "auto",
    dtype: Dtype = "auto",
    self_contained: bool = False,
) -> None:
    """Prune a model in one shot and save it, with its tokenizer, a card and a report.

    Args:
        model: A directory in Hugging Face format, a hub name, a GGUF file, or package:NAME for a GGUF file inside an
            installed package.
        output: Folder of the pruned model; the report goes to its subfolder "pruning".
        plan: A plan to apply, as the command plan writes it, or edited by hand. One is made if none is given. Repair runs
            in either case; --pruning.repair null skips it.
        calibration: The calibration text.
        pruning: How to prune; with a plan, only repair counts.
        device: Where to compute, cpu or cuda:0 for instance; auto takes the first GPU if there is one.
        dtype: Data type of the weights; auto takes that of the files.
        self_contained: Write the modelling code beside the weights, so that transformers loads the model with
            trust_remote_code=True where lit_prune is not installed.
    """
    check_replaceable(output, [model])
    given = None if plan is None else PruningPlan.load(plan)
    blocks = pruning.limits.blocks if given is None else bool(given.blocks)
    hidden = pruning.limits.hidden if given is None else given.hidden
    session = Session(model, calibration, device, dtype, blocks=blocks, hidden=hidden)
    if given is not None:
        given.validate(session.group_sets)
    metrics = {"dense": session.metrics()}
    table = None
    if given is None:
        table, _ = session.prune(pruning)
    else:
        session.cut(given, pruning)
    costs = session.costs.numbers()
    metrics["pruned"] = session.metrics()
    cut = get_plan(session.model)
    assert cut is not None
    whole = to_pretrained(session.model, self_contained=self_contained)
    with replacing_folder(output, [model]) as temporary:
        write_pruned(whole, temporary, session.tokenizer, metrics=metrics, self_contained=self_contained)
        write_report(temporary / REPORT, metrics, cut, table, costs=costs)
    _print(metrics, output, costs)


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
        tokenizer: Where its tokenizer comes from; where the model comes from if not given, and none if that has none.
        name: Name of the model within the LightningModule; found by the names of the weights if not given.
        self_contained: Write the modelling code beside the weights, so that transformers loads the model with
            trust_remote_code=True where lit_prune is not installed.
    """
    from lit_prune.io.sources import load_model, load_tokenizer

    check_replaceable(output, [checkpoint, model, *([] if tokenizer is None else [tokenizer])])
    dense: Any = load_model(model)
    converted = convert_checkpoint(checkpoint, dense, name=name)
    try:
        found = load_tokenizer(tokenizer or model)
    except (OSError, ValueError):
        if tokenizer is not None:
            raise
        found = None
    save_pruned(converted, output, found, self_contained=self_contained)
    _say(f"{count_parameters(converted):,} parameters written to {output}")


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
    from lit_prune.io.gguf import check_output, save_gguf
    from lit_prune.io.sources import gguf_file, load_tokenizer

    check_output(output)
    tokenizer: Any = load_tokenizer(str(model)) if vocabulary is None else gguf_file(vocabulary)
    written = save_gguf(load_pruned(model, verify=verify), output, tokenizer, dtype=dtype, pre_tokenizer=pre_tokenizer)
    _say(f"{written.stat().st_size / 1e6:,.1f} MB written to {written}")


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
    _print(metrics, folder, costs)


def compare(
    models: list[str],
    calibration: Calibration = DEFAULT_CALIBRATION,
    device: str = "auto",
    dtype: Dtype = "auto",
    speed_tokens: int = 512,
    output: Path | None = None,
) -> None:
    """Measure models side by side: parameters, size, perplexity on the held-out text, and speed, taking turns.

    Args:
        models: Two or more models, each a directory, hub name, GGUF file or package:NAME; the last is compared with the
            first.
        calibration: The text; its held-out sequences are what perplexity is measured on.
        device: Where to compute, cpu or cuda:0 for instance; auto takes the first GPU if there is one.
        dtype: Data type of the weights; auto takes that of the files.
        speed_tokens: Tokens of the sequence that the speed is measured on; 0 measures none.
        output: JSON file to write the metrics to.
    """

    speed_tokens = NATURAL.check("speed_tokens", speed_tokens)
    if output is not None:
        check_writable(output, file=True)
    sessions = {name: Session(name, calibration, device, dtype) for name in models}
    metrics = {name: session.metrics() for name, session in sessions.items()}
    if speed_tokens:
        first = next(iter(sessions.values()))
        generator = torch.Generator().manual_seed(0)
        size = min(s.model.get_input_embeddings().num_embeddings for s in sessions.values())
        ids = torch.randint(0, size, (1, speed_tokens), generator=generator).to(first.device)
        measured = tokens_per_second({name: s.model for name, s in sessions.items()}, ids)
        for name, values in measured.items():
            metrics[name]["tokens_per_second"] = numbers.median(values)
    Console().print(report_table(metrics))
    if output is not None:
        write_text(output, json.dumps(metrics, indent=1) + "\n")


def _print(metrics: dict[str, dict[str, float]], folder: Path, costs: dict[str, float]) -> None:
    if metrics:
        Console().print(report_table(metrics))
    if costs:
        Console().print(cost_table(costs))
    _say(f"Written to {folder}")


def _say(text: str) -> None:
    Console().print(for_console(text), soft_wrap=True)


_MARKUP = re.compile(r"(?::\w+:`|``)([^`]+)``?")
_COMMANDS = (plan, apply, convert, export, report, compare)
_EXAMPLES = {
    "plan": "lit-prune plan ./model ./plan --calibration.text notes.txt --pruning.pruning_ratio 0.2",
    "apply": "lit-prune apply ./model ./pruned --calibration.text notes.txt --pruning.pruning_ratio 0.2",
    "convert": "lit-prune convert last.ckpt ./model ./pruned",
    "export": "lit-prune export ./pruned pruned.gguf --dtype q8_0",
    "report": "lit-prune report ./pruned/pruning",
    "compare": "lit-prune compare ./model ./pruned --calibration.text notes.txt",
}


def _parser() -> ArgumentParser:
    """The parser; what it says comes from the commands' docstrings and types."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, version=__version__, exit_on_error=False)
    commands = parser.add_subcommands(required=True)
    for function in _COMMANDS:
        name = function.__name__
        summary = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
        known = f" Criteria: {', '.join(criteria())}." if name in ("plan", "apply") else ""
        sub = ArgumentParser(description=summary, epilog=f"Example: {_EXAMPLES[name]}.{known}", exit_on_error=False)
        sub.add_argument("--config", action="config", help="YAML file with any of these options.")
        sub.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)
        if name == "compare":
            sub.add_argument(
                "models", nargs="+", type=str, help="Two or more models; the last is compared with the first."
            )
        skipped: set[str | int] = {"models", "pruning"}
        sub.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True, skip=skipped)
        if "pruning" in inspect.signature(function).parameters:
            # stages of a schedule are the callback's
            sub.add_class_arguments(PruningConfig, "pruning", skip={"reference"}, sub_configs=True)
        for action in sub._actions:
            action.help = _MARKUP.sub(r"\1", action.help or "")
        commands.add_subcommand(name, sub, help=summary)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: The arguments; those of the process if ``None``.
    """
    commands = {function.__name__: function for function in _COMMANDS}
    with errors_as_sentences(PROGRAM, debug=DEBUG in (sys.argv if arguments is None else arguments)):
        parser = _parser()
        parsed = parser.parse_args(arguments)
        check_groups(parsed[parsed.subcommand], "calibration", "pruning", "pruning.limits")
        options = parser.instantiate(parsed)[parsed.subcommand]
        for name in ("config", "debug"):
            options.pop(name, None)
        commands[parsed.subcommand](**vars(options))


if __name__ == "__main__":
    main()
