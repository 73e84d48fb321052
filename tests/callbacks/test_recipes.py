"""The recovery recipes from YAML, shrunken, on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from local_assets import chains, write_model, write_text

from lit_prune import get_plan
from lit_prune.callbacks import StructuredPruning
from lit_prune.training import CausalLMModule, TextDataModule

ROOT = Path(__file__).resolve().parent.parent.parent


def run(folder: Path, recipe: str, *arguments: str):
    """What `python train.py fit --config configs/RECIPE.yaml ...` does."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    model = str(write_model(folder / "model", intermediate_size=48))
    text = write_text(folder / "text.txt", chains(60))
    shrunken = [
        "--model.model",
        model,
        "--data.tokenizer",
        model,
        "--data.dataset",
        str(text),
        "--data.block_size",
        "16",
    ]
    shrunken += [
        "--trainer.accelerator",
        "cpu",
        "--pruning.calibration_batches",
        "3",
        "--pruning.pruning_ratio",
        "0.15",
    ]
    shrunken += ["--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar", "false"]
    config = ["fit", "--config", str(ROOT / "configs" / f"{recipe}.yaml")]
    return train.PruningCLI(
        CausalLMModule, TextDataModule, save_config_kwargs={"overwrite": True}, args=[*config, *shrunken, *arguments]
    )


def pruning_of(cli) -> StructuredPruning:
    return next(c for c in cli.trainer.callbacks if isinstance(c, StructuredPruning))


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_lora_recovery(tmp_path):
    cli = run(tmp_path, "lora_recovery", "--trainer.max_steps", "30", "--trainer.val_check_interval", "10")
    assert cli.trainer.global_step == 30
    assert not any("lora" in name for name in cli.model.state_dict())
    assert get_plan(cli.model.model) is not None
    assert cli.trainer.callback_metrics["val_loss"] < pruning_of(cli).metrics["pruned"]["val_loss"]
    # the best checkpoint has adapters; it loads as a plain model
    best = CausalLMModule.load_from_checkpoint(cli.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert get_plan(best.model).digest() == get_plan(cli.model.model).digest()


def test_distillation(tmp_path):
    options = ["--trainer.max_steps", "30", "--trainer.val_check_interval", "10"]
    cli = run(tmp_path, "distillation", *options, "--pruning.schedule.init_args.end", "10")
    assert pruning_of(cli).stages_done == 3
    assert {"distillation_loss", "hidden_state_loss"} <= set(cli.trainer.callback_metrics)
    assert (tmp_path / "outputs" / "distillation" / "teacher.safetensors").exists()


def test_gates(tmp_path):
    options = ["--trainer.max_steps", "12", "--trainer.val_check_interval", "6"]
    cli = run(tmp_path, "gates", *options, "--trainer.callbacks.init_args.steps", "6")
    pruning = pruning_of(cli)
    assert pruning.stages_done == 1
    assert pruning.plan.info["importance"] == "gates from fisher"
    assert float(cli.trainer.callback_metrics["gate_steps"]) == 6
