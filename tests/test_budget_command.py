"""``--budget`` on the command line, and the page and files of what it came to."""

from __future__ import annotations

import json

import pytest
from local_assets import chains, write_model, write_text

from lit_prune.cli import main
from lit_prune.errors import PruningError
from lit_prune.io.loading import load_pruned
from lit_prune.plan import PruningPlan


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
