"""Every kind of loop: a pruned run equals a dense one whose removed groups are zero from the same moment on.

The oracle is a run of the dense model that never calls surgery: at the moment of the cut a callback sets the weights of
the removed groups, and the optimizer's state for them, to zero. Their gradients are zero from then on, so the kept weights
have to develop alike. See docs/trainer_matrix.md.
"""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from test_pruning import corpus, fit, pruning
from test_resume import Repeatable, quiet
from torch.utils.data import DataLoader, IterableDataset
from transformers.optimization import Adafactor as HubAdafactor

from conftest import tiny
from lit_prune import CalibrationError, PruningError, apply_plan, find_group_sets, get_plan
from lit_prune.errors import UnsupportedCallbackError


class Base(Repeatable):
    lr = 0.01

    def training_step(self, batch, batch_idx):
        return self.inner["lm"](input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Adam(Base):
    def configure_optimizers(self):
        # a large eps, so that rounding in tiny gradients is not blown up to whole steps
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-2, amsgrad=True)


class Factored(Base):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=1e-3)


class Groups(Base):
    def configure_optimizers(self):
        parameters = list(self.named_parameters())
        return torch.optim.SGD(
            [
                {"params": [p for n, p in parameters if "mlp" in n], "lr": 0.02},
                {"params": [p for n, p in parameters if "mlp" not in n], "weight_decay": 0.1},
            ],
            lr=0.005,
            momentum=0.9,
        )


class Manual(Base):
    """Two optimizers, stepped by hand, each with a scheduler."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.inner["lm"](input_ids=batch, labels=batch).loss
        if not self.training:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            scheduler.step()
        return loss

    def configure_optimizers(self):
        parameters = list(self.named_parameters())
        attention = torch.optim.SGD([p for n, p in parameters if "attn" in n], lr=0.01, momentum=0.9)
        rest = torch.optim.AdamW([p for n, p in parameters if "attn" not in n], lr=1e-3, eps=1e-2)
        return [attention, rest], [torch.optim.lr_scheduler.ExponentialLR(o, 0.95) for o in (attention, rest)]


class ByStep(Base):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, 18), "interval": "step"}
        ]


class ByEpoch(Base):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "epoch"}]


class ByPlateau(Base):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Checkpointing(Base):
    def __init__(self):
        super().__init__()
        self.inner["lm"].gradient_checkpointing_enable({"use_reentrant": False})
        self.inner["lm"].train()


class CompiledModel(Base):
    def __init__(self):
        super().__init__()
        torch._dynamo.reset()
        self.inner["lm"].compile(backend="eager")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(corpus(24, 0))


class Streaming(Base):
    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=4)


class Dicts(Base):
    def train_dataloader(self):
        return DataLoader([{"input_ids": ids, "labels": ids} for ids in corpus(24, 0)], batch_size=4)

    def training_step(self, batch, batch_idx):
        return {"loss": self.inner["lm"](**batch).loss, "extra": 1}


class Tuples(Dicts):
    """Several dataloaders, combined by Lightning."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        return {"a": loader, "b": loader}

    def training_step(self, batch, batch_idx):
        batch = batch[0] if isinstance(batch, tuple) else batch
        return self.inner["lm"](**batch["a"]).loss + 0.5 * self.inner["lm"](**batch["b"]).loss


CASES = {
    "SGD": (Base, {}, {}),
    "AdamW": (Adam, {}, {}),
    "param groups": (Groups, {}, {}),
    "two optimizers by hand": (Manual, {}, {}),
    "scheduler by step": (ByStep, {}, {}),
    "scheduler by epoch": (ByEpoch, {}, {}),
    "scheduler by plateau": (ByPlateau, {}, {}),
    "accumulate": (Base, {"accumulate_grad_batches": 2}, {}),
    "accumulate unevenly": (Base, {"accumulate_grad_batches": 4}, {"step": 3}),
    "clip norm": (Base, {"gradient_clip_val": 0.1}, {}),
    "clip value": (Base, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}),
    "bf16-mixed": (Base, {"precision": "bf16-mixed"}, {}),
    "bf16-true": (Base, {"precision": "bf16-true"}, {}),
    "16-mixed": (Base, {"plugins": [MixedPrecision("16-mixed", "cpu")]}, {}),
    "64-true": (Adam, {"precision": "64-true"}, {}),
    "gradient checkpointing": (Checkpointing, {}, {}),
    "torch.compile": (CompiledModel, {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1}, {}),
    "overfit_batches": (Base, {"overfit_batches": 2}, {}),
    "limit_train_batches": (Base, {"limit_train_batches": 0.5}, {}),
    "iterable dataset": (Streaming, {}, {}),
    "dict batches": (Dicts, {}, {}),
    "several dataloaders": (Tuples, {}, {}),
    "val_check_interval": (Base, {"val_check_interval": 0.5}, {"step": 8}),
    "no validation": (Base, {"limit_val_batches": 0}, {}),
    "at step 0": (Base, {}, {"step": 0}),
    "at epoch 0": (Base, {}, {"epoch": 0}),
    "reload dataloaders": (Base, {"reload_dataloaders_every_n_epochs": 1}, {}),
    "inference_mode": (Base, {"inference_mode": False}, {}),
    "detect_anomaly": (Base, {"detect_anomaly": True}, {}),
}
LOOSE = {"bf16-mixed": 0.1, "bf16-true": 0.2, "16-mixed": 0.02}


class Mask(pl.Callback):
    """The oracle: sets the removed groups of a dense model, and the state for them, to zero."""

    def __init__(self, plan, epoch=None, step=None):
        self.plan, self.epoch, self.step = plan, epoch, step

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.mask(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.step is not None and trainer.global_step >= self.step:
            self.mask(trainer, pl_module)

    @torch.no_grad()
    def mask(self, trainer, pl_module):
        self.epoch = self.step = None
        model = pl_module.inner["lm"]
        kept = {e.key: e.kept for e in self.plan.entries}
        for group_set in find_group_sets(model):
            removed = group_set.kept_to_removed(kept.get(group_set.key, range(group_set.size)))
            for part in group_set.slices:
                parameter, index = model.get_parameter(part.parameter), part.index[removed].flatten()
                states = [o.state.get(parameter, {}) for o in trainer.optimizers]
                for value in (parameter, *(v for s in states for v in s.values() if v.shape == parameter.shape)):
                    value.index_fill_(part.dim, index.to(value.device), 0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_run_equals_a_dense_one_with_the_removed_groups_at_zero(tmp_path, name):
    kind, options, when = CASES[name]
    callback = pruning(repair=None, **when)
    trainer, module = fit(tmp_path, callback, module=kind(), **options)
    assert callback.stages_done == 1
    model = module.inner["lm"]
    optimized = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    oracle_when = when or {"epoch": 1}
    options = {**options, "plugins": [MixedPrecision("16-mixed", "cpu")]} if "plugins" in options else options
    _, dense = fit(tmp_path, Mask(callback.plan, **oracle_when), module=kind(), **options)
    apply_plan(dense.inner["lm"], callback.plan)
    tolerance = LOOSE.get(name, 1e-4)
    start = tiny("llama")
    apply_plan(start, callback.plan)
    for (key, value), expected, first in zip(
        model.state_dict().items(), dense.inner["lm"].state_dict().values(), start.state_dict().values(), strict=True
    ):
        # relative to how far training moved the weights, so that an equality that says nothing is noticed
        moved = (expected.double() - first).norm()
        assert moved > 0, key
        assert (value.double() - expected.double()).norm() <= tolerance * moved + 1e-6 * first.norm(), key


class Faint(Base):
    """A loss whose gradients vanish in float16, unless they are scaled."""

    def training_step(self, batch, batch_idx):
        return 1e-6 * super().training_step(batch, batch_idx)


def test_gradients_of_calibration_do_not_vanish_in_float16(tmp_path):
    """Importance is that of float32, to the precision of float16."""
    tables = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu")]):
        callback = pruning(importance="taylor", step=0)
        fit(tmp_path, callback, module=Faint(), max_epochs=1, limit_train_batches=1, plugins=plugins)
        tables.append(torch.as_tensor(callback.table.importance))
    assert (tables[1] - tables[0]).norm() < 0.02 * tables[0].norm()


def test_fisher_values_in_float16_are_not_multiplied_by_the_square_of_the_scale(tmp_path):
    """They are those of float32; a scale of 65,536 / 16 would show as a factor of 16 million."""
    tables = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu")]):
        callback = pruning(importance="fisher", step=0)
        fit(tmp_path, callback, module=Faint(), max_epochs=1, limit_train_batches=1, plugins=plugins)
        tables.append(torch.as_tensor(callback.table.importance))
    assert (tables[1] - tables[0]).norm() < 0.05 * tables[0].norm()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_every_block_runs_in_the_precision_of_the_trainer(tmp_path, precision):
    """Also where it is run on its own, by compensation and repair."""
    seen = set()

    class Watched(Base):
        def on_fit_start(self):
            for name, module in self.named_modules():
                if name.endswith("down_proj"):
                    module.register_forward_hook(lambda _, __, y: seen.add((y.dtype, torch.get_default_dtype())))

    callback = pruning(importance="fisher", step=0, repair="least_squares")
    fit(tmp_path, callback, module=Watched(), max_epochs=1, limit_train_batches=1, precision=precision)
    default = torch.bfloat16 if precision == "bf16-true" else torch.float32
    # the cut module of a repair is a copy with the hooks of its original
    assert seen == {(torch.bfloat16, default)}


def test_adafactor_keeps_its_factored_state(tmp_path):
    """Row and column statistics are means over what is cut, so the oracle above does not hold: the state's shapes do."""
    callback = pruning()
    trainer, module = fit(tmp_path, callback, module=Factored(), max_epochs=4)
    optimizer = trainer.optimizers[0]
    for parameter in module.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 24
        if parameter.dim() == 2:
            assert state["row_var"].shape == (parameter.shape[0], 1)
            assert state["col_var"].shape == (1, parameter.shape[1])
    assert trainer.callback_metrics["val_loss"] < callback.metrics["pruned"]["val_loss"]


def test_an_optimizer_state_of_another_shape_is_refused_and_nothing_is_cut(tmp_path):
    class Hub(Base):
        def configure_optimizers(self):
            return HubAdafactor(self.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)

    module = Hub()
    with pytest.raises(PruningError, match=r"Adafactor state 'exp_avg_sq_row'.*prune before training"):
        fit(tmp_path, pruning(), module=module)
    assert get_plan(module.inner["lm"]) is None
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in Base().parameters())
    fit(tmp_path, pruning(step=0), module=Hub())


def test_a_compiled_module_is_calibrated_repaired_and_compiled_again(tmp_path):
    """Calibration and repair rest on hooks, which compiled code would not call; afterwards the smaller graph is compiled."""
    torch._dynamo.reset()
    graphs = []

    class Count(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        on_train_end = on_train_epoch_start

    module, plain = Base(), Base()
    compiled, eager = (pruning(importance="wanda", validate=False) for _ in range(2))
    options = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    quiet(compiled, Count(), **options).fit(torch.compile(module, backend="eager"))
    quiet(eager, **options).fit(plain)
    assert compiled.plan == eager.plan
    assert graphs[0] < graphs[1] < graphs[2]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-3, atol=1e-5)


class Inductor(Base):
    def __init__(self):
        super().__init__()
        torch._dynamo.reset()
        self.inner["lm"].compile()


@pytest.mark.slow
def test_what_inductor_compiled_is_compiled_again(tmp_path):
    graphs = []

    class Count(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        on_train_end = on_train_epoch_start

    options = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1}
    _, compiled = fit(tmp_path, pruning(), Count(), module=Inductor(), **options)
    _, plain = fit(tmp_path, pruning(), module=Base(), **options)
    assert graphs[0] < graphs[1] < graphs[2]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_accumulation_that_changes_and_other_callbacks(tmp_path):
    callback = pruning(step=4)
    trainer, _ = fit(
        tmp_path,
        callback,
        GradientAccumulationScheduler({0: 1, 1: 2}),
        LearningRateMonitor(),
        module=ByStep(),
        logger=CSVLogger(tmp_path),
    )
    assert callback.stages_done == 1
    assert trainer.global_step == 6 + 3 + 3


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging])
def test_weight_averaging_is_cut_along_and_starts_again(tmp_path, kind):
    """The average at the end is that of the weights after the cut, added up by hand, also in a resumed run."""
    seen = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if callback.stages_done:
                seen.append({k: v.clone() for k, v in pl_module.state_dict().items() if k.startswith("inner")})

    def average():
        return kind(decay=0.9) if kind is EMAWeightAveraging else kind()

    callback = pruning()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    _, module = fit(tmp_path, callback, average(), Record(), saver, module=Adam(), enable_checkpointing=True)
    assert len(seen) == 12
    expected = {k: v.clone() for k, v in seen[0].items()}
    for number, weights in enumerate(seen[1:], 1):
        for key, value in weights.items():
            share = 0.1 if kind is EMAWeightAveraging else 1 / (number + 1)
            expected[key] += share * (value - expected[key])
    for key, value in expected.items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    for epoch in (0, 1):
        again = Adam()
        quiet(pruning(), average(), max_epochs=3).fit(
            again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True
        )
        for key in expected:
            assert torch.equal(again.state_dict()[key], module.state_dict()[key]), (epoch, key)


class Holding(pl.Callback):
    """Holds something of the model from the start."""

    def __init__(self, take):
        self.take = take

    def on_train_start(self, trainer, pl_module):
        self.held = self.take(pl_module)


class Knowing(Holding):
    def on_pruning_end(self, trainer, pl_module, pruning):
        self.held = self.take(pl_module)


@pytest.mark.parametrize(
    "take",
    [
        lambda m: tiny("llama"),
        lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
    ],
    ids=["copy", "tensors by name"],
)
def test_callbacks_that_hold_copies_are_refused_unless_they_know(tmp_path, take):
    module = Base()
    with pytest.raises(UnsupportedCallbackError, match=r"Holding\.held holds .*on_pruning_end"):
        fit(tmp_path, pruning(), Holding(take), module=module)
    assert get_plan(module.inner["lm"]) is None
    fit(tmp_path, pruning(), Knowing(take))


@pytest.mark.parametrize(
    "take",
    [
        lambda m: m.inner["lm"],
        lambda m: m.inner["lm"].model.layers[0].mlp.up_proj.weight,
        lambda m: list(m.parameters()),
        lambda m: dict(m.named_parameters()),
    ],
    ids=["model", "parameter", "list", "dict"],
)
def test_callbacks_that_hold_the_model_or_its_parameters_follow(tmp_path, take):
    """Parameters are the same objects after the cut."""
    callback = Holding(take)
    _, module = fit(tmp_path, pruning(), callback, max_epochs=2)
    again = take(module)
    pairs = zip(again, callback.held, strict=True) if isinstance(again, list) else [(again, callback.held)]
    assert all(a is b or a == b for a, b in pairs)


def test_stochastic_weight_averaging_is_refused(tmp_path):
    with pytest.raises(UnsupportedCallbackError, match=r"StochasticWeightAveraging\._average_model holds a copy"):
        fit(tmp_path, pruning(), StochasticWeightAveraging(1e-2))


class OnlyValidation(Base):
    def train_dataloader(self):
        raise AssertionError("not to be asked for")


def test_validate_without_training_prunes_and_measures_the_pruned_model(tmp_path):
    callback = pruning(step=0)
    trainer, module = quiet(callback), Base()
    [measured] = trainer.validate(module, verbose=False)
    assert get_plan(module.inner["lm"]).digest() == callback.plan.digest()
    assert trainer.validate(module, verbose=False) == [measured]
    assert quiet().validate(Base(), verbose=False) != [measured]
    # the same plan as a fit that prunes at once
    again = pruning(step=0)
    fit(tmp_path, again, module=Base(), max_epochs=1)
    assert again.plan == callback.plan
    # and it trains on from there
    quiet(callback, max_epochs=1).fit(module)

    other = pruning(step=0, calibration_dataloader=DataLoader(corpus(24, 0), batch_size=4))
    quiet(other).validate(OnlyValidation(), verbose=False)
    assert other.plan == callback.plan
    later = pruning(epoch=1)
    quiet(later).validate(Base(), verbose=False)
    assert later.plan is None


def test_validate_with_no_data_to_calibrate_on_says_so():
    class NoTraining(Base):
        train_dataloader = pl.LightningModule.train_dataloader

    with pytest.raises(CalibrationError, match="calibration_dataloader"):
        quiet(pruning(step=0)).validate(NoTraining(), verbose=False)
