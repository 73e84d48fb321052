"""Prune a model from the command line, convert, export, evaluate and look at it, with no training to run."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

from lit_prune.extras import MissingPackageError
from lit_prune.version import __version__

PROGRAM = "lit-prune"
DEBUG = "--debug"
# by command, the module of its function and what --help says of it; a test compares this with the functions' docstrings
COMMANDS = {
    "plan": (
        "deciding",
        "Decide what to cut, and save no model: writes the plan, the group table, pictures and a page to look at.",
    ),
    "apply": ("pruning", "Prune a model in one shot and save it, with its tokenizer, a card and a report."),
    "convert": ("files", "Turn a Lightning checkpoint of a run that pruned into a folder that transformers loads."),
    "export": ("files", "Write a pruned model as a GGUF file for llama.cpp."),
    "report": ("files", "Draw the pictures and the page of a report anew from the files in its folder."),
    "compare": (
        "comparing",
        "Measure models side by side, taking turns: parameters, size, quality on held-out inputs, speed and memory.",
    ),
    "evaluate": ("evaluating", "Run lm-evaluation-harness on a pruned model."),
}


class _Usage(Exception):
    """The arguments name no command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Usage(message)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the command, and its own arguments. Help and version are printed here, with no import of what is heavy."""
    parser = _Parser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(DEBUG, action="store_true", help="Show the traceback of an error.")
    commands = parser.add_subparsers(required=True, dest="subcommand", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    first = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    parser.parse_args(arguments[: first + 1])
    return arguments[first], arguments[first + 1 :]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: The arguments; those of the process if ``None``.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        name, own = _command(given)
    except _Usage as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        running = importlib.import_module(f"{__name__}.running")
    except MissingPackageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    running.run(name, own, debug=DEBUG in given)


if __name__ == "__main__":
    main()
