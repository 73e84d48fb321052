"""The command ``compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from lit_prune._files import check_writable, write_text
from lit_prune.architectures.positions import token_positions
from lit_prune.arguments import NATURAL, optional
from lit_prune.calibration_input import Calibration
from lit_prune.errors import ArgumentValueError
from lit_prune.io.sources import CAUSAL
from lit_prune.objectives import forward_inputs
from lit_prune.progress import Progress, Work
from lit_prune.reporting.latency import DECODED, REPEATS, generation_costs, run_costs
from lit_prune.reporting.page import report_table
from lit_prune.session import Session

DEFAULT_CALIBRATION = Calibration()
DEFAULT_TOKENS = 512


def compare(
    models: list[str],
    calibration: Calibration = DEFAULT_CALIBRATION,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    speed_tokens: int | None = None,
    output: Path | None = None,
) -> None:
    """Measure models side by side, taking turns: parameters, size, quality on held-out inputs, speed and memory.

    Args:
        models: Two or more different models, each a directory, hub name, GGUF file or package:NAME; the last is compared with
            the first.
        calibration: The text or images; the held-out ones are what quality is measured on.
        device: Where to compute, cpu or cuda:0 for instance; auto takes the first GPU if there is one.
        dtype: Data type of the weights; auto takes that of the files.
        speed_tokens: Tokens of the prompt that speed and memory are measured on, for other models than causal language models
            a held-out input; 0 measures neither. Every model needs positions for these and for 16 tokens that are generated.
            By default 512, or as many as all models have positions for.
        output: JSON file to write the metrics to.

    Raises:
        ArgumentValueError: If fewer than two models are named, one is named twice, or one has too few positions.
    """
    if len(set(models)) < max(2, len(models)):
        raise ArgumentValueError(f"models must be two or more, each named once; found {', '.join(models)}.")
    speed_tokens = optional(NATURAL).check("speed_tokens", speed_tokens)
    if output is not None:
        check_writable(output, file=True)
    sessions: dict[str, Session] = {}
    for name in models:
        sessions[name] = Session(name, calibration, device, dtype, like=next(iter(sessions.values()), None))
    first = next(iter(sessions.values()))
    speed_tokens = _prompt(sessions, speed_tokens)
    speed = Work("speed", len(sessions) * (REPEATS + 1), len(sessions) * (REPEATS + 1)) if speed_tokens else None
    work = [*(s.measuring for s in sessions.values()), *([speed] if speed else [])]
    with Progress(lambda _: work, title="Comparing") as progress:
        progress.known(1)
        metrics = {}
        for name, session in sessions.items():
            session.progress = progress
            metrics[name] = session.metrics()
        if speed is not None:
            with progress.phase("speed"):
                for name, values in _speed(sessions, first, speed_tokens, progress).items():
                    metrics[name] |= values
    Console().print(report_table(metrics))
    if output is not None:
        write_text(output, json.dumps(metrics, indent=1) + "\n")


def _prompt(sessions: dict[str, Session], asked: int | None) -> int:
    """Tokens of the prompt that speed is measured on: as many as were asked for, or as all models have positions for.

    Raises:
        ArgumentValueError: If a model has too few positions.
    """
    wanted = DEFAULT_TOKENS if asked is None else asked
    if not wanted or not _generate(sessions):
        return wanted
    found = {name: token_positions(s.model, s.model.config.get_text_config()) for name, s in sessions.items()}
    # some configs say 0 or -1 of positions without an end
    name, most = min(
        ((name, positions) for name, positions in found.items() if positions is not None and positions > 0),
        key=lambda one: one[1],
        default=("", wanted + DECODED),
    )
    room = most - DECODED
    if room < (1 if asked is None else wanted):
        raise ArgumentValueError(
            f"speed_tokens={wanted} and {DECODED} generated tokens take {wanted + DECODED} positions, and {name} has {most}."
            f" Set --speed_tokens to {f'{room} or less' if room > 0 else '0, which measures no speed'}."
        )
    return min(wanted, room)


def _generate(sessions: dict[str, Session]) -> bool:
    return all(session.auto_class == CAUSAL for session in sessions.values())


def _speed(
    sessions: dict[str, Session], first: Session, speed_tokens: int, progress: Progress
) -> dict[str, dict[str, float]]:
    models: dict[str, Any] = {name: session.model for name, session in sessions.items()}
    if _generate(sessions):
        generator = torch.Generator().manual_seed(0)
        size = min(model.get_input_embeddings().num_embeddings for model in models.values())
        ids = torch.randint(0, size, (1, speed_tokens), generator=generator).to(first.device)
        return generation_costs(models, ids, done=progress.batch_done)
    inputs = {name: forward_inputs((session.held_out or session.batches)[0]) for name, session in sessions.items()}
    return run_costs(models, inputs, done=progress.batch_done)
