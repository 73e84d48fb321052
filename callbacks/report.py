"""What a person wants to see at the end of a run that pruned: one table, one picture, and the files."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.errors import PruningError
from lit_prune.export import save_pruned
from lit_prune.files import replacing, write_text
from lit_prune.groups import count_parameters
from lit_prune.plan import PruningPlan
from lit_prune.speed import tokens_per_second
from lit_prune.table import GroupTable
from lit_prune.training.loading import load_tokenizer


class PruningReport(Callback):
    """Print one table at the end of a fit that pruned, and write the plan, the group table, a picture and the model.

    The table compares the dense, the just pruned and the healed model: parameters, size of the weights, the metrics of the
    trainer's validation loop, and, if asked, the speed of dense and pruned measured in turns. Files go to ``output_dir``:
    ``report.json``, ``plan.json``, ``group_table.csv``, ``kept.png`` and the folder ``model``. The numbers also go to
    the Trainer's logger, if it has one, under ``pruning/``. "Healed" is what the last validation after the last cut
    measured. With several stages, "dense" is the model before the first one. After a dry run the table compares the dense
    model with the planned one, and no model is written.

    Args:
        output_dir: Where to write; ``pruning`` in the trainer's root directory if ``None``.
        save_model: Write the pruned model (a transformers model) in Hugging Face format, with its tokenizer if the
            datamodule or ``tokenizer`` names one.
        tokenizer: Where to load the tokenizer to save from; the datamodule's ``tokenizer`` if ``None``.
        measure_speed: Measure tokens per second; keeps a copy of the dense model in CPU memory until the end of the fit. A
            run that is resumed after the first cut has no dense model to measure.
        speed_tokens: Tokens of the sequence that the speed is measured on.

    Example::

        trainer = L.Trainer(callbacks=[StructuredPruning(pruning_ratio=0.2), PruningReport(output_dir="outputs")])
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        save_model: bool = True,
        tokenizer: str | None = None,
        measure_speed: bool = False,
        speed_tokens: int = 512,
    ) -> None:
        super().__init__()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.save_model = save_model
        self.tokenizer = tokenizer
        self.measure_speed = measure_speed
        self.speed_tokens = speed_tokens
        self.figures: dict[str, dict[str, float]] = {}
        self._dense: nn.Module | None = None
        self._pruning: StructuredPruning | None = None
        self._validated: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the report of a run that was cut before its checkpoint was written."""
        done = [c for c in trainer.callbacks if isinstance(c, StructuredPruning) and c.stages_done]  # type: ignore[attr-defined]
        self._pruning = done[0] if done and "dense" in self.figures else None

    def on_pruning_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Note what the dense model is like."""
        if pruning.stages_done:
            return
        model = pruning.model(pl_module)
        self.figures = {"dense": _size(model)}
        if self.measure_speed and trainer.is_global_zero:
            gradients = {p: p.grad for p in model.parameters()}
            for parameter in gradients:
                parameter.grad = None
            try:
                self._dense = copy.deepcopy(model).cpu()
            finally:
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Note what the cut left."""
        if "dense" not in self.figures:
            return
        self._pruning = pruning
        self._validated = {}
        if pruning.dry_run and pruning.plan is not None:
            self.figures["planned"] = {"parameters": float(pruning.plan.info["parameters_after"])}
        else:
            self.figures["pruned"] = _size(pruning.model(pl_module))
        for stage, metrics in pruning.metrics.items():
            if stage in self.figures:
                self.figures[stage].update(metrics)
        for logger in trainer.loggers:
            flat = {f"pruning/{s}/{n}": v for s, values in self.figures.items() for n, v in values.items()}
            logger.log_metrics(flat, step=trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what the validation of the pruned model measured."""
        if self._pruning is not None and not trainer.sanity_checking:
            seen = self.figures["dense"]
            self._validated = {n: float(v) for n, v in trainer.callback_metrics.items() if n in seen}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, print and write."""
        if self._pruning is None or not trainer.is_global_zero:
            return
        model = self._pruning.model(pl_module)
        if not self._pruning.dry_run:
            self.figures["healed"] = {**_size(model), **self._validated}
            if self._dense is not None:
                self._measure(model)
            healed = {f"pruning/healed/{n}": v for n, v in self.figures["healed"].items()}
            for logger in trainer.loggers:
                logger.log_metrics(healed, step=trainer.global_step)
        self._dense = None
        self._write(trainer, model)
        self._print()

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, as plain data."""
        return {"figures": {stage: dict(values) for stage, values in self.figures.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the figures of a checkpoint."""
        self.figures = {stage: dict(values) for stage, values in state_dict["figures"].items()}

    def _measure(self, model: nn.Module) -> None:
        assert self._dense is not None
        device = next(model.parameters()).device
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.randint(0, vocabulary, (1, self.speed_tokens), generator=torch.Generator().manual_seed(0)).to(
            device
        )
        measured = tokens_per_second({"dense": self._dense.to(device), "healed": model}, ids)
        for stage, values in measured.items():
            self.figures[stage]["tokens_per_second"] = statistics.median(values)
        ratios = [h / d for d, h in zip(measured["dense"], measured["healed"], strict=True)]
        self.figures["healed"]["speedup"] = statistics.median(ratios)

    def _write(self, trainer: pl.Trainer, model: nn.Module) -> None:
        pruning = self._pruning
        if pruning is None or pruning.plan is None:
            return
        folder = self.output_dir or Path(trainer.default_root_dir) / "pruning"
        self.output_dir = folder
        pruning.plan.save(folder / "plan.json")
        if pruning.table is not None:  # None in a run that was resumed after the last cut
            pruning.table.to_csv(folder / "group_table.csv")
            with replacing(folder / "kept.png") as temporary:
                kept_figure(pruning.plan, pruning.table).savefig(temporary, dpi=130)
        if self.save_model and not pruning.dry_run:
            try:
                save_pruned(model, folder / "model", tokenizer=self._load_tokenizer(trainer))
            except PruningError as error:
                rank_zero_warn(f"The pruned model was not saved: {error}")
        write_text(folder / "report.json", json.dumps(self.figures, indent=1) + "\n")

    def _load_tokenizer(self, trainer: pl.Trainer) -> Any:
        source = self.tokenizer or getattr(getattr(trainer.datamodule, "hparams", None), "tokenizer", None)  # type: ignore[attr-defined]
        return None if source is None else load_tokenizer(source)

    @rank_zero_only
    def _print(self) -> None:
        console = Console()
        console.print(report_table(self.figures))
        console.print(f"Written to {self.output_dir}", soft_wrap=True)


_LABELS = {"parameters": "parameters", "megabytes": "weights on disk, MB", "tokens_per_second": "tokens / s (forward)"}


def report_table(figures: Mapping[str, Mapping[str, float]]) -> Table:
    """The figures by stage as a rich table, a row a figure."""
    table = Table(title="Structured pruning")
    table.add_column("")
    for stage in figures:
        table.add_column(stage, justify="right")
    table.add_column("last / dense", justify="right")
    names = list(dict.fromkeys(name for values in figures.values() for name in values if name != "speedup"))
    last = list(figures)[-1]
    for name in names:
        cells = [_format(name, values.get(name)) for values in figures.values()]
        ratio = ""
        if name in figures["dense"] and name in figures[last] and figures["dense"][name]:
            value = (
                figures[last]["speedup"]
                if name == "tokens_per_second"
                else figures[last][name] / figures["dense"][name]
            )
            ratio = f"{value:.3f}"
        table.add_row(_LABELS.get(name, name), *cells, ratio)
    return table


def _format(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "parameters":
        return f"{value:,.0f}"
    return f"{value:,.1f}" if name in ("megabytes", "tokens_per_second") else f"{value:.4g}"


def _size(model: nn.Module) -> dict[str, float]:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"parameters": float(count_parameters(model)), "megabytes": size / 1e6}


def kept_figure(plan: PruningPlan, table: GroupTable) -> Figure:
    """A picture of what each layer kept: a bar a layer for every kind of group, with the dense number behind it.

    Args:
        plan: The plan; of all stages, if there were several.
        table: The group table of the last stage, for the layers that the plan leaves whole.
    """
    sizes = {
        key: (int(layer), int(size)) for key, layer, size in zip(table.keys, table.layers, table.sizes, strict=True)
    }
    kept = {key: size for key, (_, size) in sizes.items()}
    for entry in plan.entries:
        sizes[entry.key] = (entry.layer, entry.size)
        kept[entry.key] = len(entry.kept)
    kinds = list(dict.fromkeys(kind for _, kind in sizes))
    figure = Figure(figsize=(9, 2.6 * len(kinds)), layout="constrained")
    for axis, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        keys = [key for key in sizes if key[1] == kind]
        layers = [sizes[key][0] for key in keys]
        dense = [sizes[key][1] for key in keys]
        axis.bar(layers, dense, color="#d9dee4", label="dense")
        axis.bar(layers, [kept[key] for key in keys], color="#2a6f97", label="kept")
        share = sum(kept[key] for key in keys) / sum(dense)
        axis.set_title(f"{kind}: {share:.1%} of the groups kept", loc="left", fontsize=10)
        axis.set_ylabel("groups")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xticks(layers[:: 1 + len(layers) // 40])
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("layer")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure
