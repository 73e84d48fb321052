"""Fits of models that no description covers, with nothing but the callback."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from any_models import MODELS, ConvNet, Perceptron, VisionTransformer, built, images
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from processes import run, run_well
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lit_prune
from conftest import zeroed
from lit_prune import PlanError, PruningPlan, UnsupportedModelError, find_group_sets, get_plan, load_pruned, trace
from lit_prune.callbacks import PruningReport, Stage, StructuredPruning

pytestmark = pytest.mark.filterwarnings("ignore:.*of the parameters of.*:UserWarning")


class Classifier(pl.LightningModule):
    """A user's module around a network of their own."""

    def __init__(self, net: nn.Module | str = "cnn") -> None:
        super().__init__()
        self.net = built(net) if isinstance(net, str) else net
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*images(24)), batch_size=8)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*images(16, 1)), batch_size=8)

    test_dataloader = val_dataloader

    def on_load_checkpoint(self, checkpoint):
        lit_prune.rebuild_from_checkpoint(self, checkpoint)


def pruning(**options) -> StructuredPruning:
    options = {"pruning_ratio": 0.3, "calibration_batches": 2, "repair": None, **options}
    return StructuredPruning(**options)


def fit(module: pl.LightningModule, *callbacks: Callback, epochs: int = 2, ckpt_path=None, **options) -> pl.Trainer:
    saving = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=saving, **{**quiet, **options}
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


class Dense(Callback):
    """Keeps the module and its optimizer's state as they are just before the cut."""

    def on_pruning_start(self, trainer, pl_module, pruning):
        self.net = copy.deepcopy(pl_module.net)
        self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_the_fit_goes_on_as_that_of_the_dense_model_with_the_groups_at_zero(name):
    module, dense, callback = Classifier(name), Dense(), pruning(recalibrate_batch_norm=False)
    before = size(module)
    fit(module, dense, callback)
    assert size(module) <= 0.75 * before
    plan = callback.plan
    assert get_plan(module.net).digest() == plan.digest()
    assert [s.size for s in find_group_sets(module)] == [
        {e.key: len(e.kept) for e in plan.entries}.get((name, kind), count) for name, kind, count in plan.sets
    ]
    # the oracle: plain PyTorch, on the batches of the second epoch
    trace(dense.net, [images(8, 5)], lambda b: dense.net(b[0]))
    kept = {e.key: e.kept for e in plan.entries}
    group_sets = find_group_sets(dense.net)
    masked = zeroed(dense.net, [kept.get(s.key, range(s.size)) for s in group_sets]).train()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.02, momentum=0.9)
    optimizer.load_state_dict(dense.optimizer)
    own = dict(masked.named_parameters())
    for group_set in (s for s in group_sets if s.key in kept):
        removed = group_set.kept_to_removed(kept[group_set.key])
        for part in group_set.slices:
            momentum = optimizer.state[own[part.parameter]]["momentum_buffer"]
            momentum.index_fill_(part.dim, part.index[removed].flatten(), 0.0)
    for x, y in module.train_dataloader():
        optimizer.zero_grad()
        functional.cross_entropy(masked(x), y).backward()
        optimizer.step()
    x = images(4, 99)[0]
    torch.testing.assert_close(module.net.eval()(x), masked.eval()(x), atol=1e-4, rtol=1e-4)


class Repeatable(Classifier):
    """May be killed at its n-th training step, those of calibration and tracing included."""

    steps = 0

    def __init__(self, kill_at: int | None = None) -> None:
        super().__init__("cnn")
        Repeatable.steps = 0
        self.kill_at = kill_at

    def training_step(self, batch, batch_idx):
        Repeatable.steps += 1
        if Repeatable.steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


STAGES = [Stage(0.15, epoch=1), Stage(0.3, epoch=3)]


def train(folder: str, kill_at: int | None, resume: bool) -> None:
    """What a process of the kill test runs: four epochs, two stages of two iterations, a checkpoint after every epoch."""
    pl.seed_everything(7, verbose=False)
    module = Repeatable(kill_at)
    saver = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    callback = pruning(schedule=STAGES, importance="taylor", iterations=2)
    last = Path(folder, "last.ckpt")
    fit(module, callback, saver, epochs=4, ckpt_path=last if resume and last.exists() else None)
    end = {"weights": module.state_dict(), "steps": Repeatable.steps, "plan": callback.plan.digest()}
    torch.save(end, Path(folder, "end.pt"))


def test_a_killed_run_resumed_ends_with_the_same_weights_bit_for_bit(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    run_well(train, str(whole), None, False, folder=whole)
    expected = torch.load(whole / "end.pt", weights_only=True)
    traced = expected["steps"] - 4 * 3 - 2 * (1 + 2 * 2)
    assert traced > 0
    points = {"tracing": 5, "second iteration": 3 + traced + 4, "after the cut": 3 + traced + 5 + 2}
    for name, kill_at in points.items():
        folder = tmp_path / name
        folder.mkdir()
        [(code, output)] = run(train, str(folder), kill_at, False, folder=folder)
        assert code == -signal.SIGKILL, output
        run_well(train, str(folder), None, True, folder=folder)
        end = torch.load(folder / "end.pt", weights_only=True)
        assert end["plan"] == expected["plan"], name
        for key, value in expected["weights"].items():
            assert torch.equal(end["weights"][key], value), (name, key)


def load_elsewhere(folder: str) -> None:
    """In a process of its own: the folder and the checkpoint, each into a fresh dense model."""
    x = torch.load(Path(folder, "x.pt"), weights_only=True)
    net = load_pruned(Path(folder, "report", "model"), model=ConvNet, verify=True)
    module = Classifier.load_from_checkpoint(Path(folder, "last.ckpt"), map_location="cpu", weights_only=True)
    torch.save([net(x), module.net.eval()(x)], Path(folder, "y.pt"))


def test_report_folder_and_checkpoint_load_in_a_new_process(tmp_path):
    module = Classifier()
    callback = pruning(output_dir=tmp_path / "plan")
    report = PruningReport(tmp_path / "report", measure_speed=True)
    with pytest.warns(UserWarning, match="speed is measured of language models"):
        trainer = fit(module, callback, report)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    metrics = json.loads((tmp_path / "report" / "report.json").read_text())
    assert str(size(module)) in json.dumps(metrics).replace(".0", "")
    assert "channel" in (tmp_path / "plan" / "group_table.csv").read_text()
    assert PruningPlan.load(tmp_path / "plan" / "plan.json") == callback.plan
    x = images(4, 99)[0]
    torch.save(x, tmp_path / "x.pt")
    run_well(load_elsewhere, str(tmp_path), folder=tmp_path)
    for found in torch.load(tmp_path / "y.pt", weights_only=True):
        assert torch.equal(found, module.net.eval()(x))
    # testing a checkpoint with the callback, and with a module that does not rebuild itself
    fresh = Classifier("cnn")
    fresh.on_load_checkpoint = lambda checkpoint: None
    trainer.test(fresh, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert same(fresh, module)
    with pytest.raises(PlanError, match="shape"):
        Classifier.load_from_checkpoint(tmp_path / "last.ckpt", net=ConvNet(width=6), weights_only=True)


def test_a_dry_run_finds_the_groups_and_leaves_no_trace():
    plain, dry = Classifier(), Classifier()
    fit(plain)
    callback = pruning(dry_run=True)
    fit(dry, callback)
    assert same(plain, dry)
    assert dry.seen == plain.seen
    assert callback.plan.groups is not None
    assert callback.plan.info["parameters_after"] < size(dry)
    assert callback.table.removed_cost > 0
    assert get_plan(dry.net) is None


def test_stages_and_iterations_compose_into_one_plan():
    module = Classifier("vit")
    dense = copy.deepcopy(module.net)
    callback = pruning(schedule=STAGES, iterations=2, importance="taylor")
    fit(module, callback, epochs=4)
    assert callback.stages_done == 2
    lit_prune.apply_plan(dense, callback.plan)
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in module.net.named_parameters()}
    assert size(module) == callback.plan.info["parameters_after"]
    assert [layer.attn.num_heads for layer in module.net.layers] == [layer.attn.num_heads for layer in dense.layers]


def test_kinds_and_protection_work_with_traced_groups():
    module = Classifier("vit")
    dense = size(module)
    fit(module, pruning(kinds=["attention"], protect=[r"layers\.0\."], pruning_ratio=0.1))
    assert [layer.attn.num_heads for layer in module.net.layers] == [4, 3] or size(module) < dense
    assert module.net.layers[0].attn.num_heads == 4
    assert {layer.fc1.out_features for layer in module.net.layers} == {24}
    with pytest.raises(ValueError, match=r"no groups of kind 'experts'; its kinds are attention, mlp"):
        fit(Classifier("vit"), pruning(kinds=["experts"]))


class Spread(Classifier):
    """Weights in the module itself, and in two parts."""

    def __init__(self) -> None:
        super().__init__(Perceptron(classes=12))
        self.scale = nn.Parameter(torch.ones(12))
        self.head = nn.Linear(12, 4)

    def training_step(self, batch, batch_idx):
        hidden = functional.relu(self.net(batch[0]) * self.scale)
        return functional.cross_entropy(self.head(hidden), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_the_module_as_a_whole_or_a_part_of_it(tmp_path):
    torch.manual_seed(0)
    module = Spread()
    callback = pruning()
    trainer = fit(module, callback)
    assert callback.model(module) is module
    assert {s.name for s in find_group_sets(module)} >= {"net.layers.1", "net.layers.5"}
    loaded = load_pruned(lit_prune.save_pruned(module, tmp_path / "model"), model=Spread)
    assert same(loaded, module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert same(Spread.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True), module)
    resumed = Spread()
    fit(resumed, pruning(), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert size(resumed) == size(module)

    part = Spread()
    fit(part, pruning(model_path="net"))
    assert get_plan(part) is None
    assert get_plan(part.net) is not None
    assert part.head.in_features == 12


class Taught(Classifier):
    """Learns from a frozen copy of itself, and keeps an average where ``average`` asks for one."""

    def __init__(self, average: bool = False, spread: bool = False) -> None:
        super().__init__("mlp")
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.extra = nn.Linear(4, 4) if spread else nn.Identity()
        if average:
            self.ema = torch.optim.swa_utils.AveragedModel(self.net)

    def training_step(self, batch, batch_idx):
        distance = functional.mse_loss(self.extra(self.net(batch[0])), self.teacher(batch[0]))
        return super().training_step(batch, batch_idx) + distance


def test_what_is_frozen_beside_what_is_trained_stays_whole():
    for spread in (False, True):
        module = Taught(spread=spread)
        before = size(module.teacher)
        with pytest.warns(UserWarning, match="'teacher' of Taught are not trained, and stay whole"):
            fit(module, pruning(pruning_ratio=0.2, ratio_of="prunable"))
        assert size(module.teacher) == before > size(module.net)
    with pytest.raises(UnsupportedModelError, match="holds a AveragedModel"):
        fit(Taught(average=True), pruning())
    module = Taught()
    fit(module, pruning(model_path="teacher"))
    assert size(module.teacher) < before == size(module.net)


class ByHand(Classifier):
    """Optimizes by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Iterating(Classifier):
    """Takes the dataloader's iterator."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class Skipping(Classifier):
    """Has no use for the first batch, and computes something else for every second one."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            return None
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * self.net(batch[0].flip(-1)).square().mean() if batch_idx % 2 else loss


@pytest.mark.parametrize("kind", [ByHand, Iterating, Skipping])
def test_unusual_training_steps_are_run(kind):
    module = kind()
    before = size(module)
    fit(module, pruning())
    assert size(module) <= 0.72 * before
    assert get_plan(module.net).groups is not None


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision):
    module = Classifier("vit")
    before = size(module)
    fit(module, pruning(), precision=precision)
    assert size(module) <= 0.72 * before


def test_a_compiled_network_is_pruned_in_its_own_names():
    module = Classifier()
    module.net = torch.compile(module.net, backend="eager")
    callback = pruning()
    fit(module, callback)
    fresh = built("cnn")
    lit_prune.apply_plan(fresh, callback.plan)
    assert size(fresh) == size(module)


def test_an_average_is_cut_along():
    module = Classifier()
    before = size(module)
    # at the end of the fit it copies the averages into the module, which takes equal shapes
    fit(module, pruning(schedule=STAGES), EMAWeightAveraging(decay=0.5), epochs=4)
    assert size(module) <= 0.72 * before


def test_validation_alone_prunes():
    module = Classifier()
    before = size(module)
    trainer = pl.Trainer(
        callbacks=[pruning(epoch=0)], logger=False, enable_progress_bar=False, accelerator="cpu", barebones=False
    )
    trainer.validate(module, verbose=False)
    assert size(module) <= 0.72 * before


class Holder(Callback):
    """Keeps a copy of the network and knows nothing of cuts."""

    def on_fit_start(self, trainer, pl_module):
        self.copied = copy.deepcopy(pl_module.net)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("int8", {}, "All weights of Perceptron are quantised"),
        ("cnn", {"kinds": ["block"]}, "no description that says what its blocks are"),
        ("cnn", {"kinds": ["channel", "block"]}, "no description that says what its blocks are"),
        ("empty", {}, "BatchNorm2d has no weights of two or more dimensions"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_training(module, options, message):
    if module == "int8":
        net = Perceptron()
        for layer in net.layers[1::2]:
            layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
        module = Classifier(net)
    else:
        module = Classifier(nn.BatchNorm2d(3) if module == "empty" else module)
    with pytest.raises(UnsupportedModelError, match=message):
        fit(module, pruning(**options))
    assert module.seen == 0


def test_a_copy_of_an_undescribed_model_is_found():
    with pytest.raises(lit_prune.PruningError, match=r"Holder\.copied holds a copy of the model"):
        fit(Classifier(), pruning(), Holder())


class Parallel(Classifier):
    """Every rank sees its part of the same data; ``differs`` takes another way through the model on one rank."""

    def __init__(self, differs: bool) -> None:
        super().__init__(VisionTransformer())
        self.differs = differs

    def training_step(self, batch, batch_idx):
        if self.differs and self.trainer.global_rank and not self.training:
            return self.net.layers[0].fc2(self.net.layers[0].fc1(batch[0].flatten(1)[:, :16])).square().mean()
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        data = TensorDataset(*images(32))
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return DataLoader(data, batch_size=8, sampler=DistributedSampler(data, shuffle=False, **ranks))


def train_on_ranks(folder: str, differs: bool) -> None:
    pl.seed_everything(7, verbose=False)
    module = Parallel(differs)
    callback = pruning(schedule=STAGES[:1])
    strategy = DDPStrategy(process_group_backend="gloo")
    fit(module, callback, epochs=2, devices=2, strategy=strategy, use_distributed_sampler=False)
    rank = module.trainer.global_rank
    torch.save({"weights": module.state_dict(), "plan": callback.plan.digest()}, Path(folder, f"end{rank}.pt"))


def test_two_processes_find_the_same_groups_or_stop(tmp_path):
    run_well(train_on_ranks, str(tmp_path), False, folder=tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"end{rank}.pt", weights_only=True) for rank in range(2))
    assert first["plan"] == second["plan"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    for code, output in run(train_on_ranks, str(tmp_path), True, folder=tmp_path, processes=2):
        assert code == 1
        assert "RankMismatchError" in output
        assert "found different groups in VisionTransformer" in output


class Sharded(Classifier):
    def __init__(self) -> None:
        super().__init__(Perceptron())

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def train_sharded() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    fit(Sharded(), pruning(), devices=2, strategy=strategy)


def test_fsdp_needs_a_description(tmp_path):
    for code, output in run(train_sharded, folder=tmp_path, processes=2):
        assert code == 1
        assert "has no description, and its parameters are sharded by FSDP2" in output
