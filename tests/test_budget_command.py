"""``--budget`` on the command line, and the page and files of what it came to."""

from __future__ import annotations

import json

import pytest
from local_assets import chains, write_model, write_text

from lit_prune.cli import main
from lit_prune.errors import PruningError
from lit_prune.io.loading import load_pruned
from lit_prune.plan import PruningPlan
from lit_prune.reporting.budgets import budget_numbers, budget_rows, budgets_of


@pytest.fixture
def text(tmp_path) -> list[str]:
    file = write_text(tmp_path / "text.txt", chains(60))
    return [f"--calibration.text={file}", "--calibration.batches=4", "--calibration.block_size=16", "--device=cpu"]


def test_a_plan_and_a_model_are_made_to_a_budget(tmp_path, text, capsys):
    model = str(write_model(tmp_path / "model", intermediate_size=48))
    budget = "--budget=flops=1.2x,memory=0.9,length=16"
    main(["plan", model, str(tmp_path / "plan"), *text, budget])
    limits = json.loads((tmp_path / "plan" / "budgets.json").read_text())
    assert [row["name"] for row in limits] == ["flops", "memory"]
    assert all(row["measured"] == row["predicted"] <= row["target"] for row in limits)
    assert (tmp_path / "plan" / "trade_off.png").exists() and "1.2x" in capsys.readouterr().out
    main(["apply", model, str(tmp_path / "pruned"), *text, "--pruning.budget=params=0.8"])
    (row,) = json.loads((tmp_path / "pruned" / "pruning" / "budgets.json").read_text())
    parameters = sum(p.numel() for p in load_pruned(tmp_path / "pruned").parameters())
    assert row["measured"] == row["predicted"] == parameters <= 0.8 * row["dense"]
    assert PruningPlan.load(tmp_path / "pruned" / "pruning" / "plan.json").info["budgets"] == [row]


GOOD = {"name": "params", "asked": "0.8", "dense": 100, "target": 80, "predicted": 79.5, "measured": 79}
MALFORMED = [
    3,
    "params",
    None,
    GOOD,
    [3],
    ["params"],
    [None],
    [[GOOD]],
    [{}],
    [{"name": "params"}],
    *([{k: v for k, v in GOOD.items() if k != key}] for key in GOOD if key != "measured"),
    *([{**GOOD, "name": name}] for name in ("speed", "", 3, None, ["params"])),
    *([{**GOOD, "asked": asked}] for asked in (0.8, None, {})),
    *([{**GOOD, "dense": dense}] for dense in ("100", None, 0, -1, True, float("nan"), float("inf"), 10**400, [1])),
    *([{**GOOD, "measured": measured}] for measured in ("79", 0, False, float("-inf"))),
]


@pytest.mark.parametrize("budgets", MALFORMED)
def test_what_is_malformed_of_a_plans_limits_is_passed_over(tmp_path, budgets):
    plan = PruningPlan((), info={"budgets": budgets})
    assert budgets_of(plan) == [] and budget_rows(plan) == [] and budget_numbers(plan) == {}
    if isinstance(budgets, list):
        plan = PruningPlan((), info={"budgets": [*budgets, {**GOOD, "measured": None}, GOOD]})
        assert budgets_of(plan) == [{**GOOD, "measured": None}, GOOD]
        assert [row[4] for row in budget_rows(plan)] == ["measured", "", "79"]
        assert budget_numbers(plan)["pruning/budget/params/measured"] == 79


def test_a_plan_with_malformed_limits_is_applied(tmp_path, text):
    model = str(write_model(tmp_path / "model", intermediate_size=48))
    main(["plan", model, str(tmp_path / "plan"), *text, "--budget=params=0.8"])
    data = json.loads((tmp_path / "plan" / "plan.json").read_text())
    data["info"] |= {"budgets": [{"name": "params"}, 3], "parameters_before": "many", "importance": None}
    (tmp_path / "edited.json").write_text(json.dumps(data))
    main(["apply", model, str(tmp_path / "out"), *text, f"--plan={tmp_path / 'edited.json'}"])
    assert not (tmp_path / "out" / "pruning" / "budgets.json").exists()
    assert load_pruned(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "said"),
    [("speed=2x", "speed"), ("params=0.01", "floors allow"), ("memory=0.8,length=1000000", "positions")],
)
def test_budgets_that_cannot_be_are_said_in_a_sentence(tmp_path, text, capsys, given, said):
    model = str(write_model(tmp_path / "model", intermediate_size=48))
    with pytest.raises((SystemExit, PruningError)):
        main(["plan", model, str(tmp_path / "plan"), *text, f"--budget={given}"])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plan" / "plan.json").exists()
