"""``lit-prune plan --ratios``: plans, a table and a picture from one calibration, and more of them from its statistics."""

from __future__ import annotations

import json

import pytest
from local_assets import chains, write_model, write_text

from lit_prune import PruningPlan, load_pruned
from lit_prune.cli import main


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


def test_plans_for_several_ratios_and_more_from_the_statistics(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", chains(60))
    small = [f"--calibration.text={text}", "--calibration.batches=4", "--calibration.block_size=16"]
    out, more = tmp_path / "out", tmp_path / "more"
    run("plan", model, out, *small, "--ratios", "0.3", "0.1", "0.2")
    assert {p.name for p in out.iterdir()} == {
        *(f"plan-{r}.json" for r in ("0.1", "0.2", "0.3")),
        "ratios.json",
        "ratios.png",
        "statistics.safetensors",
    }
    rows = json.loads((out / "ratios.json").read_text())
    assert [row["ratio"] for row in rows] == [0.1, 0.2, 0.3]
    for row in rows:
        plan = PruningPlan.load(out / f"plan-{row['ratio']:g}.json")
        assert plan.info["parameters_after"] == row["parameters"] and 0 < row["importance_removed"] < 1
        assert row["ratio"] - 0.02 < row["removed"] <= row["ratio"]
        assert row["masked_loss"] > 0
    # the text is not there any more: nothing is calibrated
    text.unlink()
    run("plan", model, more, *small, "--statistics", out / "statistics.safetensors", "--ratios", "0.2", "0.25")
    again = json.loads((more / "ratios.json").read_text())
    assert [row["ratio"] for row in again] == [0.2, 0.25] and "masked_loss" not in again[0]
    assert (more / "plan-0.2.json").read_text() == (out / "plan-0.2.json").read_text()
    run("plan", model, tmp_path / "one", "--statistics", out / "statistics.safetensors", "--pruning.pruning_ratio=0.2")
    assert (tmp_path / "one" / "plan-0.2.json").read_text() == (out / "plan-0.2.json").read_text()
    write_text(text, chains(60))
    run("apply", model, tmp_path / "pruned", *small, "--plan", out / "plan-0.2.json")
    assert sum(p.numel() for p in load_pruned(tmp_path / "pruned").parameters()) == rows[1]["parameters"]
    capsys.readouterr()
    other = write_model(tmp_path / "other", num_hidden_layers=2)
    for arguments, words in (
        ([other, more, "--statistics", out / "statistics.safetensors"], "the model has 4"),
        ([model, more, "--statistics", out / "ratios.png"], "is damaged"),
        ([model, more, "--statistics", tmp_path / "absent"], "There is no file"),
        (
            [model, more, "--statistics", out / "statistics.safetensors", "--pruning.importance=wanda"],
            "holds nothing for",
        ),
        (
            [model, more, *small, "--ratios", "0.1", "2"],
            "ratios must be at least one number, each strictly between 0 and 1",
        ),
        ([model, more, *small, "--ratios", "many"], "ratios"),
        ([model, more, *small, "--ratios", "0.1", "0.99"], "The budget asks"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("plan", *arguments)
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said and ended.value.code in (1, 2), said
