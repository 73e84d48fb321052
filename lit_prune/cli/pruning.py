"""The command ``apply``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from lit_prune.calibration_input import Calibration
from lit_prune.cli.printing import print_report
from lit_prune.config import PruningConfig
from lit_prune.errors import ArgumentValueError
from lit_prune.group_data import kept_group_sets
from lit_prune.io.huggingface import to_pretrained, write_pruned
from lit_prune.io.module_folder import check_saveable, write_module
from lit_prune.io.output_folder import check_replaceable, replacing_folder
from lit_prune.plan import PruningPlan, get_plan
from lit_prune.reporting.page import write_report
from lit_prune.session import Session

REPORT = "pruning"
DEFAULT_CALIBRATION = Calibration()
DEFAULT_PRUNING = PruningConfig()


def apply(
    model: str,
    output: Path,
    plan: Path | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
    pruning: PruningConfig = DEFAULT_PRUNING,
    budget: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    self_contained: bool = False,
) -> None:
    """Prune a model in one shot and save it, with its tokenizer, a card and a report.

    Args:
        model: A directory in Hugging Face format, a hub name, a GGUF file, or package:NAME for a GGUF file inside an
            installed package.
        output: Folder of the pruned model; the report goes to its subfolder "pruning".
        plan: A plan to apply, as the command plan writes it, or edited by hand. One is made if none is given. Repair runs
            in either case; --pruning.repair null skips it.
        calibration: The calibration text or images.
        pruning: How to prune; with a plan, only repair counts.
        budget: What the pruned model may take at most, in place of a ratio, as text; short for --pruning.budget. For instance
            latency=1.5x,memory=6GB,length=2048.
        device: Where to compute, cpu or cuda:0 for instance; auto takes the first GPU if there is one.
        dtype: Data type of the weights; auto takes that of the files.
        self_contained: Write the modelling code beside the weights, so that transformers loads the model with
            trust_remote_code=True where lit_prune is not installed.
    """
    check_replaceable(output, [model])
    pruning = pruning if budget is None else replace(pruning, budget=budget)
    given = None if plan is None else PruningPlan.load(plan)
    blocks = pruning.limits.blocks if given is None else bool(given.blocks)
    hidden = pruning.limits.hidden if given is None else given.hidden
    session = Session(model, calibration, device, dtype, blocks=blocks, hidden=hidden)
    if given is not None:
        given.validate(session.group_sets)
        given.check_rotation(session.model)
    if self_contained and kept_group_sets(session.model) is not None:
        raise ArgumentValueError(
            f"The groups of {type(session.model).__name__} were found by running it, and its config cannot say how it was"
            " cut. Leave --self_contained out; lit_prune.load_pruned(folder, model=...) loads it."
        )
    work = session.pruning(pruning) if given is None else session.cutting(pruning)
    table = None
    with session.tracked(session.measuring, *work, session.measuring):
        metrics = {"dense": session.metrics()}
        if given is None:
            table, _ = session.prune(pruning)
        else:
            session.cut(given, pruning)
        metrics["pruned"] = session.metrics()
    costs = session.costs.numbers()
    cut = get_plan(session.model)
    assert cut is not None
    traced = cut.groups is not None
    if traced:
        check_saveable(session.model)
    whole = session.model if traced else to_pretrained(session.model, self_contained=self_contained)
    with replacing_folder(output, [model]) as temporary:
        if traced:
            write_module(whole, temporary, tokenizer=session.processor, metrics=metrics)
        else:
            write_pruned(whole, temporary, session.processor, metrics=metrics, self_contained=self_contained)
        write_report(temporary / REPORT, metrics, cut, table, costs=costs)
    print_report(metrics, cut, output, costs)
