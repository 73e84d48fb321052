"""lm-evaluation-harness on pruned folders, on a task of a local file, without a network."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_assets import chains, write_model

import lit_prune
from lit_prune.cli import main
from lit_prune.errors import ArgumentValueError, PruningError
from lit_prune.evaluate import run_harness
from lit_prune.io.sources import load_tokenizer

TASK = """\
task: chains
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Pruned folders, with and without code of their own, and a task."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = lit_prune.io.sources.load_model(str(write_model(folder / "dense")))
    tokenizer = load_tokenizer(str(folder / "dense"))
    ids = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    config = lit_prune.PruningConfig("taylor", pruning_ratio=0.2, iterations=1)
    lit_prune.prune(model, [ids], lambda b: model(input_ids=b, labels=b).loss, config)
    lit_prune.save_pruned(model, folder / "plain", tokenizer)
    lit_prune.save_pruned(model, folder / "contained", tokenizer, self_contained=True)
    rows = [
        {"question": text.rpartition(" ")[0], "choices": [text.rpartition(" ")[2], f"w{5 + i}"], "answer": 0}
        for i, text in enumerate(chains(12, words=8))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "chains.yaml").write_text(TASK % (folder / "rows.jsonl"))
    return folder


def expected_accuracy(given: Path) -> float:
    """What the harness is to find: the choice that the model gives the higher probability, worked out here."""
    model = lit_prune.load_pruned(given / "plain")
    tokenizer = load_tokenizer(str(given / "plain"))
    right = 0
    for row in map(json.loads, (given / "rows.jsonl").read_text().splitlines()):
        prompt = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(prompt).logits[0, -1]
        first, second = (tokenizer(choice)["input_ids"][0] for choice in row["choices"])
        right += bool(logits[first] >= logits[second])
    return right / 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=contained,trust_remote_code=True"],
        ["-m", "lit_prune.evaluate", "--model", "hf", "--model_args", "pretrained=plain"],
        ["-m", "lit_prune.cli", "evaluate", "plain"],
    ],
    ids=["lm-eval", "python -m lit_prune.evaluate", "lit-prune evaluate"],
)
def test_the_harness_runs_on_a_pruned_folder(given, command, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lit_prune[eval]'")
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"), "1")
    options = [
        "--tasks",
        "chains",
        "--include_path",
        "tasks",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=given,
        env={**os.environ, **offline, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|chains" in done.stdout
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["chains"]
    assert math.isclose(found["acc,none"], expected_accuracy(given))


def test_what_the_command_refuses_before_the_harness_starts(given, monkeypatch, capsys):
    monkeypatch.chdir(given)
    with pytest.raises(ArgumentValueError, match="pretrained="):
        run_harness("plain", ["--model_args=pretrained=other", "--tasks", "chains"])
    with pytest.raises(PruningError, match=r"tasks holds no config\.json"):
        run_harness("tasks", ["--tasks", "chains"])
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--tasks", "chains"])
    assert ended.value.code == 2 and "MODEL, before the options" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--help"])
    assert ended.value.code == 0
    assert "lit-prune evaluate MODEL --tasks" in capsys.readouterr().out


def test_an_absent_harness_names_the_extra(given, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(given / "plain"), "--tasks", "chains"])
    assert ended.value.code == 1
    assert "pip install 'lit_prune[eval]'" in capsys.readouterr().err
