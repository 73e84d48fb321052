"""The command ``evaluate``."""

from __future__ import annotations

import sys

from lit_prune.errors import ArgumentValueError
from lit_prune.evaluate import run_harness

USAGE = """usage: lit-prune evaluate MODEL --tasks TASKS [OPTION ...]

Run lm-evaluation-harness on a pruned model, or any other: what follows MODEL is for `lm-eval run`.

positional arguments:
  MODEL          A folder that apply, convert or save_pruned wrote, or a hub name.

options:
  --model_args   More arguments of the model class, dtype=bfloat16 for instance.
  --model        The harness's model class; hf if not given.
  The rest       See `lm-eval run --help`.

Example: lit-prune evaluate ./pruned --tasks arc_easy,hellaswag.
"""


def evaluate(arguments: list[str]) -> None:
    """Run lm-evaluation-harness on a pruned model.

    Args:
        arguments: The model, and arguments of ``lm-eval run``.

    Raises:
        ArgumentValueError: If no model is named.
        PruningError: If the harness is not installed.
    """
    arguments = [argument for argument in arguments if argument != "--debug"]
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ArgumentValueError("the following arguments are required: MODEL, before the options of the harness")
    run_harness(arguments[0], arguments[1:])
