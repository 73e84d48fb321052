"""FSDP2 through ModelParallelStrategy: two processes over gloo against one process with the same global batch."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import run, run_well
from test_ddp import RANKS, EveryNth, Plain, assert_close, read, trainer_of
from test_pruning import corpus, pruning
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from conftest import tiny
from lit_prune import (
    MLP,
    Architecture,
    Attention,
    PruningConfig,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    make_plan,
    register_architecture,
)
from lit_prune.callbacks import Stage
from lit_prune.distributed import shards
from lit_prune.io.sources import load_model
from lit_prune.training import CausalLMModule
from lit_prune.training.sharded import consolidate, empty_model, read_shards


class Sharded(Plain):
    """Every decoder layer is a unit of its own."""

    static = True
    adam = False

    def training_step(self, batch, batch_idx):
        return self.inner["lm"](input_ids=batch, labels=batch).loss

    def configure_model(self):
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        model, mesh = self.inner["lm"], self.device_mesh["data_parallel"]
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def configure_optimizers(self):
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-3)
        return super().configure_optimizers()


def strategy(**options) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo", **options
    )


class Watch(pl.Callback):
    """Sees that parameters stay sharded, and that every gradient reaches calibration as a shard."""

    def on_pruning_start(self, trainer, pl_module, pruning):
        shards.reshard(pl_module)
        self.seen = 0
        self.parameters = list(pl_module.parameters())
        self.handles = [pl_module.inner["lm"].register_forward_pre_hook(self.take_hold)]

    def take_hold(self, model, _):
        # hooks that are there before calibration are not called in it
        if torch.is_grad_enabled() and len(self.handles) == 1:
            for parameter in self.parameters:
                handle = parameter.register_post_accumulate_grad_hook(self.look)
                # before calibration's own, which takes the gradient away
                parameter._post_accumulate_grad_hooks.move_to_end(handle.id, last=False)
                self.handles.append(handle)
            # the cut puts new parameters in the place of sharded ones
            self.parameters = []

    def look(self, parameter):
        assert isinstance(parameter.grad, DTensor)
        assert abs(2 * parameter.grad.to_local().shape[0] - parameter.shape[0]) <= 2
        self.seen += 1

    def on_pruning_end(self, trainer, pl_module, pruning):
        for handle in self.handles:
            handle.remove()
        assert (self.seen > 0) == (pruning.config.importance not in ("wanda", "magnitude"))
        shards.reshard(pl_module)
        for name, parameter in pl_module.named_parameters():
            assert isinstance(parameter, DTensor), name
            local = parameter.to_local()
            assert abs(2 * local.shape[0] - parameter.shape[0]) <= 2, name
            assert local.untyped_storage().nbytes() <= 4 * (parameter.numel() // 2 + parameter.numel()), name


def whole_state(module: torch.nn.Module) -> dict:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }


def finish(folder: str, name: str, trainer: pl.Trainer, callback, module) -> None:
    shards.reshard(module)
    optimizer = trainer.optimizers[0]
    state = {
        name: {k: shards.full(v) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for name, p in module.named_parameters()
        if p in optimizer.state
    }
    result = {"weights": whole_state(module), "state": state, "metrics": callback.metrics}
    torch.save({**result, "plan": callback.plan.to_dict()}, Path(folder, f"{name}-{trainer.global_rank}.pt"))


CASES = {
    "taylor": ({"importance": "taylor"}, {}),
    "taylor_2nd": ({"importance": "taylor_2nd", "statistics": "elementwise"}, {"adam": True}),
    "second_order": ({"importance": "second_order", "schedule": [Stage(0.1, epoch=1), Stage(0.2, epoch=2)]}, {}),
    "mix": ({"importance": {"taylor_batch": 0.7, "output_wanda": 0.3}}, {"adam": True}),
    "wanda": ({"importance": "wanda", "step": 0}, {}),
    "blocks": ({"importance": "fisher", "kinds": ("block",), "pruning_ratio": 0.3}, {"adam": True}),
    "magnitude": ({"importance": "magnitude", "repair": None}, {}),
    "taylor_batch": ({"importance": "taylor_batch", "step": 4}, {}),
    "auto": ({"importance": "auto", "calibration_batches": 9}, {"sequences": 80}),
}


def runs(folder: str, world: int) -> None:
    for name, (options, module_options) in CASES.items():
        pl.seed_everything(7, verbose=False)
        callback = pruning(**options)
        saver = ModelCheckpoint(Path(folder, f"{name}-{world}"), filename="{epoch}", save_top_k=-1)
        callbacks = [callback, saver] + ([Watch()] if world > 1 else [])
        chosen = strategy() if world > 1 else "auto"
        trainer = trainer_of(world, *callbacks, strategy=chosen, enable_checkpointing=True)
        module = type("Case", (Sharded,), module_options)()
        trainer.fit(module)
        finish(folder, f"{name}-{world}", trainer, callback, module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    run_well(runs, str(folder), RANKS, folder=folder, processes=RANKS)
    run_well(runs, str(folder), 1, folder=folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_sharded_processes_equal_one_with_the_same_global_batch(folder, name):
    both = [read(folder, f"{name}-2-{rank}") for rank in range(RANKS)]
    single = read(folder, f"{name}-1-0")
    assert_close(both[0], both[1])
    assert_close(both[0], single)
    assert both[0]["state"].keys() == single["state"].keys()
    for parameter, state in single["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(both[0]["state"][parameter][key], value, rtol=1e-2, atol=1e-4, msg=parameter)
    if "pruned" in single["metrics"]:
        assert both[0]["metrics"]["pruned"]["val_loss"] == pytest.approx(
            single["metrics"]["pruned"]["val_loss"], rel=1e-4
        )


def resumed(folder: str, name: str, epoch: int, kind: str) -> None:
    options, module_options = CASES[name]
    callback = pruning(**options)
    trainer = trainer_of(RANKS, callback, Watch(), strategy=strategy())
    module = type("Case", (Sharded,), module_options)()
    path = Path(folder, f"{name}-2", f"epoch={epoch}.ckpt")
    if kind == "fit":
        trainer.fit(module, ckpt_path=path)
        finish(folder, f"{name}-resumed-{epoch}", trainer, callback, module)
    else:
        measured = trainer.validate(module, ckpt_path=path, verbose=False)
        torch.save({"measured": measured}, Path(folder, f"{name}-measured-{epoch}-{trainer.global_rank}.pt"))


@pytest.mark.parametrize("epoch", [0, 1])
def test_distributed_checkpoints_resume(folder, epoch):
    """Of a run with two stages, from before the first cut and from between the two: weights and optimizer state."""
    for name in ("second_order", "mix", "blocks"):
        run_well(resumed, str(folder), name, epoch, "fit", folder=folder, processes=RANKS)
        whole, again = read(folder, f"{name}-2-0"), read(folder, f"{name}-resumed-{epoch}-0")
        for key, value in whole["weights"].items():
            if not key.startswith("accuracy"):
                assert torch.equal(again["weights"][key], value), (name, key)


def test_distributed_checkpoints_validate(folder):
    run_well(resumed, str(folder), "mix", 2, "validate", folder=folder, processes=RANKS)
    assert read(folder, "mix-measured-2-0")["measured"][0]["val_loss"] > 0


def undone(folder: str) -> None:
    """A cut that fails at its end, on all processes, in the middle of a run with sharded optimizer state."""

    class Fails(pl.Callback):
        def __init__(self, fail):
            self.fail = fail

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and self.fail:
                model = pl_module.inner["lm"]
                group_sets = find_group_sets(model)
                _, plan = make_plan(model, group_sets, None, PruningConfig("random", 0.2))
                sizes = {n: p.shape for n, p in model.named_parameters()}
                entry = next(e for e in plan.entries if e.kind == "mlp")
                name = f"{entry.name}.down_proj.weight"
                weights = {name: torch.zeros(sizes[name][0], len(entry.kept))}
                register_architecture(failing)
                with pytest.raises(ZeroDivisionError):
                    apply_plan(model, plan, trainer.optimizers, weights=weights)
                register_architecture(plain)
                assert {n: p.shape for n, p in model.named_parameters()} == sizes
                assert all(isinstance(p, DTensor) for p in model.parameters())

    def fail(module, kept):
        raise ZeroDivisionError

    blocks = (Attention(path="layers.*.self_attn"), MLP(path="layers.*.mlp"))
    plain = Architecture("tried", ("LlamaPreTrainedModel",), blocks)
    failing = Architecture("tried", plain.models, (Attention(path="layers.*.self_attn", adapt=fail), blocks[1]))
    for fails in (False, True):
        pl.seed_everything(7, verbose=False)
        trainer = trainer_of(RANKS, Fails(fails), strategy=strategy())
        module = type("Case", (Sharded,), {"adam": True})()
        trainer.fit(module)
        torch.save({"weights": whole_state(module)}, Path(folder, f"undone-{fails}-{trainer.global_rank}.pt"))


def test_a_cut_that_fails_leaves_sharded_model_and_optimizer_as_they_were(tmp_path):
    run_well(undone, str(tmp_path), folder=tmp_path, processes=RANKS)
    tried, untried = read(tmp_path, "undone-True-0"), read(tmp_path, "undone-False-0")
    for name, value in untried["weights"].items():
        assert torch.equal(tried["weights"][name], value), name


def full_checkpoints(folder: str) -> None:
    """Checkpoints in one file, from which one process goes on."""
    for ckpt_path, max_epochs in ((None, 2), (Path(folder, "full.ckpt"), 3)):
        pl.seed_everything(7, verbose=False)
        callback = pruning()
        trainer = trainer_of(
            RANKS, callback, strategy=strategy(save_distributed_checkpoint=False), max_epochs=max_epochs
        )
        module = Sharded()
        trainer.fit(module, ckpt_path=ckpt_path)
        if ckpt_path is None:
            trainer.save_checkpoint(Path(folder, "full.ckpt"))
    finish(folder, "full", trainer, callback, module)


def test_checkpoints_in_one_file_resume(folder):
    run_well(full_checkpoints, str(folder), folder=folder, processes=RANKS)
    assert_close(read(folder, "full-0"), read(folder, "taylor-1-0"))


def language_model(folder: str, world: int) -> None:
    """The module of train.py; sharded, it never holds the whole model."""
    pl.seed_everything(7, verbose=False)
    callback = pruning(importance={"taylor_batch": 0.75, "output_wanda": 0.25}, epoch=1)
    module = CausalLMModule(f"{folder}/model", learning_rate=1e-3, shard=world > 1, gradient_checkpointing=True)
    saver = ModelCheckpoint(Path(folder, f"lm-{world}"), filename="{epoch}", save_top_k=-1)
    chosen = strategy() if world > 1 else "auto"
    trainer = trainer_of(world, callback, saver, strategy=chosen, enable_checkpointing=True, max_epochs=2)

    def loader(sequences, seed):
        rows = [{"input_ids": ids} for ids in corpus(sequences, seed)]
        return DataLoader(rows, batch_size=8 // world, sampler=EveryNth(rows, trainer.global_rank, world))

    trainer.fit(module, loader(24, 0), loader(8, 1))
    finish(folder, f"lm-{world}", trainer, callback, module)


def test_the_module_of_train_py_reads_shards_and_its_checkpoint_becomes_a_plain_model(tmp_path):
    tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}).save_pretrained(tmp_path / "model")
    run_well(language_model, str(tmp_path), RANKS, folder=tmp_path, processes=RANKS)
    run_well(language_model, str(tmp_path), 1, folder=tmp_path)
    both, single = read(tmp_path, "lm-2-0"), read(tmp_path, "lm-1-0")
    assert PruningPlan.from_dict(both["plan"]).digest() == PruningPlan.from_dict(single["plan"]).digest()
    assert both["metrics"]["pruned"]["val_loss"] == pytest.approx(single["metrics"]["pruned"]["val_loss"], rel=1e-4)
    file = tmp_path / "whole.ckpt"
    consolidate(tmp_path / "lm-2" / "epoch=1.ckpt", file)
    loaded = CausalLMModule.load_from_checkpoint(file, shard=False, weights_only=True)
    with pytest.raises(FileNotFoundError, match="No distributed checkpoint"):
        consolidate(tmp_path, file)
    for name, value in loaded.state_dict().items():
        if name.startswith("model."):
            assert torch.equal(value, both["weights"][name]), name


def test_shards_that_cannot_be_read_are_refused(tmp_path):
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    model = empty_model(str(folder), dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    plain = load_model(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    real = empty_model(str(folder), dtype=torch.float32).to_empty(device="cpu")
    read_shards(real, str(folder))
    assert all(torch.equal(a, b) for a, b in zip(real.parameters(), plain.parameters(), strict=True))
    other = empty_model(str(folder), dtype=torch.float32, intermediate_size=20)
    with pytest.raises(UnsupportedModelError, match=r"gate_proj.* shape \[24, 32\].*\[20, 32\]"):
        read_shards(other, str(folder))
    deeper = empty_model(str(folder), dtype=torch.float32, num_hidden_layers=4).to_empty(device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"layers\.3.*are not in the safetensors files"):
        read_shards(deeper, str(folder))
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors"):
        read_shards(model, str(tmp_path))
    with pytest.raises(ValueError, match="random_weights"):
        CausalLMModule(str(folder), shard=True, random_weights=True)
    with pytest.raises(ValueError, match="found shard=True with SingleDeviceStrategy"):
        trainer_of(1).fit(CausalLMModule(str(folder), shard=True), DataLoader([]))


def refused(folder: str, what: str) -> None:
    class Tensors(Sharded):
        def configure_model(self):
            from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

            for layer in self.inner["lm"].model.layers:
                parallelize_module(layer, self.device_mesh["tensor_parallel"], {"mlp.up_proj": ColwiseParallel()})

    class Whole(Sharded):
        def configure_model(self):
            fully_shard(self.inner["lm"], mesh=self.device_mesh["data_parallel"])

    options = {"data_parallel_size": 1, "tensor_parallel_size": RANKS} if what == "tensors" else {}
    chosen = ModelParallelStrategy(process_group_backend="gloo", **options) if options else strategy()
    callback = pruning(repair="bias" if what == "bias" else None, kinds=("block",) if what == "block" else None)
    module = {"tensors": Tensors, "block": Whole}.get(what, Sharded)()
    trainer_of(RANKS, callback, strategy=chosen).fit(module)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tensors", "sharded, but not by .*fully_shard"),
        ("bias", "adds biases .* FSDP2 cannot take up"),
        ("block", "sharded as a part of .*the block 'model.layers.0' that may be removed"),
    ],
)
def test_what_sharding_cannot_do_is_refused_on_every_process(tmp_path, what, message):
    for code, output in run(refused, str(tmp_path), what, folder=tmp_path, processes=RANKS):
        assert code == 1
        assert re.search(message, output), output[-3000:]
