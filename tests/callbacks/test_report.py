"""The report: what it prints, writes and logs."""

from __future__ import annotations

import csv
import gc
import json
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from local_assets import write_tokenizer
from test_pruning import StopsEarly, fit, pruning
from test_schedule import Saved

from conftest import tiny
from lit_prune import GroupTable, PruningPlan, find_group_sets
from lit_prune.callbacks import PruningReport, Stage
from lit_prune.io.huggingface import load_pruned
from lit_prune.reporting.page import report_table
from lit_prune.reporting.plots import kept_figure
from lit_prune.reporting.throughput import tokens_per_second


def test_everything_is_written_and_agrees(tmp_path, capsys):
    out = tmp_path / "out"
    report = PruningReport(out, tokenizer=str(write_tokenizer(tmp_path / "t")), measure_speed=True, speed_tokens=16)
    callback = pruning()
    logger = CSVLogger(tmp_path)
    trainer, module = fit(tmp_path, callback, report, logger=logger)
    metrics = json.loads((out / "report.json").read_text())
    assert metrics == report.metrics
    model = module.inner["lm"]
    assert (
        metrics["recovered"]["parameters"]
        == metrics["pruned"]["parameters"]
        == sum(p.numel() for p in model.parameters())
    )
    assert metrics["dense"]["parameters"] == sum(p.numel() for p in tiny().parameters())
    assert metrics["dense"]["val_loss"] == callback.metrics["dense"]["val_loss"]
    assert metrics["recovered"]["val_loss"] == float(trainer.callback_metrics["val_loss"])
    assert metrics["dense"]["tokens_per_second"] > 0 and metrics["recovered"]["speedup"] > 0
    assert metrics["dense"]["megabytes"] == pytest.approx(4e-6 * metrics["dense"]["parameters"])
    assert PruningPlan.load(out / "plan.json") == callback.plan
    assert GroupTable.read(out / "group_table.csv").removed_cost == callback.table.removed_cost
    assert (out / "kept.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ids = torch.arange(8)[None]
    assert torch.equal(load_pruned(out / "model")(ids).logits, model.eval()(ids).logits)
    assert (out / "model" / "tokenizer.json").exists()
    printed = capsys.readouterr().out
    assert json.loads((out / "costs.json").read_text()) == callback.costs
    page = (out / "report.html").read_text()
    for phase in ("check", "calibration", "planning", "surgery", "total"):
        assert callback.costs[f"{phase}_seconds"] > 0 and callback.costs[f"{phase}_peak_bytes"] > 1e8
        assert phase in printed and f"<td>{phase}</td>" in page
    for word in ("parameters", "dense", "pruned", "recovered", "val_loss", f"{metrics['pruned']['parameters']:,.0f}"):
        assert word in printed
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = {k: v for row in csv.DictReader(file) for k, v in row.items() if v}
    assert float(logged["pruning/surgery_seconds"]) == pytest.approx(callback.costs["surgery_seconds"])
    assert float(logged["pruning/pruned/val_loss"]) == pytest.approx(callback.metrics["pruned"]["val_loss"])


def test_without_a_cut_there_is_no_report(tmp_path, capsys):
    with pytest.warns(UserWarning, match="0 of 1 stages"):
        fit(tmp_path, pruning(epoch=2), PruningReport(tmp_path / "out"), module=StopsEarly())
    assert not (tmp_path / "out").exists()
    assert "Structured pruning" not in capsys.readouterr().out


def test_a_dry_run_is_reported_without_a_model(tmp_path):
    fit(tmp_path, pruning(dry_run=True), PruningReport(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "costs.json",
        "group_table.csv",
        "importance.png",
        "kept.png",
        "plan.json",
        "report.html",
        "report.json",
        "scores.png",
        "timeline.png",
        "trade_off.png",
        "trade_offs.json",
    ]


def test_a_dry_run_compares_with_what_is_planned(tmp_path):
    report, callback = PruningReport(tmp_path / "out"), pruning(dry_run=True)
    _, module = fit(tmp_path, callback, report)
    assert set(report.metrics) == {"dense", "planned"}
    assert report.metrics["dense"]["parameters"] == sum(p.numel() for p in module.parameters())
    removed = report.metrics["dense"]["parameters"] - report.metrics["planned"]["parameters"]
    assert removed == callback.table.removed_cost


@pytest.mark.parametrize("extra", [0, 1])
def test_recovered_is_what_was_measured_after_the_cut_and_nothing_older(tmp_path, extra):
    # an epoch has 6 steps and ends with validation; the cut is at the start of epoch 1
    report = PruningReport(tmp_path / "out", save_model=False)
    trainer, _ = fit(tmp_path, pruning(epoch=1), report, max_epochs=None, max_steps=6 + (6 if extra else 3))
    assert "val_loss" in trainer.callback_metrics
    assert ("val_loss" in report.metrics["recovered"]) == bool(extra)
    if extra:
        assert report.metrics["recovered"]["val_loss"] == float(trainer.callback_metrics["val_loss"])


def stages(**options):
    return pruning(pruning_ratio=0.2, schedule=[Stage(0.1, epoch=1), Stage(0.2, epoch=2)], **options)


def test_with_several_stages_dense_is_the_model_before_the_first(tmp_path):
    report, callback = PruningReport(tmp_path / "out", measure_speed=True, speed_tokens=16), stages()
    fit(tmp_path, callback, report)
    dense = sum(p.numel() for p in tiny().parameters())
    assert report.metrics["dense"]["parameters"] == dense
    assert 0.19 < 1 - report.metrics["recovered"]["parameters"] / dense <= 0.2
    assert report.metrics["recovered"]["speedup"] > 0
    whole = {s.key: s.size for s in find_group_sets(tiny())}
    figure = kept_figure(callback.plan, callback.table)
    shown = [[int(b) for b in axis.containers[0].datavalues] for axis in figure.axes]
    assert sorted(n for bars in shown for n in bars) == sorted(whole.values())


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_reports_as_if_it_had_not_stopped(tmp_path, epoch):
    wanted = PruningReport(tmp_path / "wanted", save_model=False)
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, stages(), wanted, checkpoints, module=Saved(), max_epochs=4, enable_checkpointing=True)
    report, callback = PruningReport(tmp_path / "again", save_model=False), stages()
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback, report],
    )
    trainer.fit(Saved(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
    assert report.metrics == wanted.metrics
    assert PruningPlan.load(tmp_path / "again" / "plan.json") == PruningPlan.load(tmp_path / "wanted" / "plan.json")


def test_the_dense_copy_for_the_speed_is_let_go_and_takes_no_gradients(tmp_path):
    copies = []

    class Report(PruningReport):
        def on_pruning_end(self, trainer, pl_module, pruning):
            super().on_pruning_end(trainer, pl_module, pruning)
            copies.append(weakref.ref(self._dense))
            assert all(p.grad is None for p in self._dense.parameters())
            assert sum(p.numel() for p in self._dense.parameters()) == self.metrics["dense"]["parameters"]

    # with accumulation over 4 of 6 batches, gradients are pending at the cut
    fit(tmp_path, pruning(step=1), Report(tmp_path, False, measure_speed=True), accumulate_grad_batches=4)
    gc.collect()
    assert [c() for c in copies] == [None]


def test_the_picture_shows_the_kept_groups_of_every_layer(tmp_path):
    callback = pruning()
    fit(tmp_path, callback, max_epochs=2)
    figure = kept_figure(callback.plan, callback.table)
    kinds = dict.fromkeys(kind for _, kind in callback.table.keys)
    for axis, kind in zip(figure.axes, kinds, strict=True):
        dense, kept = (container.datavalues.tolist() for container in axis.containers)
        rows = [i for i, (_, k) in enumerate(callback.table.keys) if k == kind]
        assert dense == [callback.table.sizes[i] for i in rows]
        assert kept == [len(callback.table.kept_groups()[i]) for i in rows]


def test_the_table_says_the_ratio_of_last_to_dense():
    table = report_table(
        {
            "dense": {"parameters": 100.0, "val_perplexity": 8.0},
            "recovered": {"parameters": 80.0, "val_perplexity": 10.0},
        }
    )
    assert [str(cell) for cell in table.columns[-1].cells] == ["0.800", "1.250"]


def test_speed_is_measured_in_turns_and_modes_are_put_back():
    calls = []
    models = {name: tiny().train(name == "a") for name in "ab"}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda m, a, name=name: calls.append((name, m.training)))
    measured = tokens_per_second(models, torch.zeros(1, 8, dtype=torch.long), repeats=2)
    assert calls == 3 * [("a", False), ("b", False)]
    assert {n: len(v) for n, v in measured.items()} == {"a": 2, "b": 2}
    assert models["a"].training and not models["b"].training
