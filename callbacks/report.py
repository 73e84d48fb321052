"""What a person wants to see of a run that pruned: a table, pictures, files, and all of it in the Trainer's own logger."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from rich.console import Console
from torch import nn

from lit_prune._files import check_writable
from lit_prune._renamed import RenamedAttribute
from lit_prune.arguments import COUNT, FLAG, PATH, TEXT, optional
from lit_prune.callbacks.output import check_on_rank_zero, warn_instead
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.runs import PerModule
from lit_prune.callbacks.validation import missing_validation
from lit_prune.callbacks.wandb_report import log_model, log_pictures, log_plan
from lit_prune.callbacks.wandb_tables import log_tables
from lit_prune.errors import ArgumentValueError
from lit_prune.extras import require
from lit_prune.groups import count_bytes, count_parameters
from lit_prune.io.huggingface import save_pruned
from lit_prune.io.output_folder import check_replaceable
from lit_prune.io.sources import load_tokenizer
from lit_prune.ranking.table import GroupTable
from lit_prune.reporting.budgets import budget_numbers
from lit_prune.reporting.page import report_tables, write_report
from lit_prune.reporting.throughput import tokens_per_second
from lit_prune.text_escape import for_console


class PruningReport(Callback):
    """Report a pruning run: a console table, plots, files, logger entries and the saved model.

    The table compares the dense, the just pruned and the recovered model: parameters, size of the weights, the metrics of the
    trainer's validation loop, and, if asked, the speed of dense and pruned measured in turns. Files go to ``output_dir``:
    ``report.json``, ``report.html`` (one page that holds everything), ``plan.json``, ``group_table.csv``, the pictures and
    the folder ``model``. "recovered" is what the last validation after the last cut measured. With several stages, "dense" is
    the model before the first one. After a dry run the table compares the dense model with the planned one, and no model is
    written.

    Whatever loggers the Trainer has get the pruning options as hyperparameters, and under ``pruning/`` the metrics by stage,
    what each kind of group lost, and what calibration took. TensorBoard gets the pictures, too. Weights & Biases gets the
    pictures, what each layer kept as a table and a bar chart, the group table (a ``wandb.Table``; above 10,000 rows a Parquet
    artifact), the plan as an artifact, and, with ``log_model``, the pruned model as an artifact whose metadata name the plan.
    To continue an interrupted run, give the logger the id that every checkpoint carries, see :func:`wandb_run`.

    Args:
        output_dir: Where to write; ``pruning`` in the trainer's root directory if ``None``.
        save_model: Write the pruned model (a transformers model) in Hugging Face format, with its tokenizer if the
            datamodule or ``tokenizer`` names one.
        self_contained: Write the modelling code, too, see :func:`lit_prune.save_pruned`.
        tokenizer: Where to load the tokenizer to save from; the datamodule's ``tokenizer`` if ``None``.
        measure_speed: Measure tokens per second; a copy of the dense model stays in CPU memory meanwhile. Not after a resume.
        speed_tokens: Tokens of the sequence that the speed is measured on.
        log_model: Log the saved model to Weights & Biases as an artifact.
        dense_artifact: W&B artifact of the dense model, noted in the artifacts' metadata, and online as an input of the run.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range, or ``log_model`` is asked for without ``save_model``.
        MissingPackageError: If matplotlib is not installed.

    Example::

        trainer = L.Trainer(callbacks=[StructuredPruning(pruning_ratio=0.2), PruningReport(output_dir="outputs")])
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        save_model: bool = True,
        self_contained: bool = False,
        tokenizer: str | None = None,
        measure_speed: bool = False,
        speed_tokens: int = 512,
        log_model: bool = False,
        dense_artifact: str | None = None,
    ) -> None:
        super().__init__()
        self.output_dir = optional(PATH).check("output_dir", output_dir)
        self.save_model = FLAG.check("save_model", save_model)
        self.self_contained = FLAG.check("self_contained", self_contained)
        self.tokenizer = optional(TEXT).check("tokenizer", tokenizer)
        self.measure_speed = FLAG.check("measure_speed", measure_speed)
        self.speed_tokens = COUNT.check("speed_tokens", speed_tokens)
        self.log_model = FLAG.check("log_model", log_model)
        self.dense_artifact = optional(TEXT).check("dense_artifact", dense_artifact)
        require("matplotlib", "plots", "PruningReport")
        if log_model and not save_model:
            raise ArgumentValueError("log_model=True logs the model that was saved; found save_model=False.")
        self._state: PerModule[_Reported] = PerModule(_Reported)
        self._dense: nn.Module | None = None
        self._pruning: StructuredPruning | None = None

    figures = RenamedAttribute("metrics")

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the run by stage (``"dense"``, ``"pruned"``, ``"recovered"``, ``"planned"``) and name."""
        return self._state.value.metrics

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """What validation measured, one point a validation."""
        return self._state.value.timeline

    @property
    def run_id(self) -> str | None:
        """The Weights & Biases run that the report is logged to."""
        return self._state.value.run_id

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the report kept for this module."""
        del trainer, stage
        self._state.begin(pl_module)
        self._dense = self._pruning = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the report can be written, and log the options."""
        callbacks = [c for c in trainer.callbacks if isinstance(c, StructuredPruning)]  # type: ignore[attr-defined]
        if callbacks:
            self._check_output(trainer, dry_run=all(c.dry_run for c in callbacks))
        for logger in trainer.loggers:
            if callbacks:
                logger.log_hyperparams({"pruning": _options(callbacks[0])})
            if is_a(logger, WandbLogger) and trainer.is_global_zero:
                found = logger.experiment.id
                if self.run_id not in (None, found):
                    rank_zero_warn(
                        f"The checkpoint belongs to the Weights & Biases run {self.run_id!r}, and the logger started"
                        f" {found!r}. To continue the run: WandbLogger(**lit_prune.callbacks.wandb_run(checkpoint))."
                    )
                self._state.value.run_id = found
                if self.dense_artifact is not None and logger.experiment.offline:
                    rank_zero_warn(
                        f"Weights & Biases is offline, so {self.dense_artifact!r} is not noted as an input of the run; the"
                        " metadata of the run's artifacts name it."
                    )
                elif self.dense_artifact is not None:
                    logger.use_artifact(self.dense_artifact)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the report of a run that was cut before its checkpoint was written, or begin a new one."""
        callbacks = [c for c in trainer.callbacks if isinstance(c, StructuredPruning)]  # type: ignore[attr-defined]
        done = [c for c in callbacks if c.plan is not None]
        if not done and self._state.value.noted:
            self._state.value = _Reported(run_id=self.run_id)
        self._pruning = done[0] if done and "dense" in self.metrics else None

    def _check_output(self, trainer: pl.Trainer, dry_run: bool) -> None:
        """Refuse, on all processes, what could not be written at the end of the run.

        Raises:
            PruningError: If the first process cannot write the files there, or replace the model.
        """

        def check() -> None:
            folder = self._folder(trainer)
            check_writable(folder)
            if self.save_model and not dry_run:
                check_replaceable(folder / "model")

        check_on_rank_zero(trainer, check, "PruningReport could not write its files at the end of the run. ")

    def on_pruning_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Record the dense model's metrics."""
        if pruning.plan is not None:
            return
        self._state.value.lost = {}
        model = pruning.model(pl_module)
        self._state.value.metrics = {"dense": _size(model)}
        if self.measure_speed and not hasattr(model, "get_input_embeddings"):
            rank_zero_warn(
                "PruningReport(measure_speed=True): the speed is measured of language models, in tokens per second; the model is"
                f" a {type(model).__name__}. It is not measured."
            )
        elif self.measure_speed and trainer.is_global_zero:
            gradients = {p: p.grad for p in model.parameters()}
            for parameter in gradients:
                parameter.grad = None
            try:
                self._dense = copy.deepcopy(model).cpu()
            finally:
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Record and log the pruned model's metrics."""
        if "dense" not in self.metrics:
            return
        self._pruning = pruning
        self._state.value.validated = {}
        if pruning.dry_run and pruning.plan is not None:
            self.metrics["planned"] = {"parameters": float(pruning.plan.info["parameters_after"])}
        else:
            self.metrics["pruned"] = _size(pruning.model(pl_module))
        for stage, metrics in pruning.metrics.items():
            if stage in self.metrics:
                self.metrics[stage].update(metrics)
        # a run that was stopped in the middle of this comes here twice
        new = self._state.value.noted != pruning.stages_done
        self._state.value.noted = pruning.stages_done
        for stage in ("dense", "pruned") if new else ():
            if pruning.metrics.get(stage) and not (stage == "dense" and self._seen_dense()):
                self._note(trainer, stage, pruning.metrics[stage])
        flat = {f"pruning/{s}/{n}": v for s, values in self.metrics.items() for n, v in values.items()}
        if pruning.table is not None:
            self._count(pruning.table)
            flat |= {
                f"pruning/removed_parameters/{k}": float(lost["parameters"])
                for k, lost in self._state.value.lost.items()
            }
            flat |= {
                f"pruning/removed_groups/{k}": lost["groups"] / lost["of"] for k, lost in self._state.value.lost.items()
            }
        flat |= {f"pruning/{name}": value for name, value in pruning.costs.items()} | budget_numbers(pruning.plan)
        parameters = [values["parameters"] for values in self.metrics.values()]
        flat["pruning/ratio"] = 1 - parameters[-1] / parameters[0]
        for logger in trainer.loggers:
            logger.log_metrics(flat, step=trainer.global_step)
            if is_a(logger, WandbLogger) and trainer.is_global_zero and pruning.table is not None:
                log_tables(logger, pruning.table, trainer.global_step)

    def _count(self, table: GroupTable) -> None:
        """Add to what each kind of group lost: parameters, those that left with a whole block apart, and groups."""
        for kind in dict.fromkeys(kind for _, kind in table.keys):
            mine = table.kind_of_row == kind
            lost = self._state.value.lost.setdefault(kind, {"parameters": 0, "groups": 0, "of": int(mine.sum())})
            lost["parameters"] += int(table.cost[mine & table.leaving].sum())
            lost["groups"] += int((mine & ~table.kept).sum())

    def _seen_dense(self) -> bool:
        return any(point["stage"] == "pruned" for point in self.timeline)

    def _note(self, trainer: pl.Trainer, stage: str, metrics: Mapping[str, float]) -> None:
        self.timeline.append({"step": trainer.global_step, "stage": stage, **metrics})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of a validation run."""
        if trainer.sanity_checking:
            return
        measured = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val")}
        if self._pruning is not None:
            seen = self.metrics["dense"]
            measured = {n: float(v) for n, v in trainer.callback_metrics.items() if n in seen}
            self._state.value.validated = measured
        if measured:
            self._note(trainer, "dense" if self._pruning is None else "recovery", measured)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, print, write and log."""
        if self._pruning is None or not trainer.is_global_zero:
            return
        model = self._pruning.model(pl_module)
        if not self._pruning.dry_run:
            self.metrics["recovered"] = {**_size(model), **self._state.value.validated}
            with warn_instead("The speed was not measured", _ANYTHING):
                self._measure(model)
            recovered = {f"pruning/recovered/{n}": v for n, v in self.metrics["recovered"].items()}
            for logger in trainer.loggers:
                logger.log_metrics(recovered, step=trainer.global_step)
        self._dense = None
        drawn = self._write(trainer, model)
        for logger in trainer.loggers:
            with warn_instead(f"{type(logger).__name__} did not take the report", _ANYTHING):
                if is_a(logger, TensorBoardLogger):
                    for name, figure in drawn.items():
                        logger.experiment.add_figure(f"pruning/{name}", figure, global_step=trainer.global_step)
                if is_a(logger, WandbLogger):
                    self._log_to_wandb(logger, self._folder(trainer), drawn, trainer.global_step)
        self._print(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far, as plain data."""
        return {
            "metrics": {stage: dict(values) for stage, values in self.metrics.items()},
            "timeline": [dict(point) for point in self.timeline],
            "lost": {kind: dict(values) for kind, values in self._state.value.lost.items()},
            "noted": self._state.value.noted,
            "wandb_run": self.run_id,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of a checkpoint."""
        self._state.value = _Reported(
            # checkpoints of release 0.1 say "figures"
            metrics={s: dict(v) for s, v in state_dict.get("metrics", state_dict.get("figures", {})).items()},
            timeline=[dict(point) for point in state_dict["timeline"]],
            # older checkpoints have none
            lost={kind: dict(values) for kind, values in state_dict.get("lost", {}).items()},
            noted=state_dict.get("noted", 0),
            run_id=state_dict["wandb_run"],
        )

    def _measure(self, model: nn.Module) -> None:
        if self._dense is None:
            return
        device = next(model.parameters()).device
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.randint(0, vocabulary, (1, self.speed_tokens), generator=torch.Generator().manual_seed(0)).to(
            device
        )
        measured = tokens_per_second({"dense": self._dense.to(device), "recovered": model}, ids)
        for stage, values in measured.items():
            self.metrics[stage]["tokens_per_second"] = statistics.median(values)
        ratios = [h / d for d, h in zip(measured["dense"], measured["recovered"], strict=True)]
        self.metrics["recovered"]["speedup"] = statistics.median(ratios)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return self.output_dir or Path(trainer.default_root_dir) / "pruning"

    def _write(self, trainer: pl.Trainer, model: nn.Module) -> dict[str, Any]:
        pruning = self._pruning
        if pruning is None or pruning.plan is None:
            return {}
        folder = self._folder(trainer)
        drawn: dict[str, Any] = {}
        with warn_instead(f"The report was not written to {folder}", _ANYTHING):
            # the table is None in a run that was resumed after the last cut
            note = self._note_on_metrics(trainer)
            drawn = write_report(folder, self.metrics, pruning.plan, pruning.table, self.timeline, note, pruning.costs)
        if self.save_model and not pruning.dry_run:
            tokenizer = None
            with warn_instead("The tokenizer was not saved with the model", _ANYTHING):
                tokenizer = self._load_tokenizer(trainer)
            with warn_instead(f"The pruned model was not written to {folder / 'model'}", _ANYTHING):
                save_pruned(
                    model, folder / "model", tokenizer, metrics=self.metrics, self_contained=self.self_contained
                )
        return drawn

    def _load_tokenizer(self, trainer: pl.Trainer) -> Any:
        source = self.tokenizer or getattr(getattr(trainer.datamodule, "hparams", None), "tokenizer", None)  # type: ignore[attr-defined]
        return None if source is None else load_tokenizer(source)

    def _log_to_wandb(self, logger: WandbLogger, folder: Path, drawn: Mapping[str, Any], step: int) -> None:
        assert self._pruning is not None and self._pruning.plan is not None
        plan = self._pruning.plan
        log_pictures(logger, drawn, step)
        origin = log_plan(logger, folder, plan, self._pruning.table, self.dense_artifact)
        if self.log_model and (folder / "model").is_dir():
            log_model(logger, folder / "model", {**origin, "metrics": self.metrics})

    def _note_on_metrics(self, trainer: pl.Trainer) -> str:
        if self._pruning is None or self._pruning.metrics:
            return ""
        reason = missing_validation(trainer) or "validation_step logged none"
        if not self._pruning.validate:
            reason = "StructuredPruning has validate=False"
        return f"No validation metrics: {reason}."

    @rank_zero_only
    def _print(self, trainer: pl.Trainer) -> None:
        console, pruning = Console(), self._pruning
        for table in report_tables(self.metrics, pruning.plan if pruning else None, pruning.costs if pruning else {}):
            console.print(table)
        if note := self._note_on_metrics(trainer):
            console.print(for_console(note), soft_wrap=True)
        console.print(for_console(f"Written to {self._folder(trainer)}"), soft_wrap=True)


# loggers, tokenizers and models of others may raise anything, at the end of a training that is worth more than its report
_ANYTHING = Exception


@dataclass
class _Reported:
    """What is known of one run."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    # by kind of group, over all stages
    lost: dict[str, dict[str, int]] = field(default_factory=dict)
    noted: int = 0
    run_id: str | None = None
    validated: dict[str, float] = field(default_factory=dict)


def _options(pruning: StructuredPruning) -> dict[str, Any]:
    options = asdict(pruning.config)
    options["stages"] = [asdict(stage) for stage in pruning.stages]
    options["calibration_batches"] = pruning.calibration_batches
    return json.loads(json.dumps(options))


def _size(model: nn.Module) -> dict[str, float]:
    return {"parameters": float(count_parameters(model)), "megabytes": count_bytes(model) / 1e6}
