"""What one of two processes meets, both raise, naming it; neither hangs."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from processes import run, run_well
from test_ddp import RANKS, Plain, trainer_of
from test_fsdp import Sharded, strategy
from test_pruning import Module, pruning

import lit_prune.callbacks.cutting
import lit_prune.callbacks.report
import lit_prune.pipeline
import lit_prune.repairing
from lit_prune import CalibrationError, PruningError
from lit_prune.callbacks import PruningReport
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import PlanError, RankError


class Small(Plain):
    """Does something odd on one process, in the n-th call of a step in eval mode."""

    static = True

    def __init__(self, odd=lambda: None, calls=()):
        super().__init__()
        self.odd, self.calls = odd, calls
        Small.seen = 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training:
            return loss
        # on the class, which calibration does not put back
        Small.seen += 1
        return self.odd() if Small.seen in self.calls else loss


class Raises(Callback):
    def __init__(self, hook, error):
        self.hook, self.error = hook, error

    def on_pruning_start(self, trainer, pl_module, pruning):
        if self.hook == "on_pruning_start" and trainer.global_rank == 1:
            raise self.error

    def on_pruning_end(self, trainer, pl_module, pruning):
        if self.hook == "on_pruning_end" and trainer.global_rank == 1:
            raise self.error


class Boom(Exception):
    pass


def raises(error):
    def odd():
        raise error

    return odd


def on_rank_1(module, patched: str, error: Exception):
    """In place of a function: it fails on the second process."""
    own = getattr(module, patched)

    def failing(*args, **kwargs):
        if os.environ["LOCAL_RANK"] == "1":
            raise error
        return own(*args, **kwargs)

    return own, failing


CASES = {
    # where the error comes (of one batch to check modules by, and two to calibrate; the repair works with what was recorded
    # there), what it is, what it is raised as, and what the message says
    "first batch": ({"calls": (1,)}, Boom("bad batch"), RankError, "in calibration: Boom: bad batch"),
    "second batch": (
        {"calls": (2,)},
        CalibrationError("odd"),
        CalibrationError,
        "in calibration: CalibrationError: odd",
    ),
    "forward only": ({"calls": (2,), "importance": "wanda"}, Boom("late"), RankError, "in calibration: Boom: late"),
    "unexplained_shares": (
        {"patch": lit_prune.repairing},
        Boom("far"),
        RankError,
        "in measuring unexplained shares: Boom: far",
    ),
    "least_squares": ({"patch": lit_prune.repairing}, Boom("farther"), RankError, "in repair: Boom: farther"),
    "dataloader": ({"loader": True}, Boom("no file"), RankError, "in calibration: Boom: no file"),
    "on_pruning_start": ({"hook": True}, Boom("mine"), RankError, "in pruning: Boom: mine"),
    "on_pruning_end": ({"hook": True}, Boom("mine"), RankError, "in pruning: Boom: mine"),
    "make_plan": ({"patch": lit_prune.pipeline}, PlanError("torn"), PlanError, "in pruning: PlanError: torn"),
    "cut": ({"patch": lit_prune.pipeline}, Boom("out of memory"), RankError, "in surgery: Boom: out of memory"),
}


class Failing(torch.utils.data.Dataset):
    def __init__(self, data, error):
        self.data, self.error = data, error

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index >= 2:
            raise self.error
        return self.data[index]


def fails_alone(folder: str) -> None:
    """Every case in the same two processes: the process group is usable after each."""
    rank = int(os.environ["LOCAL_RANK"])
    for name, (where, error, kind, message) in CASES.items():
        odd = rank == 1 and "calls" in where
        module = Small(raises(error) if odd else lambda: None, where.get("calls", ()) if odd else ())
        module.sequences = 16
        options = {"importance": where.get("importance", "taylor"), "epoch": 0, "validate": False, "iterations": 1}
        if "loader" in where:
            data = torch.zeros(4, 12, dtype=torch.long)
            options["calibration_dataloader"] = torch.utils.data.DataLoader(Failing(data, error) if rank else data)
        shapes = {n: p.shape for n, p in module.named_parameters()}
        trainer = trainer_of(RANKS, pruning(**options), Raises(name if "hook" in where else None, error), max_epochs=1)
        own = None
        if "patch" in where:
            own, failing = on_rank_1(where["patch"], name, error)
            setattr(where["patch"], name, failing)
        try:
            with pytest.raises(PruningError, match=rf"process 1 of 2, {message}") as caught:
                trainer.fit(module)
        finally:
            if own is not None:
                setattr(where["patch"], name, own)
        assert type(caught.value) is kind, name
        if rank == 1:
            assert caught.value.__cause__ is error, name
        # nothing is cut on one process alone
        same = {n: p.shape for n, p in module.named_parameters()} == shapes
        assert same == (name != "on_pruning_end"), name


def test_an_error_on_one_process_is_raised_on_all(tmp_path):
    run_well(fails_alone, str(tmp_path), folder=tmp_path, processes=RANKS)


class Loader(Callback):
    """Fails on one process while a checkpoint is about to load."""

    def __init__(self, error):
        self.error = error

    def on_pruning_load_start(self, trainer, pl_module, pruning, checkpoint):
        if trainer.global_rank == 1:
            raise self.error


def goes_on_or_stops(folder: str) -> None:
    """What has to go on, or to stop in other ways, in the same two processes."""
    rank = int(os.environ["LOCAL_RANK"])
    options = {"epoch": 0, "validate": False, "iterations": 1}

    # a forward-only criterion needs no loss: not on one process either
    module = Small(lambda: None, (1, 2) if rank else ())
    callback = pruning(importance="wanda", repair=None, **options)
    trainer_of(RANKS, callback, max_epochs=1).fit(module)
    assert callback.plan is not None

    # the folder of one process cannot be written to any more, once the run has begun: the run goes on
    blocked = Path(folder, f"file-{rank}")

    class Blocks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            blocked.write_text("")

    callback = pruning(output_dir=blocked / "inside", importance="magnitude", repair=None, **options)
    trainer = trainer_of(RANKS, Blocks(), callback, max_epochs=1)
    if rank == 0:
        with pytest.warns(UserWarning, match="was not written to .*inside"):
            trainer.fit(Small())
    else:
        trainer.fit(Small())
    assert callback.plan is not None
    trainer.save_checkpoint(Path(folder, "it.ckpt"))

    # a checkpoint that one process cannot take
    with pytest.raises(RankError, match=r"process 1 of 2, in loading a checkpoint: Boom: mine"):
        trainer_of(RANKS, pruning(), Loader(Boom("mine"))).validate(Small(), ckpt_path=Path(folder, "it.ckpt"))

    # an interrupt on one process stays one there
    module = Small(raises(KeyboardInterrupt()), (1,) if rank else ())
    with pytest.raises(SystemExit if rank else RankError):
        trainer_of(RANKS, pruning(**options), max_epochs=1).fit(module)


def test_no_loss_no_folder_a_checkpoint_and_an_interrupt_on_one_process(tmp_path):
    run_well(goes_on_or_stops, str(tmp_path), folder=tmp_path, processes=RANKS)


def all_meet(kind: type[Exception], same: bool) -> None:
    ranks = Ranks(torch.device("cpu"))
    rank = torch.distributed.get_rank()
    error = kind("all" if same else f"of {rank}")
    with pytest.raises(kind) as caught, ranks.together("outer"), ranks.together("inner"):
        raise error
    assert (caught.value is error) == same
    if not same:
        assert "process 0 of 2, in inner: PlanError: of 0; process 1 of 2, in inner: PlanError: of 1" in str(
            caught.value
        )


class Lonely(Small):
    """Waits for the others in each step in eval mode, and skips its first batch on one process, before the model."""

    def training_step(self, batch, batch_idx):
        if not self.training:
            torch.distributed.all_reduce(torch.ones(1))
            Small.seen += 1
            if Small.seen == 1 and self.trainer.global_rank == 1:
                return None
        return Module.training_step(self, batch, batch_idx)


def fails_around_the_cut(folder: str) -> None:
    """Errors of one process in places where the others used to be left with half of the result, or waiting."""
    rank = int(os.environ["LOCAL_RANK"])
    options = {"epoch": 0, "validate": False, "iterations": 1, "importance": "magnitude", "repair": None}

    # while the result of the cut is taken over: the other one gives it back, with its average of the weights
    own = lit_prune.callbacks.cutting.prune_weight_averages

    def fails(*args):
        if rank == 1:
            raise Boom("average")
        return own(*args)

    lit_prune.callbacks.cutting.prune_weight_averages = fails
    module, callback, average = Small(), pruning(**options), EMAWeightAveraging()
    sizes = [p.shape for p in module.parameters()]
    with pytest.raises(RankError, match="process 1 of 2, in taking over the result: Boom: average"):
        trainer_of(RANKS, callback, average, max_epochs=1).fit(module)
    lit_prune.callbacks.cutting.prune_weight_averages = own
    assert callback.plan is None and callback.stages_done == 0 and not callback.runs.current.unfinished
    assert [p.shape for p in module.parameters()] == sizes
    assert [p.shape for p in average._average_model.module.parameters()] == sizes

    # before training
    callback = pruning(**options)
    callback.runs.bind, bind, calls = lambda *a: calls.append(a) or (late(calls) or bind(*a)), callback.runs.bind, []

    def late(calls):
        if rank == 1 and len(calls) == 2:
            raise Boom("bind")

    with pytest.raises(RankError, match="process 1 of 2, in the checks before training: Boom: bind"):
        trainer_of(RANKS, callback, max_epochs=1).fit(Small())
    assert len(calls) == 2

    # a check that only one process runs, and an error that it does not expect
    def refuses(folder):
        raise Boom("strange disk")

    lit_prune.callbacks.report.check_writable = refuses
    with pytest.raises(RankError, match="process 0 of 2, in the checks before training: Boom: strange disk"):
        trainer_of(RANKS, pruning(**options), PruningReport(output_dir=folder), max_epochs=1).fit(Small())

    # a batch that one process skips before its model is reached: all run the next one
    callback = pruning(**options)
    trainer_of(RANKS, callback, max_epochs=1).fit(Lonely())
    assert callback.stages_done == 1


def test_errors_of_one_process_around_the_cut(tmp_path):
    run_well(fails_around_the_cut, str(tmp_path), folder=tmp_path, processes=RANKS)


def alone() -> None:
    """The processes' own exchanges, without a Trainer."""
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=RANKS)
    rank = torch.distributed.get_rank()
    all_meet(ValueError, True)
    all_meet(PlanError, False)
    ranks = Ranks(torch.device("cpu"))
    assert ranks.gather(rank) == [0, 1]
    assert not ranks.all(rank == 1) and ranks.all()
    # several exchanges behind: wherever the others are, they hear of it
    for exchange in (
        lambda: ranks.sum(torch.ones(3)),
        lambda: ranks.all(),
        lambda: ranks.gather({"a": 1}),
        ranks.agree,
    ):
        with pytest.raises(RankError, match=r"process 1 of 2, in this: Boom: gone"), ranks.together("this"):
            if rank == 1:
                raise Boom("gone")
            exchange()
    # caught and raised as another error on the way: told once
    with pytest.raises(PlanError, match="wrapped"), ranks.together("outer"):
        try:
            with ranks.together("inner"):
                raise Boom("same")
        except Boom as error:
            raise PlanError("wrapped") from error
    assert torch.equal(ranks.sum(torch.ones(2)), 2 * torch.ones(2))
    # in a collective of somebody else nobody answers: the one that failed does not wait for ever
    ranks.patience = timedelta(seconds=1)
    if rank == 1:
        with (
            pytest.raises(RankError, match=r"in a step: Boom: alone .*did not answer within 1 sec"),
            ranks.together("a step"),
        ):
            raise Boom("alone")
        assert ranks.lost
        os._exit(0)
    with pytest.raises(RuntimeError):
        torch.distributed.barrier()


def test_the_exchanges_themselves(tmp_path):
    run_well(alone, folder=tmp_path, processes=RANKS)


def sharded_alone() -> None:
    """FSDP2: an error between the steps is agreed on; in a step the one that fails gives up, and the other is cut off."""
    rank = int(os.environ["LOCAL_RANK"])

    class Odd(Sharded):
        where = "dataloader"

        def training_step(self, batch, batch_idx):
            if rank == 1 and self.where == "step" and not self.training:
                self.inner["lm"].model.layers[1].register_forward_pre_hook(raises_hook)
            return super().training_step(batch, batch_idx)

    def raises_hook(*_):
        raise Boom("in the middle")

    options = {"epoch": 0, "validate": False, "iterations": 1}
    data = torch.zeros(4, 12, dtype=torch.long)
    failing = torch.utils.data.DataLoader(Failing(data, Boom("no file")) if rank else data)
    trainer = trainer_of(RANKS, pruning(calibration_dataloader=failing, **options), strategy=strategy(), max_epochs=1)
    with pytest.raises(RankError, match="process 1 of 2, in calibration: Boom: no file"):
        trainer.fit(Odd())
    Ranks.patience = timedelta(seconds=2)
    module = Odd()
    module.where = "step"
    trainer_of(RANKS, pruning(**options), strategy=strategy(), max_epochs=1).fit(module)


def test_sharded_processes_do_not_hang(tmp_path):
    (one, _), (other, said) = run(sharded_alone, folder=tmp_path, processes=RANKS)
    assert one == other == 1
    assert "process 1 of 2, in calibration: Boom: in the middle (the others did not answer within 2 seconds" in said
