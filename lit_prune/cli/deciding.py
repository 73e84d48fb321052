"""The command ``plan``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lit_prune._files import check_writable
from lit_prune.calibration.statistics import Statistics
from lit_prune.calibration_input import Calibration
from lit_prune.cli.printing import print_report, say
from lit_prune.config import PruningConfig
from lit_prune.progress import Work
from lit_prune.ratios import RATIOS, checked_ratios, plan_ratios
from lit_prune.reporting.page import write_report
from lit_prune.reporting.ratios import ratio_table, write_ratios
from lit_prune.session import COMPARING, Session

DEFAULT_CALIBRATION = Calibration()
DEFAULT_PRUNING = PruningConfig()
STATISTICS = "statistics.safetensors"


def plan(
    model: str,
    output: Path,
    calibration: Calibration = DEFAULT_CALIBRATION,
    pruning: PruningConfig = DEFAULT_PRUNING,
    budget: str | None = None,
    ratios: list[float] | None = None,
    statistics: Path | None = None,
    save_statistics: bool = True,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Decide what to cut, and save no model: writes the plan, the group table, pictures and a page to look at.

    Args:
        model: A directory in Hugging Face format, a hub name, a GGUF file, or package:NAME for a GGUF file inside an
            installed package.
        output: Folder to write to.
        calibration: The calibration text or images.
        pruning: Options of a pruning: criterion, ratio, limits and repair.
        budget: What the pruned model may take at most, in place of a ratio, as text; short for --pruning.budget. For instance
            latency=1.5x,memory=6GB,length=2048.
        ratios: Several ratios: a plan for each from one calibration, as with --pruning.iterations 1, with a table and a
            picture of them.
        statistics: A file of statistics that this command wrote with --ratios; nothing is calibrated or measured.
        save_statistics: Whether --ratios writes the statistics, for --statistics.
        device: Where to compute, cpu or cuda:0 for instance; auto takes the first GPU if there is one.
        dtype: Data type of the weights; auto takes that of the files.
    """
    check_writable(output)
    pruning = pruning if budget is None else replace(pruning, budget=budget)
    if ratios is not None:
        RATIOS.check("ratios", ratios)
    limits, inputs = pruning.limits, None if statistics is not None else calibration
    session = Session(model, inputs, device, dtype, blocks=limits.blocks, hidden=limits.hidden)
    if ratios is None and statistics is None:
        with session.tracked(session.measuring, *session.pruning(pruning)):
            dense = session.metrics()
            table, made = session.prune(pruning)
        metrics = {"dense": dense, "planned": {"parameters": float(made.info["parameters_after"])}}
        costs = session.costs.numbers()
        write_report(output, metrics, made, table, costs=costs)
        print_report(metrics, made, output, costs)
        return
    _plan_ratios(session, output, pruning, ratios or [pruning.pruning_ratio], statistics, save=save_statistics)


def _plan_ratios(
    session: Session, output: Path, pruning: PruningConfig, ratios: list[float], file: Path | None, *, save: bool
) -> None:
    """Plan for every ratio from statistics that are on disk, or collected once."""
    checked_ratios(session.model, session.group_sets, pruning, ratios)
    measure: Any = session.masked_loss if session.held_out else None
    count = len(session.held_out) * (len(set(ratios)) + 1)
    work = [] if file is not None else [*session.calibrating(pruning), *[Work(COMPARING, count, count)] * bool(count)]
    with session.tracked(*work):
        if file is not None:
            collected = Statistics.load(file, session.model, session.group_sets, pruning.terms)
            collected.unexplained = collected.unexplained if pruning.compensates else {}
        else:
            collected = session.statistics(pruning)
            if save:
                collected.save(output / STATISTICS, session.model, session.group_sets)
        plans = plan_ratios(session.model, session.group_sets, collected, pruning, ratios, measure=measure)
    dense = int(plans[0].plan.info["parameters_before"])
    write_ratios(output, plans, dense)
    Console().print(ratio_table(plans, dense))
    say(f"Written to {output}")
