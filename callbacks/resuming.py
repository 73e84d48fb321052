"""What a resumed run has behind it: the schedule of a callback against the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lit_prune.callbacks.schedule import Stage
from lit_prune.errors import PlanError
from lit_prune.ranking.selection import parameter_budget


def schedule_state(stages: Sequence[Stage], ratio_of: str, reached: int, budget: object) -> dict[str, Any]:
    """The part of a pruning callback's state that says how far its schedule has come, as plain data.

    Args:
        stages: The schedule.
        ratio_of: What its ratios are of.
        reached: Parameters that the stages done were to remove from the model that the run began with.
        budget: The budget in place of a ratio, ``None`` without one.
    """
    asked = None if budget is None else str(budget)
    return {"stages": [asdict(stage) for stage in stages], "ratio_of": ratio_of, "reached": reached, "budget": asked}


def stages_behind(stages: Sequence[Stage], ratio_of: str, state: Mapping[str, Any]) -> int:
    """How many stages of a schedule are done, as a checkpoint says.

    A schedule that begins with the stages that are done goes on behind them. In any other one, those that ask for no more
    than is gone already are done, and the next one prunes on from there, whatever epoch or step it names.

    Args:
        stages: The schedule of the run that resumes.
        ratio_of: What its ratios are of.
        state: The state of the pruning callback in the checkpoint.
    """
    done, gone = state["stages_done"], budget_reached(state)
    saved = state["stages"][:done] if "stages" in state else None
    if not gone:
        return min(done, len(stages))
    if saved and saved == [asdict(stage) for stage in stages[:done]] and ratio_of == state["ratio_of"]:
        return done
    budgets = [parameter_budget(stage.ratio, ratio_of, *state["reference"]) for stage in stages]
    if saved is None and 0 < done <= len(budgets) and budgets[done - 1] == gone:
        return done
    return sum(budget <= gone for budget in budgets)


def budget_reached(state: Mapping[str, Any]) -> int:
    """Parameters that the stages done were to remove; 0 where none is, or a checkpoint of an older version does not say."""
    if "reached" in state:
        return state["reached"]
    info = (state["plan"] or {}).get("info", {})
    if state["reference"] is None or not {"pruning_ratio", "ratio_of"} <= info.keys():
        return 0
    return parameter_budget(info["pruning_ratio"], info["ratio_of"], *state["reference"])


def check_goes_on(stages: Sequence[Stage], ratio_of: str, state: Mapping[str, Any], budget: object) -> None:
    """Refuse to resume with a schedule that asks for less than is gone already, or with another budget.

    Raises:
        PlanError: Naming both ratios, or both budgets.
    """
    gone, saved = budget_reached(state), state.get("budget")
    asked = None if budget is None else str(budget)
    if gone and asked != saved:
        raise PlanError(
            f"The checkpoint's model was pruned to the budget {saved}, and the callback's is {asked}: a budget is reached at one"
            " point of a run. Resume with the same one, or begin a run from the pruned model."
        )
    if asked is not None or not gone or parameter_budget(stages[-1].ratio, ratio_of, *state["reference"]) >= gone:
        return
    whole = state["reference"][0 if ratio_of == "all" else 1]
    raise PlanError(
        f"The checkpoint's model was pruned to a ratio of {gone / whole:.4g} of {ratio_of} parameters, and the schedule"
        f" ends at {stages[-1].ratio:.4g}: what is gone does not come back. Resume with a ratio of {gone / whole:.4g} or more,"
        " or from a checkpoint that was written before."
    )
