"""Runs lm-evaluation-harness with the model type of pruned models known to transformers.

python -m lit_prune.evaluate --model hf --model_args pretrained=FOLDER --tasks TASKS

takes the arguments of ``lm-eval`` as they are.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_prune.errors import ArgumentValueError, PruningError

MODEL, MODEL_ARGS = ("--model", "-M"), ("--model_args", "-a")


def run_harness(model: str, options: Sequence[str]) -> None:
    """Run ``lm-eval run`` on a model.

    Args:
        model: A folder in Hugging Face format, of a pruned model for instance, or a hub name.
        options: Options of ``lm-eval run``.

    Raises:
        ArgumentValueError: If an option names another model.
        PruningError: If lm-evaluation-harness is not installed, or there is no config in the folder.
    """
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise PruningError(f"{model} holds no config.json; expected a folder that apply, convert or save_pruned wrote.")
    given, rest = _taken(options, MODEL_ARGS)
    if any(part.strip().startswith("pretrained=") for part in given.split(",")):
        raise ArgumentValueError(
            f"--model_args names a model by pretrained=, and {model!r} is named before it. Leave one out."
        )
    harness, rest = _taken(rest, MODEL)
    arguments = ["--model", harness or "hf", "--model_args", ",".join(filter(None, [f"pretrained={model}", given]))]
    main(["run", *arguments, *rest])


def _taken(options: Sequence[str], names: Sequence[str]) -> tuple[str, list[str]]:
    """The value of an option, and the options without it."""
    rest = list(options)
    for position, option in enumerate(rest):
        name, equals, value = option.partition("=")
        if name in names:
            taken = value if equals else " ".join(rest[position + 1 : position + 2])
            del rest[position : position + (1 if equals else 2)]
            return taken, rest
    return "", rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of lm-evaluation-harness in this process, where ``import lit_prune`` has been done.

    Args:
        arguments: Its arguments; those of the process if ``None``.

    Raises:
        PruningError: If it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PruningError("lm-evaluation-harness is not installed: pip install 'lit_prune[eval]'.")
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
