"""What the report sends to the Trainer's own logger, read back from the files that the loggers wrote."""

from __future__ import annotations

import csv
import json
import struct
import time
from pathlib import Path

import pytest
import wandb
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from test_pruning import fit, pruning
from test_schedule import Saved
from wandb.proto import wandb_internal_pb2

from lit_prune import GroupTable, PruningError, PruningPlan
from lit_prune.callbacks import PruningReport, wandb_run


def records(file):
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KiB that hold records in fragments."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):
            return  # being written
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class Recorded:
    """An offline run as its file tells it."""

    def __init__(self, folder):
        (self.file,) = folder.glob("*.wandb")
        self.config, self.history, self.artifacts, self.id = {}, [], {}, None
        for record in self.finished():
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id = record.run.run_id
            if kind in ("run", "config"):
                for item in (record.run.config if kind == "run" else record.config).update:
                    self.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if kind == "history":
                row = {}
                for item in record.history.item:
                    *outer, last = item.nested_key or [item.key]
                    place = row
                    for key in outer:
                        place = place.setdefault(key, {})
                    place[last] = json.loads(item.value_json)
                self.history.append(row)
            if kind == "artifact":
                self.artifacts[record.artifact.name] = record.artifact
            if kind == "request" and record.request.HasField("log_artifact"):
                artifact = record.request.log_artifact.artifact
                self.artifacts[artifact.name] = artifact

    def finished(self):
        """The records once the last one is there: finishing a run does not wait for the process that writes its file."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = list(records(self.file)) if self.file.stat().st_size >= 7 else []
            if found and found[-1].WhichOneof("record_type") == "exit":
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{self.file} has no end.")

    def last(self, key):
        return [row[key] for row in self.history if key in row][-1]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path
    wandb.finish()


def runs(folder):
    wandb.finish()
    return [Recorded(run) for run in sorted((folder / "wandb").glob("offline-run-*"))]


def test_one_offline_run_holds_all_of_it_across_the_cut(offline):
    report = PruningReport(offline / "out", log_model=True)
    callback = pruning()
    logger = WandbLogger(project="pruning", save_dir=offline)
    fit(offline, callback, report, logger=logger)
    (run,) = runs(offline)
    options = run.config["pruning"]
    assert (options["importance"], options["pruning_ratio"], options["calibration_batches"]) == ("taylor", 0.2, 3)
    assert options["stages"] == [{"ratio": 0.2, "epoch": 1, "step": None}]
    for stage in ("dense", "pruned", "recovered"):
        for name, value in report.metrics[stage].items():
            assert run.last(f"pruning/{stage}/{name}") == pytest.approx(value)
    ratio = 1 - report.metrics["pruned"]["parameters"] / report.metrics["dense"]["parameters"]
    assert run.last("pruning/ratio") == pytest.approx(ratio)
    removed = [run.last(f"pruning/removed_parameters/{kind}") for kind in ("attention", "mlp")]
    assert sum(removed) == callback.table.removed_cost
    assert run.last("pruning/calibration_seconds") > 0
    assert run.last("pruning/calibration_peak_bytes") > 1e8
    steps = [row["trainer/global_step"] for row in run.history if "train_loss_step" in row]
    assert steps[0] == 0 and steps[-1] == 17  # training went on in the same run
    table = run.last("pruning/group_table")
    assert (table["_type"], table["nrows"]) == ("table-file", len(callback.table))
    content = json.loads((run.file.parent / "files" / table["path"]).read_text())
    assert content["columns"] == callback.table.to_arrow().column_names
    assert sum(not row[-1] for row in content["data"]) == (~callback.table.kept).sum()
    by_layer = json.loads((run.file.parent / "files" / run.last("pruning/kept_by_layer")["path"]).read_text())
    kept = by_layer["columns"].index("kept")
    assert [row[kept] for row in by_layer["data"]] == [len(k) for k in callback.table.kept_groups()]
    for name in ("kept", "importance", "scores", "timeline"):
        picture = run.last(f"pruning/{name}")
        assert (run.file.parent / "files" / picture["path"]).read_bytes()[:4] == b"\x89PNG"
    plan, model = run.artifacts[f"pruning-plan-{run.id}"], run.artifacts[f"pruned-model-{run.id}"]
    assert {e.path for e in plan.manifest.contents} == {"plan.json", "group_table.csv", "report.html"}
    assert json.loads(plan.metadata)["digest"] == callback.plan.digest()
    assert {"config.json", "model.safetensors"} <= {e.path for e in model.manifest.contents}
    origin = json.loads(model.metadata)
    assert (origin["plan"], origin["plan_digest"]) == (f"pruning-plan-{run.id}", callback.plan.digest())


def test_the_model_is_logged_only_if_asked_for(offline):
    fit(offline, pruning(), PruningReport(offline / "out"), logger=WandbLogger(save_dir=offline))
    (run,) = runs(offline)
    assert list(run.artifacts) == [f"pruning-plan-{run.id}"] or not any("model" in name for name in run.artifacts)
    with pytest.raises(ValueError, match="save_model=False"):
        PruningReport(log_model=True, save_model=False)


def test_the_artifact_of_the_dense_model_is_named_offline_too(offline):
    report = PruningReport(offline / "out", log_model=True, dense_artifact="me/dense:v3")
    with pytest.warns(UserWarning, match="'me/dense:v3' is not noted as an input"):
        fit(offline, pruning(), report, logger=WandbLogger(save_dir=offline))
    (run,) = runs(offline)
    for artifact in (f"pruning-plan-{run.id}", f"pruned-model-{run.id}"):
        assert json.loads(run.artifacts[artifact].metadata)["dense_model"] == "me/dense:v3"


@pytest.mark.parametrize("continued", [True, False])
def test_a_resumed_run_continues_or_says_how(offline, continued):
    checkpoints = ModelCheckpoint(offline, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    first = PruningReport(offline / "out", save_model=False)
    options = {"module": Saved(), "max_epochs": 2, "enable_checkpointing": True}
    fit(offline, pruning(), first, checkpoints, logger=WandbLogger(save_dir=offline), **options)
    wandb.finish()
    last = offline / "epoch=1.ckpt"
    assert wandb_run(last) == {"id": first.run_id, "resume": "allow"}
    logger = WandbLogger(save_dir=offline, **(wandb_run(last) if continued else {}))
    second = PruningReport(offline / "out", save_model=False)
    again = {"module": Saved(), "max_epochs": 3, "logger": logger, "checkpoint": last}
    if continued:
        fit(offline, pruning(), second, **again)
    else:
        with pytest.warns(UserWarning, match=f"belongs to the Weights & Biases run '{first.run_id}'"):
            fit(offline, pruning(), second, **again)
    recorded = runs(offline)
    assert len(recorded) == 2
    assert (recorded[0].id == recorded[1].id) == continued
    steps = [row["trainer/global_step"] for row in recorded[1].history if "train_loss_step" in row]
    assert steps[0] == 12
    assert second.metrics["dense"] == first.metrics["dense"]
    assert [p["stage"] for p in second.timeline] == ["dense", "dense", "pruned", "recovery", "recovery"]
    assert second.timeline[:4] == first.timeline


def test_a_checkpoint_without_a_run_is_told_so(tmp_path):
    trainer, _ = fit(tmp_path, pruning(epoch=0), PruningReport(tmp_path / "out", save_model=False), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(PruningError, match="carries no Weights & Biases run"):
        wandb_run(tmp_path / "last.ckpt")


def test_csv_and_tensorboard_get_the_same_figures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = PruningReport(tmp_path / "out", save_model=False)
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tensorboard")]
    fit(tmp_path, pruning(), report, logger=loggers)
    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v}
    board = events.EventAccumulator(loggers[1].log_dir).Reload()
    for stage in ("dense", "pruned", "recovered"):
        for name, value in report.metrics[stage].items():
            assert logged[f"pruning/{stage}/{name}"] == pytest.approx(value)
            assert board.Scalars(f"pruning/{stage}/{name}")[-1].value == pytest.approx(value)
    assert {f"pruning/{n}" for n in ("kept", "importance", "scores", "timeline")} <= set(board.Tags()["images"])
    options = yaml.safe_load(Path(loggers[0].log_dir, "hparams.yaml").read_text())["pruning"]
    assert options["importance"] == "taylor"
    assert PruningPlan.load(tmp_path / "out" / "plan.json").digest()
    assert GroupTable.read(tmp_path / "out" / "group_table.csv").removed_cost > 0
