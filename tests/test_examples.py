"""The examples, run as a reader runs them: under 80 lines each, with a table and a picture at the end, on data of packages."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_prune import load_pruned

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.rglob("*.py"))
# processor seconds, of both processors together: what two minutes on two busy ones leave
SECONDS = 120


def run(name: str, *arguments: str, folder: Path) -> str:
    """Run an example in a folder, and give what it printed."""
    runner = Path(__file__).with_name("example_runner.py")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MPLBACKEND": "agg", "COLUMNS": "120"}
    for place in ("DATA", "CACHE", "CONFIG"):
        environment[f"WANDB_{place}_DIR"] = str(folder / "wandb-files")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, str(runner), str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < SECONDS
    return done.stdout


def reported(folder: Path, dense_share: float) -> dict[str, dict[str, float]]:
    """The metrics of a report, whose table was printed and whose pictures are there."""
    assert {"kept.png", "scores.png", "report.html"} <= {p.name for p in folder.iterdir()}
    metrics = json.loads((folder / "report.json").read_text())
    assert metrics["pruned"]["parameters"] / metrics["dense"]["parameters"] == pytest.approx(dense_share, abs=0.05)
    return metrics


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_an_example_is_under_80_lines_and_says_how_it_is_run(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    if "__main__" in text:
        assert f"python examples/{script.relative_to(EXAMPLES).as_posix()}" in text


def test_the_sweep_is_one_by_the_rules_of_wandb():
    sweeps = pytest.importorskip("sweeps")
    sweep = yaml.safe_load((EXAMPLES / "sweep.yaml").read_text())
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    assert (EXAMPLES.parent / sweep["program"]).is_file()
    wrong = {**sweep, "method": "guess"}
    assert sweeps.schema_violations_from_proposed_config(wrong)


@pytest.mark.slow
def test_images(tmp_path):
    assert run("images.py", folder=tmp_path).count("Structured pruning") == 2
    for name in ("resnet", "vit"):
        metrics = reported(tmp_path / "outputs" / "images" / name, 0.6)
        assert metrics["recovered"]["val_accuracy"] > 0.8  # a tenth by chance


@pytest.mark.slow
def test_text(tmp_path):
    assert "Structured pruning" in run("text.py", folder=tmp_path)
    metrics = reported(tmp_path / "outputs" / "text", 0.75)
    assert metrics["dense"]["val_accuracy"] > 0.5  # a fifth by chance
    assert metrics["recovered"]["val_accuracy"] > metrics["dense"]["val_accuracy"] - 0.05


@pytest.mark.slow
def test_litgpt_pretraining(tmp_path):
    assert "Structured pruning" in run("litgpt_pretraining.py", folder=tmp_path)
    metrics = reported(tmp_path / "outputs" / "litgpt_pretraining", 0.7)
    assert metrics["recovered"]["val_loss"] < metrics["pruned"]["val_loss"]


@pytest.mark.slow
def test_the_pipeline_hands_over_the_model_artifact_that_the_first_run_logged(tmp_path):
    from test_loggers import Recorded

    assert "Structured pruning" in run("pipeline_prune.py", folder=tmp_path)
    outputs = tmp_path / "outputs" / "pipeline"
    metrics = reported(outputs, 0.6)
    assert "fine-tuned" in run("pipeline_finetune.py", folder=tmp_path)
    assert (outputs / "finetuned.png").is_file()
    first, second = (Recorded(folder) for folder in sorted((outputs / "wandb").glob("offline-run-*")))
    artifact = first.artifacts[f"pruned-model-{first.id}"]
    assert f"pruning-plan-{first.id}" in first.artifacts
    assert second.config["consumed"] == {"artifact": artifact.name, "digest": artifact.digest}
    accuracy = [row["val_accuracy"] for row in second.history if "val_accuracy" in row]
    assert accuracy[0] == pytest.approx(metrics["recovered"]["val_accuracy"])
    assert accuracy[-1] >= accuracy[0]
    assert load_pruned(outputs / "finetuned").num_parameters() == metrics["recovered"]["parameters"]
    # another model in its place is refused
    (outputs / "model" / "config.json").write_text("{}")
    with pytest.raises(AssertionError, match="has changed since"):
        run("pipeline_finetune.py", folder=tmp_path)


@pytest.mark.slow
def test_two_points_of_the_sweep(tmp_path):
    printed = run("sweep_local.py", "2", folder=tmp_path)
    assert "val_accuracy" in printed and (tmp_path / "outputs" / "sweep" / "sweep.png").is_file()
    points = [json.loads(p.read_text()) for p in (tmp_path / "outputs" / "sweep").rglob("point.json")]
    assert len({(p["importance"], p["pruning_ratio"]) for p in points}) == 2


@pytest.mark.slow
def test_hydra_builds_the_callback_from_its_target(tmp_path):
    printed = run("hydra_template/src/train.py", "callbacks.pruning.pruning_ratio=0.6", folder=tmp_path)
    assert "Structured pruning" in printed
    reported(tmp_path / "outputs" / "hydra", 0.4)
