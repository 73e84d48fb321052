"""Parses the arguments of one command and runs it; a mistake ends in one sentence."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lit_prune.cli import COMMANDS, DEBUG, PROGRAM
from lit_prune.extras import missing
from lit_prune.user_errors import DEBUG_HELP, check_groups, errors_as_sentences

try:
    from jsonargparse import ArgumentParser
except ImportError as error:
    raise missing("jsonargparse", "cli", PROGRAM) from error

_MARKUP = re.compile(r"(?::\w+:`|``)([^`]+)``?")
_EXAMPLES = {
    "plan": "lit-prune plan ./model ./plan --calibration.text notes.txt --pruning.pruning_ratio 0.2",
    "apply": "lit-prune apply ./model ./pruned --calibration.text notes.txt --pruning.pruning_ratio 0.2",
    "convert": "lit-prune convert last.ckpt ./model ./pruned",
    "export": "lit-prune export ./pruned pruned.gguf --dtype q8_0",
    "report": "lit-prune report ./pruned/pruning",
    "compare": "lit-prune compare ./model ./pruned --calibration.text notes.txt",
    "evaluate": "lit-prune evaluate ./pruned --tasks arc_easy,hellaswag",
}
# of options that are a list, by command
_LISTS = {"plan": {"ratios": float}}


def function_of(name: str) -> Callable[..., None]:
    """The function of a command."""
    return getattr(importlib.import_module(f"lit_prune.cli.{COMMANDS[name][0]}"), name)


def parser_of(name: str) -> ArgumentParser:
    """The parser of a command; what it says comes from the docstring and types of the command's function."""
    function = function_of(name)
    parameters = inspect.signature(function).parameters
    pruned = "pruning" in parameters
    known = f" Criteria: {', '.join(_criteria())}." if pruned else ""
    parser = ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=COMMANDS[name][1],
        epilog=f"Example: {_EXAMPLES[name]}.{known}",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)
    if name == "compare":
        parser.add_argument(
            "models", nargs="+", type=str, help="Two or more different models; the last is compared with the first."
        )
    for option, kind in _LISTS.get(name, {}).items():
        parser.add_argument(f"--{option}", nargs="+", type=kind, help=_described(function, option))
    skipped: set[str | int] = {"models", "pruning", *_LISTS.get(name, ())}
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True, skip=skipped)
    if pruned:
        # stages of a schedule are the callback's
        parser.add_class_arguments(_configuration(), "pruning", skip={"reference", "budget_share"}, sub_configs=True)
    for action in parser._actions:
        action.help = _MARKUP.sub(r"\1", action.help or "")
    return parser


def _described(function: Callable[..., None], option: str) -> str:
    """What a docstring says of an argument."""
    text = inspect.getdoc(function) or ""
    found = re.search(rf"^    {option}: (.*(?:\n        .*)*)", text, re.MULTILINE)
    assert found is not None
    return " ".join(found.group(1).split())


def _criteria() -> tuple[str, ...]:
    return importlib.import_module("lit_prune.ranking.registry").criteria()


def _configuration() -> type[Any]:
    return importlib.import_module("lit_prune.config").PruningConfig


@contextlib.contextmanager
def _one_bar() -> Iterator[None]:
    """Keep the bars of transformers and datasets from being shown beside that of the command."""
    logging = importlib.import_module("transformers.utils.logging")
    datasets = importlib.import_module("datasets") if "datasets" in sys.modules else None
    before = logging.is_progress_bar_enabled(), datasets is not None and datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if datasets is not None:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before[0]:
            logging.enable_progress_bar()
        if datasets is not None and not before[1]:
            datasets.enable_progress_bars()


def run(name: str, arguments: list[str], *, debug: bool) -> None:
    """Run a command.

    Args:
        name: Its name.
        arguments: Its own arguments.
        debug: Let errors pass, for their tracebacks.
    """
    with errors_as_sentences(PROGRAM, debug=debug):
        if name == "evaluate":
            # the arguments are those of another program
            function_of(name)(arguments)
            return
        parser = parser_of(name)
        parsed: Any = parser.parse_args(arguments)
        check_groups(parsed, "calibration", "pruning", "pruning.limits")
        options = parser.instantiate(parsed)
        for option in ("config", "debug"):
            options.pop(option, None)
        with _one_bar():
            function_of(name)(**vars(options))
