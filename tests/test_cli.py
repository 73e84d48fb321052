"""train.py as a user runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from local_assets import chains, write_model, write_text

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def train(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_help_explains_every_option_of_callback_module_data_and_trainer(tmp_path):
    done = train("fit", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "--pruning.pruning_ratio",
        "Fraction of parameters to remove",
        "--model.learning_rate",
        "Peak learning rate",
        "--data.block_size",
        "Tokens of a block",
        "--trainer.max_epochs",
    ):
        assert words in done.stdout


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_every_config_is_valid(tmp_path, config):
    done = train("fit", "--config", config, "--print_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["pruning"]["pruning_ratio"] > 0


def test_the_quickstart_runs_shrunken_on_a_tiny_model(tmp_path):
    model = write_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", chains(60))
    done = train(
        "fit",
        "--config",
        ROOT / "configs" / "quickstart.yaml",
        "--model.model",
        model,
        "--data.tokenizer",
        model,
        "--data.dataset",
        text,
        "--data.block_size",
        16,
        "--pruning.calibration_batches",
        2,
        "--trainer.max_steps",
        4,
        "--trainer.val_check_interval",
        4,
        "--trainer.limit_val_batches",
        2,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "outputs" / "quickstart"
    figures = json.loads((out / "report.json").read_text())
    ratio = 1 - figures["healed"]["parameters"] / figures["dense"]["parameters"]
    assert 0.19 < ratio <= 0.2
    assert {"plan.json", "group_table.csv", "kept.png", "model"} <= {p.name for p in out.iterdir()}
    assert "val_perplexity" in done.stdout


def test_an_unknown_criterion_is_an_error_that_lists_the_known(tmp_path):
    done = train(
        "fit", "--config", ROOT / "configs" / "quickstart.yaml", "--pruning.importance", "tailor", cwd=tmp_path
    )
    assert done.returncode != 0
    assert "known are taylor, taylor_2nd" in done.stderr
