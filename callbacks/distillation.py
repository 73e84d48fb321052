"""Distillation: the dense model teaches the pruned one."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune._files import replacing
from lit_prune.arguments import (
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    TEXT,
    Rule,
    choice,
    optional,
)
from lit_prune.calibration.divergence import counted, masked_mean, mixed_loss, output_divergence, without_labels
from lit_prune.calibration.divergence import distillation_loss as distillation_loss
from lit_prune.calibration.token_masks import output_mask
from lit_prune.callbacks.manual_optimization import replaced
from lit_prune.callbacks.output import check_output, warn_instead
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.ranks import on_all_ranks
from lit_prune.callbacks.renewal import _any_cut, _pruning_callbacks
from lit_prune.callbacks.runs import PerModule
from lit_prune.callbacks.teacher import fingerprint, frozen, hidden_states, run_teacher, taught_layers
from lit_prune.errors import ArgumentValueError, PruningError, UnsupportedStrategyError
from lit_prune.io.lightning_checkpoint import plan_digest
from lit_prune.io.sources import check_source, load_model

_DTYPES = ("float32", "bfloat16", "float16", "float64")


_WEIGHT: Rule[float] = Rule("a number above 0, at most 1", Annotated[float, Field(gt=0, le=1)])


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over layers of the squared error of hidden states, relative to the mean square of the teacher's.

    Args:
        student: Hidden states after each layer, shape ``(batch, tokens, hidden)``; cutting leaves their width as it was.
        teacher: The same of the teacher.
        mask: Tokens that count, shape ``(batch, tokens)``.
    """
    losses = []
    for s, t in zip(student, teacher, strict=True):
        s, t = counted(s.float(), mask), counted(t.float(), mask)
        error = (s - t).square().mean(-1)
        losses.append(masked_mean(error, mask) / masked_mean(t.square().mean(-1), mask))
    return torch.stack(losses).mean()


def _check_logits(output: Any) -> None:
    """Raise PruningError if an output has no logits."""
    if getattr(output, "logits", None) is None:
        raise PruningError(
            f"Distillation compares logits; expected an output of the model with an attribute of that name, found a"
            f" {type(output).__name__} without one."
        )


def _check_before_cut(trainer: pl.Trainer) -> Callable[..., None]:
    """A hook for a model that is calibrated; its outputs in validation may be others."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if not trainer.validating:
            _check_logits(output)

    return hook


@dataclass(frozen=True)
class _Teaching:
    """Whether the cut, and with it the teaching, has begun, and which copy of the dense model teaches."""

    active: bool = False
    copy: str | None = None


class Distillation(Callback):
    """Add a distillation loss from the dense model to the pruned model's own loss.

    From the cut on, the loss of every training step is ``(1 - weight) * own loss + weight * distillation_loss
    + hidden_weight * hidden_state_loss``, logged as ``distillation_loss`` (and ``hidden_state_loss``). Calibration for
    later cuts runs on the module's own loss alone.

    The distillation loss is the divergence of the classes (of pixels, in a map of logits) or of each label
    (``config.problem_type="multi_label_classification"``) that the logits describe, and the squared error of a regression's: see
    :func:`lit_prune.calibration.divergence.output_divergence`. The model's output has to have ``logits``.

    The teacher is a frozen copy of the model as it was before the first cut, or a model that lies on disk and is loaded
    once. A copy costs the memory of the dense weights and, for a run that is to be resumed, a ``directory`` to be written
    to once: checkpoints do not carry it.

    Args:
        weight: Weight of the distillation loss, in (0, 1].
        temperature: Temperature of the softmaxes, positive.
        hidden_weight: Weight of the loss on hidden states; 0 leaves them out. It needs a model that takes
            ``output_hidden_states``, and kinds without ``"hidden"``.
        teacher: A directory in Hugging Face format, hub name, GGUF file or ``package:NAME`` to load the teacher from, in
            place of copying the dense model.
        directory: Where to keep the copy's weights for resumed runs, as ``teacher.safetensors``.
        dtype: Data type of the teacher's weights, and of what it is given, ``"bfloat16"`` for instance to halve its memory; the
            model's own if ``None``.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range, or both ``teacher`` and ``directory`` are given.

    Example::

        Trainer(callbacks=[StructuredPruning(), Distillation(weight=0.7, temperature=2.0)])
    """

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 2.0,
        hidden_weight: float = 0.0,
        teacher: str | None = None,
        directory: str | Path | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = _WEIGHT.check("weight", weight)
        self.temperature = POSITIVE.check("temperature", temperature)
        self.hidden_weight = NOT_NEGATIVE.check("hidden_weight", hidden_weight)
        self.teacher = optional(TEXT).check("teacher", teacher)
        self.directory = optional(PATH).check("directory", directory)
        if teacher is not None and directory is not None:
            raise ArgumentValueError(
                f"A teacher from disk ({teacher!r}) is not copied: leave directory={str(directory)!r} out."
            )
        name = optional(choice(*_DTYPES)).check("dtype", dtype)
        self.dtype = None if name is None else getattr(torch, name)
        self._state: PerModule[_Teaching] = PerModule(_Teaching)
        self._model: nn.Module | None = None
        self._held: str | None = None
        self._terms: list[tuple[Tensor, Tensor | None]] = []
        self._undo: list[Callable[[], None]] = []
        self._checking: RemovableHandle | None = None

    @property
    def _file(self) -> Path | None:
        return None if self.directory is None else self.directory / "teacher.safetensors"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the Trainer leaves room for another loss."""
        # an error ends a fit without teardown
        self._detach()
        self._state.begin(pl_module)
        if stage != "fit":
            return
        if is_a(trainer.strategy, ModelParallelStrategy):
            raise UnsupportedStrategyError(
                "Distillation holds a whole teacher on every process, which ModelParallelStrategy is there to avoid. Use DDP"
                " or one device, or distil in a run of its own."
            )
        if not pl_module.automatic_optimization:
            raise PruningError(
                f"Distillation adds to the loss that training_step returns, and {type(pl_module).__name__} optimizes by"
                " hand (automatic_optimization=False). Call lit_prune.callbacks.distillation.distillation_loss in its step."
            )

    @on_all_ranks("the checks before training")
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the copy can be written or the teacher is there, and that there are hidden states to compare.

        Raises:
            ArgumentValueError: If ``hidden_weight`` is given where hidden channels are removed.
            PruningError: If it is given for a model that takes no ``output_hidden_states``.
        """
        if self.hidden_weight:
            self._check_hidden_states(trainer, pl_module)
        if self.directory is not None:
            check_output(trainer, self.directory)
        if self.teacher is not None:
            check_source(self.teacher)

    def _check_hidden_states(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for pruning in _pruning_callbacks(trainer):
            if pruning.config.limits.hidden:
                raise ArgumentValueError(
                    "Hidden states that lose channels cannot be compared with the teacher's; expected hidden_weight=0 where"
                    f" kinds has 'hidden', found hidden_weight={self.hidden_weight}."
                )
            model = pruning.model(pl_module)
            parameters = inspect.signature(model.forward).parameters.values()
            if not any(p.name == "output_hidden_states" or p.kind is p.VAR_KEYWORD for p in parameters):
                raise PruningError(
                    f"The forward of {type(model).__name__} takes no output_hidden_states, so Distillation has none to compare;"
                    " use hidden_weight=0."
                )

    def on_pruning_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Copy the dense model, before the first cut, and check in calibration that its outputs can be compared."""
        if pruning.dry_run:
            return
        self._copy(trainer, pl_module, pruning)
        if not self._undo:
            self._stop_checking()
            self._checking = pruning.model(pl_module).register_forward_hook(_check_before_cut(trainer))

    def _copy(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        copied = pruning.stages_done > 0 and self._state.value.copy is not None
        if copied or self.teacher is not None:
            return
        self._model = frozen(copy.deepcopy(pruning.model(pl_module)), pl_module.device, self.dtype)
        self._held = fingerprint(self._model)
        self._state.value = _Teaching(copy=self._held)
        if self._file is not None and trainer.is_global_zero:
            with (
                warn_instead(f"The copy that a resumed run needs was not written to {self._file}"),
                replacing(self._file) as name,
            ):
                save_weights(self._model, name, metadata={"copy": self._held})

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Start distillation."""
        del trainer
        self._stop_checking()
        if not pruning.dry_run:
            self._state.value = replace(self._state.value, active=True)
            if not self._undo:
                self._attach(pl_module, pruning.model(pl_module))

    def on_pruning_load_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        pruning: StructuredPruning,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Take the copy of a run that is being resumed from disk, while the model still has the dense one's shapes."""
        states = checkpoint.get("callbacks", {})
        teaching = states.get(self.state_key, {})
        cut = states.get(pruning.state_key, {}).get("stages_done", 0) > 0
        wanted = teaching.get("copy")
        if not (cut and (wanted or teaching.get("active"))) or self.teacher is not None or not trainer.training:
            return
        if wanted is not None and wanted == self._held:
            return
        if self._file is None or not self._file.exists():
            raise PruningError(
                f"The checkpoint is of a run that learns from a copy of the dense model, which is not at {self._file}. Give"
                " Distillation the directory that the run wrote it to, or teacher= to load one."
            )
        with safe_open(str(self._file), "pt") as file:
            found = (file.metadata() or {}).get("copy")
        if wanted != found:
            raise PruningError(
                f"The copy of the dense model at {self._file} is of another model than that of the checkpoint's run (a later"
                " run has written over it). Give Distillation a directory of its own for every run, or teacher= to load one."
            )
        model = pruning.model(pl_module)
        state = checkpoint["callbacks"][pruning.state_key]
        if plan_digest(model) != state["digests"]["start"]:
            raise PruningError(
                "To resume with a teacher, give the module as it was when the run began, not a pruned one."
            )
        self._model = copy.deepcopy(model)
        load_weights(self._model, str(self._file))
        frozen(self._model, pl_module.device, self.dtype)
        self._held = wanted

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue distillation in a resumed run."""
        if not _any_cut(trainer):
            self._state.reset()
        elif self._state.value.active and not self._undo:
            self._attach(pl_module, _pruning_callbacks(trainer)[0].model(pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        del trainer, pl_module, exception
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        del trainer, pl_module, stage
        self._detach()

    def _stop_checking(self) -> None:
        if self._checking is not None:
            self._checking.remove()
            self._checking = None

    def _detach(self) -> None:
        self._stop_checking()
        self._terms.clear()
        while self._undo:
            self._undo.pop()()

    def _attach(self, pl_module: pl.LightningModule, model: nn.Module) -> None:
        if self.teacher is None and (self._model is None or self._held != self._state.value.copy):
            raise PruningError(
                "Distillation does not hold the copy of the dense model that this run learns from: it has copied another"
                " model since. Use one Distillation for each run, or resume from a checkpoint with directory=."
            )
        if self._model is None:
            assert self.teacher is not None
            dtype = self.dtype or next(model.parameters()).dtype
            self._model = frozen(load_model(self.teacher, dtype=dtype), pl_module.device, self.dtype)
        self._model.to(pl_module.device)
        if self.hidden_weight:
            handle = model.register_forward_pre_hook(self._ask_for_hidden_states(pl_module), with_kwargs=True)
            self._undo.append(handle.remove)
        self._undo.append(model.register_forward_hook(self._compare(pl_module), with_kwargs=True).remove)
        own = pl_module.training_step

        @functools.wraps(own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._terms.clear()
            return self._added(pl_module, own(*args, **kwargs))

        stack = contextlib.ExitStack()
        stack.enter_context(replaced(pl_module, "training_step", training_step))
        self._undo.append(stack.close)

    def _ask_for_hidden_states(self, pl_module: pl.LightningModule) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return (args, {**kwargs, "output_hidden_states": True}) if pl_module.training else None

        return hook

    def _compare(self, pl_module: pl.LightningModule) -> Callable[..., None]:
        def hook(student: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            # calibration and validation run in eval mode
            if not pl_module.training:
                return
            assert self._model is not None
            _check_logits(output)
            taught = run_teacher(self._model, self.dtype, args, without_labels(student, kwargs))
            mask = output_mask(student, args, kwargs, output.logits.shape[:-1])
            kl = output_divergence(student, output.logits, taught.logits, self.temperature, mask)
            hidden = None
            if self.hidden_weight:
                states = hidden_states(taught)
                states = [states[layer] for layer in taught_layers(student, self._model, len(states))]
                mask = output_mask(student, args, kwargs, states[0].shape[:-1])
                hidden = hidden_state_loss(hidden_states(output), states, mask)
            self._terms.append((kl, hidden))

        return hook

    def _added(self, pl_module: pl.LightningModule, output: Any) -> Any:
        if output is None or not pl_module.training:
            return output
        if not self._terms:
            raise PruningError(
                "training_step did not run the forward of the model that was pruned (it may call parts of it), so there is"
                " nothing for Distillation to compare. Call the model itself."
            )
        loss = output["loss"] if isinstance(output, Mapping) else output
        kl = torch.stack([k for k, _ in self._terms]).mean()
        pl_module.log("distillation_loss", kl.detach())
        total = mixed_loss(loss, kl, self.weight)
        hidden = [h for _, h in self._terms if h is not None]
        if hidden:
            mean = torch.stack(hidden).mean()
            pl_module.log("hidden_state_loss", mean.detach())
            total = total + self.hidden_weight * mean
        self._terms.clear()
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def state_dict(self) -> dict[str, Any]:
        """Whether distillation has started."""
        return asdict(self._state.value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self._state.value = _Teaching(state_dict["active"], state_dict.get("copy"))
