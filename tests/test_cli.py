"""train.py as a user runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from local_assets import chains, write_model, write_text, write_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_prune import load_pruned
from lit_prune.training import CausalLMModule, TextDataModule, classification
from lit_prune.training.command_line import run

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


def entry(config: Path):
    """What runs a recipe: its command line as a function of the arguments."""
    if config.stem == "bert_classifier":
        return classification.main
    return lambda arguments: run("train.py", CausalLMModule, TextDataModule, arguments)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_every_config_is_valid(config, capsys):
    with pytest.raises(SystemExit) as ended:
        entry(config)(["fit", "--config", str(config), "--print_config"])
    assert not ended.value.code
    assert yaml.safe_load(capsys.readouterr().out)["pruning"]["pruning_ratio"] > 0


# the two-process recipe runs in its own processes below; those of recovery and FSDP have tests of their own
SHRUNKEN = ["taylor", "taylor_2nd", "wanda", "mix", "uniform", "gradual", "llama3_8b"]


@pytest.mark.parametrize("name", SHRUNKEN)
def test_every_recipe_runs_shrunken_on_a_tiny_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = str(write_model(tmp_path / "model", intermediate_size=48))
    text = str(write_text(tmp_path / "text.txt", chains(60)))
    arguments = ["fit", "--config", str(ROOT / "configs" / f"{name}.yaml")]
    arguments += ["--model.model", model, "--data.tokenizer", model, "--data.dataset", text, "--data.block_size", "16"]
    arguments += ["--pruning.calibration_batches", "2", "--trainer.max_steps", "8", "--trainer.val_check_interval", "4"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "2"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    if name == "gradual":
        arguments += ["--pruning.schedule.init_args.end", "6", "--pruning.schedule.init_args.stages", "3"]
    if name == "llama3_8b":
        arguments += ["--data.subset", "null", "--pruning.mlp_multiple_of", "8"]
        arguments += ["--trainer.accumulate_grad_batches", "1"]
    cli = entry(ROOT / "configs" / f"{name}.yaml")(arguments)
    assert cli.trainer.global_step == 8
    wanted = cli.config["fit"]["pruning"]["pruning_ratio"]
    metrics = json.loads((tmp_path / "outputs" / name / "report.json").read_text())
    ratio = 1 - metrics["recovered"]["parameters"] / metrics["dense"]["parameters"]
    assert 0.6 * wanted < ratio <= wanted
    loaded = load_pruned(tmp_path / "outputs" / name / "model")
    assert (type(loaded).__name__ == "LlamaForCausalLM") == (name == "uniform")


def test_the_classifier_recipe_runs_shrunken_on_a_tiny_bert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_tokenizer(tmp_path / "model")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoConfig.for_model("bert", intermediate_size=48, pad_token_id=0, **sizes).save_pretrained(folder)
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(chains(40, words=8))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = ROOT / "configs" / "bert_classifier.yaml"
    arguments = ["fit", "--config", str(recipe), "--model.model", str(folder), "--model.random_weights", "true"]
    arguments += ["--data.tokenizer", str(folder), "--data.dataset", str(tmp_path / "rows.jsonl")]
    arguments += ["--data.batch_size", "4", "--pruning.calibration_batches", "2", "--trainer.max_epochs", "2"]
    cli = entry(recipe)([*arguments, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"])
    out = tmp_path / "outputs" / "bert_classifier"
    metrics = json.loads((out / "report.json").read_text())
    assert "val_accuracy" in metrics["recovered"]
    assert 0.15 < 1 - metrics["recovered"]["parameters"] / metrics["dense"]["parameters"] <= 0.2
    loaded = AutoModelForSequenceClassification.from_pretrained(out / "model")
    ids = torch.arange(2, 10)[None]
    trained = cli.model.model.eval()
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in trained.named_parameters())
    # kernels differ with where in memory the same weights lie
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=1e-6, atol=1e-8)


def test_the_two_process_recipe_runs_shrunken(tmp_path):
    model = write_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", chains(60))
    sources = ["--model.model", model, "--data.tokenizer", model, "--data.dataset", text, "--data.block_size", 16]
    shrunken = ["--pruning.calibration_batches", 2, "--trainer.max_steps", 4, "--trainer.val_check_interval", 4]
    done = train("fit", "--config", ROOT / "configs" / "ddp.yaml", *sources, *shrunken, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "outputs" / "ddp" / "report.json").read_text())
    assert 0.18 < 1 - metrics["recovered"]["parameters"] / metrics["dense"]["parameters"] <= 0.2


def test_the_plain_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "plain_lightning.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "outputs" / "plain_lightning" / "report.json").read_text())
    assert 0.28 < 1 - metrics["recovered"]["parameters"] / metrics["dense"]["parameters"] <= 0.3
    assert metrics["recovered"]["val_loss"] < metrics["pruned"]["val_loss"]


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
    metrics = json.loads((out / "report.json").read_text())
    ratio = 1 - metrics["recovered"]["parameters"] / metrics["dense"]["parameters"]
    assert 0.19 < ratio <= 0.2
    assert {"plan.json", "group_table.csv", "kept.png", "model"} <= {p.name for p in out.iterdir()}
    assert "val_perplexity" in done.stdout


def test_an_unknown_criterion_is_an_error_that_lists_the_known(tmp_path):
    done = train(
        "fit", "--config", ROOT / "configs" / "quickstart.yaml", "--pruning.importance", "tailor", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "importance must name criteria out of taylor, taylor_2nd" in done.stderr
