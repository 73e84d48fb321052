"""The life of the callback: stopped and resumed anywhere, several fits, several models, what a fit cannot do."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from test_pruning import corpus, pruning
from test_resume import MidEpoch, quiet
from torch.utils.data import DataLoader

from conftest import tiny
from lit_prune import PruningConfig, PruningError, PruningPlan, apply_plan, find_group_sets, get_plan, prune
from lit_prune.callbacks import Distillation, LearningRateRewarmup, LoRARecovery, PruningReport, Stage


class Small(MidEpoch):
    """Two layers, batches of 4 by a dataloader that can be resumed in the middle of an epoch; 6 batches an epoch."""

    def __init__(self):
        super().__init__()
        self.inner["lm"] = tiny("llama", num_hidden_layers=2)


def small(**options):
    return pruning(**{"calibration_batches": 2, "iterations": 1, "importance": "wanda", "repair": None, **options})


def same_weights(a, b):
    states = [{k: v for k, v in m.state_dict().items() if not k.startswith("accuracy")} for m in (a, b)]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# stopped and resumed


@pytest.mark.parametrize(
    ("limits", "every", "schedule"),
    [
        ({"max_epochs": 3}, 1, [Stage(0.2, epoch=1)]),
        ({"max_epochs": 3}, 3, [Stage(0.1, epoch=1), Stage(0.2, epoch=2)]),
        ({"max_steps": 18, "max_epochs": -1}, 3, [Stage(0.2, epoch=1)]),
        ({"max_epochs": 3, "accumulate_grad_batches": 6}, 1, [Stage(0.2, epoch=1)]),
    ],
)
def test_a_stage_by_epoch_comes_in_time_from_every_step_checkpoint(tmp_path, limits, every, schedule):
    """Lightning calls no on_train_epoch_start for the epoch after a checkpoint from an epoch's last batch."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    whole = Small()
    quiet(small(schedule=schedule), saver, enable_checkpointing=True, **limits).fit(whole)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        again, resumed = Small(), small(schedule=schedule)
        quiet(resumed, **limits).fit(again, ckpt_path=path, weights_only=True)
        assert resumed.stages_done == len(schedule), path.name
        assert again.losses == whole.losses[len(whole.losses) - len(again.losses) :], path.name
        assert same_weights(again, whole), path.name


class Stop(Exception):
    pass


class Stops(Callback):
    """Raises in the middle of the n-th validation around a cut, or where other callbacks are told of the n-th cut."""

    def __init__(self, where, number, error=Stop):
        self.where, self.number, self.error = where, number, error
        self.seen = 0

    def count(self, where):
        self.seen += where == self.where
        if where == self.where and self.seen == self.number:
            raise self.error

    def on_pruning_start(self, trainer, pl_module, pruning):
        self.pruning, pl_module.stops = pruning, self

    def on_pruning_end(self, trainer, pl_module, pruning):
        self.count("told")


class Watched(Small):
    stops = None

    def validation_step(self, batch, batch_idx):
        # of the validations after a cut, only the one just after it finds the stage done and the callbacks not told
        if self.stops is not None and batch_idx == 1 and self.stops.pruning.runs.current.unfinished:
            self.stops.count("validation")
        super().validation_step(batch, batch_idx)


SCHEDULE = [Stage(0.1, epoch=1), Stage(0.2, epoch=2)]


@pytest.mark.parametrize(
    ("where", "number", "error", "saver"),
    [
        ("validation", 1, Stop, lambda folder: OnExceptionCheckpoint(folder)),
        ("validation", 2, KeyboardInterrupt, lambda folder: OnExceptionCheckpoint(folder)),
        (
            "told",
            2,
            Stop,
            lambda folder: ModelCheckpoint(folder, "on_exception", save_on_exception=True, every_n_epochs=99),
        ),
    ],
)
def test_a_run_that_stops_just_after_a_cut_goes_on_from_its_checkpoint(tmp_path, where, number, error, saver):
    """Alone and with all that follows a cut: averages, re-warm-up, distillation, report."""

    def callbacks(name):
        return [
            pruning(calibration_batches=2, schedule=SCHEDULE, output_dir=tmp_path / name),
            EMAWeightAveraging(decay=0.5),
            LearningRateRewarmup(steps=10),
            Distillation(directory=tmp_path / "teacher"),
            PruningReport(tmp_path / name, save_model=False),
        ]

    whole = callbacks("whole")
    quiet(*whole, max_epochs=3).fit(expected := Small())
    stopped = callbacks("stopped")
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        quiet(*stopped, Stops(where, number, error), saver(tmp_path), max_epochs=3, enable_checkpointing=True).fit(
            Watched()
        )
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["callbacks"][stopped[0].state_key]
    assert state["plan"] is not None and state["stages_done"] == number
    resumed = callbacks("resumed")
    quiet(*resumed, max_epochs=3).fit(again := Small(), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert again.losses == expected.losses[6 * number :]
    assert same_weights(again, expected)
    assert resumed[0].metrics == whole[0].metrics
    assert resumed[-1].metrics == whole[-1].metrics and resumed[-1].timeline == whole[-1].timeline
    assert resumed[0].plan.digest() == PruningPlan.load(tmp_path / "resumed" / "plan.json").digest()
    assert resumed[0].plan.digest() == whole[0].plan.digest()


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_run_that_stops_while_it_calibrates_goes_on_from_its_checkpoint(tmp_path, iteration):
    """The checkpoint is of the start of an epoch, which Lightning would not run when resumed."""

    class Interrupted(Small):
        def training_step(self, batch, batch_idx):
            if not self.training and (size(self) < dense_size()) == (iteration == 2):
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    quiet(small(epoch=1, iterations=2), max_epochs=3).fit(expected := Small())
    stopped = small(epoch=1, iterations=2)
    with pytest.raises(SystemExit):
        trainer = quiet(stopped, OnExceptionCheckpoint(tmp_path), max_epochs=3, enable_checkpointing=True)
        trainer.fit(Interrupted())
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["callbacks"][stopped.state_key]
    assert state["plan"] is None and state["digests"]["now"] is None
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = quiet(small(epoch=1, iterations=2), saver, max_epochs=3, enable_checkpointing=True)
    trainer.fit(again := Small(), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert again.losses == expected.losses[6:]
    assert same_weights(again, expected)
    # and once more, from a checkpoint of the resumed run
    quiet(small(epoch=1), max_epochs=3).fit(third := Small(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert third.losses == expected.losses[12:]
    assert same_weights(third, expected)


# several fits, several models


def dense_size():
    return sum(p.numel() for p in Small().parameters())


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_one_callback_prunes_every_fold_alike(tmp_path):
    """Every fold equals a run with callbacks of its own, and its checkpoints carry its own plan from its own cut on."""

    def callbacks():
        return [small(epoch=1), LearningRateRewarmup(steps=10), Distillation(), PruningReport(save_model=False)]

    shared = callbacks()
    modules = []
    for fold in range(2):
        options = {"max_epochs": 2, "enable_checkpointing": True, "default_root_dir": tmp_path / f"fold {fold}"}
        saver = ModelCheckpoint(tmp_path, filename=f"{fold} {{epoch}}", save_top_k=-1, save_on_train_epoch_end=True)
        own, alone, module = callbacks(), Fold(fold), Fold(fold)
        quiet(*own, max_epochs=2, default_root_dir=tmp_path / f"own {fold}").fit(alone)
        quiet(*shared, saver, **options).fit(module)
        assert same_weights(module, alone) and module.losses == alone.losses
        assert shared[0].plan.digest() == own[0].plan.digest() == get_plan(module.inner["lm"]).digest()
        assert shared[0].metrics == own[0].metrics
        assert shared[-1].metrics == own[-1].metrics and shared[-1].timeline == own[-1].timeline
        for epoch in range(2):
            state = torch.load(tmp_path / f"{fold} epoch={epoch}.ckpt", weights_only=True)["callbacks"]
            assert (state[shared[0].state_key]["plan"] is not None) == bool(epoch)
        assert (tmp_path / f"fold {fold}" / "pruning" / "report.json").exists()
        modules.append(module)
    plans = [get_plan(module.inner["lm"]).digest() for module in modules]
    assert plans[0] != plans[1]
    # the first fold is trained on: it is not pruned twice
    before = size(modules[0])
    quiet(shared[0], max_epochs=2).fit(modules[0])
    assert size(modules[0]) == before
    assert shared[0].plan.digest() == plans[0]


class Fold(Small):
    def __init__(self, fold):
        super().__init__()
        self.fold = fold

    def train_dataloader(self):
        return DataLoader(corpus(24, self.fold), batch_size=4)


def test_lora_waits_for_the_cut_of_every_fold(tmp_path):
    shared, lora = small(epoch=1), LoRARecovery(r=2)
    for fold in range(2):
        alone, module = Fold(fold), Fold(fold)
        quiet(small(epoch=1), LoRARecovery(r=2), max_epochs=2).fit(alone)
        quiet(shared, lora, max_epochs=2).fit(module)
        assert same_weights(module, alone)
        assert all(p.requires_grad for p in module.parameters())


def test_a_sweep_over_models_that_were_pruned_before(tmp_path):
    """What a model brings along is no reason to take it for a run of the callback."""
    callback = small(epoch=0)
    for _ in range(2):
        base = Small()
        sets = find_group_sets(base)
        apply_plan(base.inner["lm"], PruningPlan.from_kept(sets, [range(s.size - (s.kind == "mlp")) for s in sets]))
        before = size(base.inner)
        quiet(callback, max_epochs=1).fit(base)
        assert callback.plan.info["parameters_before"] == before and size(base.inner) < before


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_second_fit_of_the_same_module_goes_on(tmp_path, dry_run):
    callback, module = small(epoch=1, dry_run=dry_run), Small()
    trainer = quiet(callback, max_epochs=2)
    trainer.fit(module)
    plan, left = callback.plan, size(module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    assert len(module.losses) == 24 and size(module) == left and callback.plan is plan
    assert (left < dense_size()) != dry_run


def test_a_model_that_validation_pruned_is_trained_on(tmp_path):
    callback, module = small(epoch=0), Small()
    trainer = quiet(callback, max_epochs=1)
    trainer.validate(module, verbose=False)
    pruned = size(module)
    trainer.fit(module)
    assert pruned == size(module) < dense_size()
    trainer.validate(other := Small(), verbose=False)
    assert size(other) < dense_size()


def test_what_is_unclear_is_refused_with_what_was_found(tmp_path):
    callback, module = small(epoch=0), Small()
    quiet(callback, max_epochs=1).fit(module)
    with pytest.raises(PruningError, match=r"made in an earlier fit.*another object.*ckpt_path"):
        quiet(callback, max_epochs=1).fit(copy.deepcopy(module))
    sets = find_group_sets(module)
    apply_plan(module.inner["lm"], PruningPlan.from_kept(sets, [range(s.size - (s.kind == "mlp")) for s in sets]))
    with pytest.raises(PruningError, match=r"is cut by the plan \w+, but .* left it cut by the plan \w+"):
        quiet(callback, max_epochs=1).fit(module)


def test_another_model_in_the_same_module_is_pruned_too(tmp_path):
    callback, module = small(epoch=0), Small()
    for _ in range(2):
        module.inner["lm"] = tiny("llama", num_hidden_layers=2)
        quiet(callback, max_epochs=1).fit(module)
        assert size(module) < dense_size()


def test_testing_another_module_does_not_disturb_a_run(tmp_path):
    class WithTest(Small):
        __test__ = False
        test_step, test_dataloader = Small.validation_step, Small.val_dataloader

    callback, module = small(epoch=1), WithTest()
    trainer = quiet(callback, max_epochs=2)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    trainer.test(WithTest(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    trainer.test(WithTest(), verbose=False)
    assert callback.plan.digest() == get_plan(module.inner["lm"]).digest()
    pruned = size(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)
    assert size(module) == pruned
    quiet(callback, max_epochs=2).fit(fresh := WithTest())
    assert size(fresh) < dense_size()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_used_callback_prunes_a_new_model(tmp_path, copied):
    callback = small(epoch=0)
    quiet(callback, max_epochs=1).fit(Small())
    again = copied(callback)
    assert again.plan == callback.plan
    quiet(again, max_epochs=1).fit(module := Small())
    assert size(module) < dense_size()


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_the_same_trainer_takes_a_new_module_after_an_error(tmp_path, error):
    """Lightning calls no teardown after an error: what setup has patched is of the first module still."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
    callbacks = [small(epoch=1), LearningRateRewarmup(steps=3), Distillation(directory=tmp_path)]

    class Fails(Small):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 10:
                raise error

    quiet(*callbacks, saver, max_epochs=3, enable_checkpointing=True).fit(expected := Small())
    trainer = quiet(*callbacks, max_epochs=3)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(first := Fails())
    assert size(first) < dense_size()
    trainer.fit(again := Small(), ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    assert again.losses == expected.losses[9:] and same_weights(again, expected)
    assert "training_step" not in vars(first) and "training_step" not in vars(again)


def test_a_teacher_of_another_run_is_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    for fold in range(2):
        callbacks = [small(epoch=0), Distillation(directory=tmp_path / "teacher")]
        module = Fold(fold)
        with torch.no_grad():
            module.inner["lm"].lm_head.weight.mul_(1 + fold)
        quiet(*callbacks, *([] if fold else [saver]), max_epochs=1, enable_checkpointing=not fold).fit(module)
    trainer = quiet(small(epoch=0), Distillation(directory=tmp_path / "teacher"), max_epochs=2)
    with pytest.raises(PruningError, match="of another model than that of the checkpoint's run"):
        trainer.fit(Fold(0), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)


# what a fit cannot do is said before it begins


class Observed(Small):
    """Counts what it was asked for, and how often validation ran before training."""

    def training_step(self, batch, batch_idx):
        self.steps_run = getattr(self, "steps_run", 0) + 1
        return super().training_step(batch, batch_idx)


UNREACHABLE = {
    "the default epoch": ({}, {"max_epochs": 1}),
    "an epoch": ({"epoch": 3}, {"max_epochs": 3}),
    "a dry run": ({"dry_run": True}, {"max_epochs": 1}),
    "an epoch, by steps": ({"epoch": 2}, {"max_steps": 12, "max_epochs": -1}),
    "an epoch, by accumulated steps": ({"epoch": 2}, {"max_steps": 6, "max_epochs": -1, "accumulate_grad_batches": 2}),
    "a step": ({"step": 12}, {"max_steps": 12, "max_epochs": -1}),
    "a step, by epochs": ({"step": 12}, {"max_epochs": 2}),
    "a step, by accumulated epochs": ({"step": 4}, {"max_epochs": 2, "accumulate_grad_batches": 4}),
    "a step, by few batches": ({"step": 4}, {"max_epochs": 2, "limit_train_batches": 2}),
    "a step, by a fraction": ({"step": 6}, {"max_epochs": 2, "limit_train_batches": 0.5}),
    "a step, by overfitting": ({"step": 4}, {"max_epochs": 2, "overfit_batches": 2}),
    "a late stage": ({"schedule": SCHEDULE}, {"max_epochs": 2}),
    "steps and epochs": ({"step": 5}, {"max_steps": 5, "max_epochs": 9}),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_a_stage_that_cannot_come_is_refused_before_training(name):
    options, limits = UNREACHABLE[name]
    module = Observed()
    with pytest.raises(ValueError, match=r"is to prune at (epoch|step) \d+ .*this fit ends before it: max_epochs="):
        quiet(small(**options), **limits).fit(module)
    assert not hasattr(module, "steps_run")


class Endless(Observed):
    def train_dataloader(self):
        return DataLoader(Lengthless(0, 24), batch_size=4)


class Lengthless(torch.utils.data.IterableDataset):
    def __init__(self, seed, sequences):
        self.ids = corpus(sequences, seed)

    def __iter__(self):
        return iter(self.ids)


REACHABLE = {
    "the last epoch": ({"epoch": 1}, {"max_epochs": 2}),
    "the last step": ({"step": 11}, {"max_epochs": 2}),
    "the last accumulated step": ({"step": 3}, {"max_epochs": 2, "accumulate_grad_batches": 4}),
    "the last step of max_steps": ({"step": 7}, {"max_steps": 8, "max_epochs": -1}),
    "no limit but steps": ({"epoch": 1}, {"max_steps": 7, "max_epochs": -1}),
    "uneven accumulation": ({"step": 6}, {"max_epochs": 2, "callbacks": {0: 4, 1: 1}}),
}


@pytest.mark.parametrize("name", REACHABLE)
def test_a_stage_that_just_comes_does(name):
    options, limits = REACHABLE[name]
    callback, limits = small(**options), dict(limits)
    accumulate = [GradientAccumulationScheduler(limits.pop("callbacks"))] if "callbacks" in limits else []
    quiet(callback, *accumulate, **limits).fit(Small())
    assert callback.stages_done == 1


@pytest.mark.parametrize(
    ("module", "options", "limits"),
    [
        (Endless, {"step": 40}, {"max_epochs": 2}),
        (Small, {"epoch": 9}, {"max_epochs": 99, "max_time": {"milliseconds": 200}}),
        (Small, {}, {"fast_dev_run": True}),
        (Small, {"step": 5}, {"fast_dev_run": 2}),
    ],
)
def test_what_cannot_be_known_is_warned_of_at_the_end(module, options, limits):
    with pytest.warns(UserWarning, match=r"was scheduled for .*, but training ended"):
        quiet(small(**options), **limits).fit(module())


def test_a_resumed_run_needs_only_the_stages_that_are_left(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    quiet(small(epoch=0), saver, max_epochs=1, enable_checkpointing=True).fit(Small())
    callback = small(epoch=0)
    quiet(callback, max_epochs=2).fit(module := Small(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert size(module) < dense_size() and len(module.losses) == 9
    # a fit that is over has nothing to do, and nothing to refuse
    quiet(small(epoch=1), max_epochs=0).fit(Small())


@pytest.mark.parametrize("finder", ["lr", "batch size"])
def test_a_tuner_runs_its_few_steps_and_the_fit_prunes(tmp_path, finder):
    class Tuned(Small):
        def __init__(self):
            super().__init__()
            self.lr, self.batch_size = 1e-3, 2

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

        def train_dataloader(self):
            return DataLoader(corpus(24, 0), batch_size=self.batch_size)

    for as_callback in (False, True):
        callback, module = small(epoch=2), Tuned()
        if as_callback:
            tuner = LearningRateFinder(num_training_steps=3) if finder == "lr" else BatchSizeFinder(max_trials=1)
            trainer = quiet(tuner, callback, max_epochs=3, default_root_dir=tmp_path)
        else:
            trainer = quiet(callback, max_epochs=3, default_root_dir=tmp_path)
            if finder == "lr":
                Tuner(trainer).lr_find(module, num_training=3)
            else:
                Tuner(trainer).scale_batch_size(module, max_trials=1, steps_per_trial=1)
        trainer.fit(module)
        assert callback.stages_done == 1 and size(module) < dense_size()


# what cannot be written


def unwritable(folder, kind):
    if kind == "a file":
        (folder / "taken").write_text("")
        return folder / "taken"
    if kind == "in a file":
        (folder / "taken").write_text("")
        return folder / "taken" / "deeper"
    return "/proc/nothing/here"


@pytest.mark.parametrize("kind", ["a file", "in a file", "no such place"])
@pytest.mark.parametrize("which", ["pruning", "report", "teacher"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, kind, which):
    folder, module = unwritable(tmp_path, kind), Observed()
    callbacks = {
        "pruning": lambda: [small(epoch=1, output_dir=folder)],
        "report": lambda: [small(epoch=1), PruningReport(folder)],
        "teacher": lambda: [small(epoch=1), Distillation(directory=folder)],
    }[which]()
    with pytest.raises(PruningError, match=r"(taken|proc).*(is not a folder|cannot be written)"):
        quiet(*callbacks, max_epochs=2).fit(module)
    assert not hasattr(module, "steps_run")


def test_what_cannot_be_written_later_is_warned_of_and_nothing_is_lost(tmp_path):
    """The folder turns into a file when training has begun, as good as a full disk."""

    class Blocked(Small):
        def on_train_start(self):
            (tmp_path / "out").write_text("")

    callbacks = [
        small(epoch=1, output_dir=tmp_path / "out"),
        PruningReport(tmp_path / "out"),
        Distillation(directory=tmp_path / "out"),
    ]
    saver = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="not written") as caught:
        quiet(*callbacks, saver, max_epochs=3, enable_checkpointing=True).fit(module := Blocked())
    text = " ".join(str(w.message) for w in caught)
    for what in ("plan and group table", "the report", "the pruned model", "the copy that a resumed run needs"):
        assert re.search(f"{what} was not written to", text, re.IGNORECASE), what
    assert len(module.losses) == 18 and size(module) < dense_size()
    quiet(small(epoch=1), max_epochs=3).validate(Small(), ckpt_path=tmp_path / "kept" / "epoch=2.ckpt", verbose=False)


# batches that can be read only once


@pytest.mark.parametrize("once", [lambda b: (x for x in b), iter, lambda b: map(torch.clone, b), enumerate])
def test_batches_that_can_be_read_only_once_are_refused_before_any_work(once):
    batches = [corpus(4, 0), corpus(4, 1)]
    with pytest.raises(ValueError, match=r"calibration_dataloader must be an iterable .* read several times"):
        small(calibration_dataloader=once(batches))
    with pytest.raises(ValueError, match=r"batches must be an iterable .* read several times"):
        prune(tiny("llama"), once(batches), lambda _: pytest.fail("a batch was run"), PruningConfig())
