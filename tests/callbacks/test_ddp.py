"""Two processes over gloo against one process with the same global batch."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from processes import run, run_well
from test_pruning import Module, corpus, pruning
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from conftest import tiny
from lit_prune import PruningPlan
from lit_prune.callbacks import Distillation, LearningRateRewarmup, LoRARecovery
from lit_prune.callbacks.strategies import check_strategy
from lit_prune.errors import UnsupportedStrategyError

RANKS = 2


class EveryNth(SequentialSampler):
    """What one rank sees; one rank of one sees everything, in batches twice as large."""

    def __init__(self, data, rank, world):
        super().__init__(data)
        self.rank, self.world = rank, world

    def __iter__(self):
        return iter(range(self.rank, len(self.data_source), self.world))

    def __len__(self):
        return len(range(self.rank, len(self.data_source), self.world))


class Stream(IterableDataset):
    """Gives one rank two batches more than the other."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        return iter(corpus(12 + 8 * self.rank, self.rank))


class Plain(Module):
    """What a step sees depends on the global batch alone."""

    sequences = 24
    uneven_stream = False
    static = False

    def __init__(self, model=None):
        super().__init__(model)
        self.dropout.p = 0.0
        if not self.static:
            self.unused = torch.nn.Parameter(torch.zeros(3))

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if self.uneven_stream:
            return DataLoader(Stream(rank), batch_size=4)
        data = corpus(self.sequences, 0)
        return DataLoader(data, batch_size=8 // world, sampler=EveryNth(data, rank, world))

    def val_dataloader(self):
        data = corpus(8, 1)
        return DataLoader(data, batch_size=4, sampler=EveryNth(data, self.trainer.global_rank, self.trainer.world_size))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner["lm"](input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self):
        # linear in the gradient, so that rounding is not blown up as by Adam's first steps
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def trainer_of(world: int, *callbacks, **options) -> pl.Trainer:
    strategy = options.pop("strategy", None) or (
        DDPStrategy(process_group_backend="gloo", find_unused_parameters=True) if world > 1 else "auto"
    )
    return pl.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": world,
            "strategy": strategy,
            "use_distributed_sampler": False,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def finish(folder: str, name: str, trainer: pl.Trainer, callback, module) -> None:
    result = {"weights": module.state_dict(), "metrics": callback.metrics, "plan": callback.plan.to_dict()}
    torch.save(result, Path(folder, f"{name}-{trainer.global_rank}.pt"))


def equal_runs(folder: str, world: int) -> None:
    """Several criteria, accumulation, a last batch that is smaller, and experts, one after the other."""
    for name, options, trainer_options, sequences in (
        ("taylor", {}, {}, 24),
        ("taylor_2nd", {}, {"accumulate_grad_batches": 2}, 24),
        ("taylor_batch", {"statistics": "elementwise"}, {}, 24),
        ("wanda", {}, {}, 20),
        ("fisher", {"kinds": ("block",), "pruning_ratio": 0.3}, {}, 24),
        ("auto", {"calibration_batches": 9}, {}, 80),
        ("experts", {"importance": "taylor", "kinds": ["mlp"]}, {}, 24),
    ):
        pl.seed_everything(7, verbose=False)
        callback = pruning(**{"importance": name, **options})
        saver = ModelCheckpoint(folder, filename=f"{name}-{world}-{{epoch}}", save_top_k=-1)
        trainer = trainer_of(world, callback, saver, enable_checkpointing=True, **trainer_options)
        model = tiny("mixtral", num_local_experts=3, num_experts_per_tok=2) if name == "experts" else None
        module = Plain(model)
        module.sequences = sequences
        trainer.fit(module)
        finish(folder, f"{name}-{world}", trainer, callback, module)


def resumed_run(folder: str, world: int, checkpoint: str, name: str) -> None:
    callback = pruning()
    trainer, module = trainer_of(world, callback), Plain()
    trainer.fit(module, ckpt_path=Path(folder, checkpoint), weights_only=True)
    finish(folder, name, trainer, callback, module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_well(equal_runs, str(folder), RANKS, folder=folder, processes=RANKS)
    run_well(equal_runs, str(folder), 1, folder=folder)
    return folder


def read(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_close(one: dict, other: dict) -> None:
    assert PruningPlan.from_dict(one["plan"]).digest() == PruningPlan.from_dict(other["plan"]).digest()
    for name, value in one["weights"].items():
        if not name.startswith("accuracy"):
            torch.testing.assert_close(value, other["weights"][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("importance", ["taylor", "taylor_2nd", "taylor_batch", "wanda", "fisher", "auto", "experts"])
def test_two_processes_equal_one_with_the_same_global_batch(folder, importance):
    both = [read(folder, f"{importance}-2-{rank}") for rank in range(RANKS)]
    single = read(folder, f"{importance}-1-0")
    for name, value in both[0]["weights"].items():
        if not name.startswith("accuracy"):
            assert torch.equal(value, both[1]["weights"][name]), name
    assert both[0]["metrics"]["pruned"]["val_loss"] == pytest.approx(single["metrics"]["pruned"]["val_loss"], rel=1e-4)
    assert_close(both[0], single)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_resumes_on_the_same_and_on_another_number_of_processes(folder, epoch):
    """Checkpoints from before and after the cut, of one process and of two, go on with one and with two."""
    whole = read(folder, "taylor-1-0")
    for before in (1, 2):
        steps = 3 * (epoch + 1)
        checkpoint = f"taylor-{before}-epoch={epoch}.ckpt"
        assert torch.load(folder / checkpoint, weights_only=True)["global_step"] == steps
        for after in (1, 2):
            name = f"resumed-{epoch}-{before}-{after}"
            run_well(resumed_run, str(folder), after, checkpoint, name, folder=folder, processes=after)
            assert_close(read(folder, f"{name}-0"), whole)


class RecoveringModule(Plain):
    """For the recovery callbacks: the whole model is called, and what is frozen is not optimized."""

    static = True

    def training_step(self, batch, batch_idx):
        return self.inner["lm"](input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def recovery_runs(folder: str, world: int) -> None:
    for name, callbacks in (
        ("distillation", [Distillation(hidden_weight=0.1), LearningRateRewarmup(4)]),
        ("lora", [LoRARecovery(r=4), LearningRateRewarmup(4)]),
        ("average", [EMAWeightAveraging(decay=0.8)]),
    ):
        pl.seed_everything(7, verbose=False)
        callback = pruning()
        trainer = trainer_of(world, callback, *callbacks)
        module = RecoveringModule()
        trainer.fit(module)
        finish(folder, f"{name}-{world}", trainer, callback, module)


def test_recovery_and_averaging_on_two_processes_equal_one(tmp_path):
    for world in (1, RANKS):
        run_well(recovery_runs, str(tmp_path), world, folder=tmp_path, processes=world)
    for name in ("distillation", "lora", "average"):
        both = [read(tmp_path, f"{name}-2-{rank}") for rank in range(RANKS)]
        assert_close(both[0], both[1])
        assert_close(both[0], read(tmp_path, f"{name}-1-0"))


def odd_runs(folder: str) -> None:
    """Things that must not hang."""
    for name, strategy, module_options in (
        ("stream", {"find_unused_parameters": True}, {"uneven_stream": True}),
        ("static", {"static_graph": True}, {"static": True}),
        ("views", {"gradient_as_bucket_view": True}, {"static": True}),
    ):
        for dry_run in (False, True):
            pl.seed_everything(7, verbose=False)
            callback = pruning(calibration_batches=8, dry_run=dry_run, epoch=None if name == "stream" else 1)
            if name == "stream":
                callback = pruning(calibration_batches=8, dry_run=dry_run, step=2)
            trainer = trainer_of(
                RANKS, callback, strategy=DDPStrategy(process_group_backend="gloo", **strategy), limit_train_batches=3
            )
            Configured = type("Configured", (Plain,), module_options)
            module = Configured()
            trainer.fit(module)
            finish(folder, f"{name}-{dry_run}", trainer, callback, module)


def test_uneven_streams_static_graphs_and_bucket_views(tmp_path):
    run_well(odd_runs, str(tmp_path), folder=tmp_path, processes=RANKS)
    for name in ("stream", "static", "views"):
        for dry_run in (False, True):
            both = [read(tmp_path, f"{name}-{dry_run}-{rank}") for rank in range(RANKS)]
            for key, value in both[0]["weights"].items():
                if not key.startswith("accuracy"):
                    assert torch.equal(value, both[1]["weights"][key]), (name, dry_run, key)
            assert both[0]["plan"] == both[1]["plan"]
            # one of the streams would have had five: the shorter one ends calibration on both
            assert both[0]["plan"]["info"]["calibration_batches"] == 3


def disagreeing(folder: str, how: str) -> None:
    import os

    rank = int(os.environ["LOCAL_RANK"])
    pl.seed_everything(7, verbose=False)
    callback = pruning(importance="random", seed=rank) if how == "plan" else pruning()

    class Odd(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.training and rank == 1:
                return loss * torch.nan if how == "nan" else loss.detach()
            return loss

    module = Odd() if how in ("nan", "detached") else Plain()
    if how == "hook" and rank == 1:
        projection = next(m for n, m in module.named_modules() if n.endswith("layers.0.mlp.down_proj"))
        projection.register_forward_hook(lambda _, __, output: 3 * output)
    trainer_of(RANKS, callback).fit(module)


@pytest.mark.parametrize(
    ("how", "messages"),
    [
        ("plan", ["came to different plans", "came to different plans"]),
        ("detached", ["on another process", "does not depend on the weights"]),
        ("nan", ["loss of calibration batch 0 is nan", "loss of calibration batch 0 is nan"]),
        ("hook", ["another process found a module", "does not compute x W^T + b"]),
    ],
)
def test_what_one_process_cannot_do_is_an_error_on_all_and_not_a_hang(tmp_path, how, messages):
    results = run(disagreeing, str(tmp_path), how, folder=tmp_path, processes=RANKS)
    for (code, output), message in zip(results, messages, strict=True):
        assert code == 1
        assert message in output, output[-3000:]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [(FSDPStrategy, "FSDP1.*ModelParallelStrategy"), (DeepSpeedStrategy, "DeepSpeed's engine.*ModelParallelStrategy")],
)
def test_strategies_that_keep_parameters_to_themselves_are_refused(strategy, message):
    # DeepSpeed is not installed, and FSDP1 wants a GPU to be built: the class is all that is looked at
    with pytest.raises(UnsupportedStrategyError, match=message):
        check_strategy(strategy.__new__(strategy))


def test_processes_that_only_hand_weights_back_are_refused():
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    with pytest.raises(UnsupportedStrategyError, match=r"'spawn' .*Use strategy='ddp'"):
        check_strategy(trainer.strategy)
