"""Errors in the middle of a step or of recovery: what goes on, and what is saved, is as it should be."""

from __future__ import annotations

import contextlib
import resource

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from test_pruning import fit, pruning
from test_recovery import Adapted, Recording, Taught
from test_resume import Repeatable

from lit_prune import PruningError
from lit_prune.callbacks import Distillation, LearnedGates, LearningRateRewarmup, LoRARecovery


class Odd(Repeatable):
    """Fails in a training step, which Lightning runs within the optimizer's."""

    def __init__(self, at):
        super().__init__()
        self.at, self.steps = at, 0

    def training_step(self, batch, batch_idx):
        if self.training:
            self.steps += 1
            if self.steps == self.at:
                raise ZeroDivisionError("odd")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        self.optimizer = Recording(self.parameters(), lr=0.01)
        self.optimizer.rates = []
        return self.optimizer


class OddTaught(Taught):
    """Fails in a training step after the cut."""

    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 9:
            raise ZeroDivisionError("odd")
        return result


@pytest.mark.parametrize(
    "callback",
    [Distillation, lambda: Distillation(hidden_weight=1.0), LearningRateRewarmup, lambda: LearnedGates(steps=6)],
    ids=["distillation", "hidden states", "warm-up", "gates"],
)
def test_an_error_leaves_no_hooks_and_holds_no_graphs(tmp_path, callback):
    module, recovery = OddTaught(), callback()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, pruning(step=6), recovery, module=module)
    assert module.trainer.global_step == 9
    assert "training_step" not in vars(module)
    for part in module.modules():
        # transformers leaves hooks of its own
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        assert not [h for h in hooks if h.__module__.startswith("lit_prune")]
    for optimizer in module.trainer.optimizers:
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not getattr(recovery, "_terms", [])


class Catching(Odd):
    """Steps by hand, and leaves out a step that fails."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        def closure():
            self.optimizers().zero_grad()
            self.manual_backward(loss := Odd.training_step(self, batch, batch_idx))
            return loss

        with contextlib.suppress(ZeroDivisionError):
            self.optimizers().step(closure)


def test_a_checkpoint_of_an_error_in_a_warm_up_has_the_learning_rate_of_the_schedule(tmp_path):
    saves = OnExceptionCheckpoint(tmp_path / "odd")
    with pytest.raises(ZeroDivisionError):
        warmup = LearningRateRewarmup(steps=10)
        fit(tmp_path, pruning(epoch=0), warmup, saves, module=Odd(3), enable_checkpointing=True)
    saved = torch.load(saves.ckpt_path, weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01


def test_a_warm_up_goes_on_after_an_error_that_the_module_caught(tmp_path):
    module = Catching(3)
    fit(tmp_path, pruning(epoch=0), LearningRateRewarmup(steps=10), module=module)
    # the step that failed does not count
    expected = [0.01 * min(1, k / 10) for k in range(1, len(module.optimizer.rates) + 1)]
    assert module.optimizer.rates == pytest.approx(expected) and len(expected) > 10
    assert module.optimizer.param_groups[0]["lr"] == 0.01


def test_other_groups_than_before_are_refused_by_name_and_the_optimizer_stays(tmp_path):
    class Filtering(Adapted):
        def configure_optimizers(self):
            trained = [p for p in self.parameters() if p.requires_grad]
            groups = [[p for p in trained if p.dim() == d] for d in (1, 2)]
            return torch.optim.SGD([{"params": g} for g in groups if g], lr=0.01)

    module = Filtering()
    with pytest.raises(PruningError, match=r"Filtering gave parameter groups \[1\] .* expected \[2\]"):
        fit(tmp_path, pruning(), LoRARecovery(r=2), module=module)
    assert len(module.trainer.strategy.optimizers[0].param_groups) == 2


def test_a_full_disk_does_not_end_a_run_that_copies_its_teacher(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    callback, teacher = pruning(), Distillation(directory=tmp_path / "copy")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.warns(UserWarning, match=r"was not written to .*teacher\.safetensors"):
            fit(tmp_path, callback, teacher, module=Taught())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert callback.stages_done == 1
    assert not list((tmp_path / "copy").glob("*"))


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (lambda: Distillation(teacher="/nowhere/teacher.gguf"), FileNotFoundError, "No file at"),
        (lambda: Distillation(teacher="/nowhere"), Exception, "'/nowhere'"),
        (lambda: LoRARecovery(target_modules=["down_proj", "dwon_proj"]), PruningError, r"\['dwon_proj'\] are no ends"),
        *(
            (
                lambda n=n: LoRARecovery(target_modules=["down_proj", n]),
                PruningError,
                f"{n}' .*, which peft cannot adapt",
            )
            for n in ("input_layernorm", "mlp", "model.norm", "layers", "act_fn")
        ),
    ],
)
def test_what_recovery_cannot_do_is_refused_before_training(tmp_path, callback, error, message):
    module = Odd(1)
    with pytest.raises(error, match=message):
        fit(tmp_path, pruning(), callback(), module=module)
    assert module.steps == 0
