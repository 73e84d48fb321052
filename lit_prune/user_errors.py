"""What the command lines share: a mistake of the user ends in one sentence, one of the program in its traceback."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lit_prune.arguments import shown
from lit_prune.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, PruningError
from lit_prune.modeling_pruned import PrunedModelError
from lit_prune.text_escape import one_line

DEBUG = "--debug"
DEBUG_HELP = "Show the traceback of an error."
_MISTAKES = (PruningError, PrunedModelError, OSError, pickle.UnpicklingError)


@contextlib.contextmanager
def errors_as_sentences(program: str, *, debug: bool) -> Iterator[None]:
    """End the process with one sentence at an error that lit_prune, the parser or the system raises on purpose.

    The exit code is 2 for a wrong argument and 1 for anything else. Other exceptions are faults of the program and pass.

    Args:
        program: Name of the program, with which the sentence begins.
        debug: Let every exception pass, for its traceback.
    """
    try:
        yield
    except Exception as error:
        # all are looked at, and those that are no user's mistake go on
        usage = isinstance(error, (ArgumentError, argparse.ArgumentError)) or _of_parser(error)
        if debug or not (usage or isinstance(error, _MISTAKES)):
            raise
        print(f"{program}: error: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(2 if usage else 1) from error


def _of_parser(error: Exception) -> bool:
    """Whether the parser raised it, while it made the objects that a configuration asks for."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return isinstance(error, (TypeError, ValueError)) and module.partition(".")[0] == "jsonargparse"


def check_groups(options: Mapping[str, Any], *names: str) -> None:
    """Refuse a configuration where something else stands for a group of options, which the parser passes over.

    Args:
        options: The parsed options.
        names: Names of the groups; ``"pruning.limits"`` is the group ``limits`` in that of ``pruning``.

    Raises:
        ArgumentTypeError: If a group is not one.
    """
    for name in names:
        found = options.get(name)
        if name in options and not isinstance(found, (Mapping, argparse.Namespace)):
            raise ArgumentTypeError(
                f"{name} must be a mapping of options; found {shown(found)} ({type(found).__name__})."
            )


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return one_line(": ".join(map(str, (error.strerror, *filter(None, (error.filename, error.filename2))))) + ".")
    text = str(error).strip() or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        return "A checkpoint is damaged, or holds more than plain data."
    if isinstance(error, argparse.ArgumentError) or _of_parser(error):
        # the parser names types as Python shows them
        text = " ".join(re.sub(r"<class '([^']*)'>|\b(?:typing|collections\.abc)\.", r"\1", text).split())
        text = text.replace("collections.abc.", "")
    return one_line(text)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a reader of another package raises into one error that names the file.

    Args:
        what: What is read, as it begins the sentence "... cannot be read".

    Raises:
        ArgumentValueError: If it cannot be read.
    """
    try:
        yield
    except (PruningError, PrunedModelError, OSError, MemoryError):
        raise
    except Exception as error:
        # readers of other packages raise what they like: KeyError, RuntimeError, errors of their own
        cause = error.__cause__ or error
        why = one_line(str(cause).strip().partition("\n")[0])
        raise ArgumentValueError(f"{what} cannot be read: {type(cause).__name__}{f': {why}' if why else ''}") from error
