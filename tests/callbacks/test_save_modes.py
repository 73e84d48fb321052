"""Every way in which Lightning saves a checkpoint: the plan is in it, and the weights load again."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from processes import run_well
from test_ddp import RANKS, Plain, trainer_of
from test_fsdp import Sharded, strategy
from test_pruning import Module, fit, pruning
from test_resume import Loadable, Tested, quiet
from torch.distributed.tensor import DTensor

from conftest import tiny, uneven_kept
from lit_prune import PlanError, PruningError, PruningPlan, apply_plan, find_group_sets, get_plan
from lit_prune.callbacks import LoRARecovery, Stage
from lit_prune.distributed import shards
from lit_prune.io.huggingface import convert_checkpoint
from lit_prune.io.lightning_checkpoint import KEY
from lit_prune.training.sharded import consolidate


def cut(**options):
    """Cheap, as only the plan counts here."""
    return pruning(**{"validate": False, "repair": None, "iterations": 1, **options})


class Loaded(Loadable):
    """As Lightning's documentation has it, and a hook that makes ``load_from_checkpoint`` work."""


class Interrupted(Exception):
    pass


class Interrupts(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 8:
            raise Interrupted


def one_epoch_more(folder, *callbacks, **options):
    """A run with the cut at epoch 1 of 2."""
    return fit(folder, cut(), *callbacks, module=Loaded(), max_epochs=2, **options)


def save_by_hand(folder: Path, weights_only: bool, **options):
    trainer, module = one_epoch_more(folder, **options)
    trainer.save_checkpoint(folder / "it.ckpt", weights_only=weights_only)
    trainer.strategy.checkpoint_io.teardown()
    return folder / "it.ckpt", module


def by_hand(folder):
    return save_by_hand(folder, False)


def by_hand_weights_only(folder):
    return save_by_hand(folder, True)


def asynchronous_weights_only(folder):
    return save_by_hand(folder, True, plugins=[AsyncCheckpointIO()])


def asynchronous(folder):
    saver = ModelCheckpoint(folder, filename="it")
    _, module = one_epoch_more(folder, saver, enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    return folder / "it.ckpt", module


def weights_only(folder):
    saver = ModelCheckpoint(folder, filename="it", save_weights_only=True)
    _, module = one_epoch_more(folder, saver, enable_checkpointing=True)
    return folder / "it.ckpt", module


def weights_only_every_step(folder):
    saver = ModelCheckpoint(folder, filename="{step}", save_weights_only=True, every_n_train_steps=1, save_top_k=-1)
    _, module = one_epoch_more(folder, saver, enable_checkpointing=True)
    # the cut is before step 7
    assert torch.load(folder / "step=6.ckpt", weights_only=True)[KEY]["states"][0]["plan"] is None
    return folder / "step=12.ckpt", module


def last_link(folder):
    saver = ModelCheckpoint(folder, filename="it", save_last="link", save_weights_only=True)
    _, module = one_epoch_more(folder, saver, enable_checkpointing=True)
    assert (folder / "last.ckpt").is_symlink()
    return folder / "last.ckpt", module


def interrupted(folder, callback):
    module = Loaded()
    with pytest.raises(Interrupted):
        fit(folder, cut(), Interrupts(), callback, module=module, enable_checkpointing=True)
    return module


def saver_on_exception(folder):
    saver = ModelCheckpoint(folder, filename="none", save_on_exception=True, save_weights_only=True)
    module = interrupted(folder, saver)
    (path,) = folder.glob("*.ckpt")
    return path, module


def on_exception_checkpoint(folder):
    class Kept(OnExceptionCheckpoint):
        def teardown(self, trainer, *_, **__):
            """Leave the file: Lightning removes it at the end of a run that went well."""

    return folder / "on_exception.ckpt", interrupted(folder, Kept(folder))


MODES = (
    by_hand,
    by_hand_weights_only,
    asynchronous,
    asynchronous_weights_only,
    weights_only,
    weights_only_every_step,
    last_link,
    saver_on_exception,
    on_exception_checkpoint,
)


def assert_same(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    states = module.state_dict()
    assert states.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(states[name], value), name


@pytest.mark.parametrize("save", MODES, ids=lambda f: f.__name__)
def test_what_every_save_mode_writes_loads(tmp_path, save):
    path, module = save(tmp_path)
    plan = get_plan(module.inner["lm"])
    assert plan is not None
    content = torch.load(path, weights_only=True)
    assert [s["digests"]["now"] for s in content[KEY]["states"]] == [plan.digest()]
    alone = "optimizer_states" not in content
    assert alone == ("callbacks" not in content)
    assert_same(Loaded.load_from_checkpoint(path, weights_only=True), module)
    # epoch=0 prunes under validate: not what was pruned already
    for callbacks, again in (([cut(epoch=0)], Tested()), ([], Loaded())):
        assert quiet(*callbacks).validate(again, ckpt_path=path, weights_only=True, verbose=False)
        assert_same(again, module)
    converted = convert_checkpoint(path, tiny("llama"))
    assert_same(converted, module.inner["lm"])
    resumed = Tested()
    if alone:
        # as without pruning: Lightning needs the optimizers' state to go on
        with pytest.raises(KeyError, match="checkpoint contains only the model"):
            quiet(cut(), max_epochs=3).fit(resumed, ckpt_path=path, weights_only=True)
    else:
        quiet(cut(), max_epochs=3).fit(resumed, ckpt_path=path, weights_only=True)
        assert get_plan(resumed.inner["lm"]).digest() == plan.digest()


def test_checkpoints_of_older_versions_load(tmp_path):
    """The plan was among the states of the callbacks alone, without the schedule."""
    path, module = by_hand(tmp_path)
    content = torch.load(path, weights_only=True)
    del content[KEY]
    state = content["callbacks"]["StructuredPruning"]
    for name in ("stages", "ratio_of", "reached"):
        del state[name]
    del state["digests"]["plan"]
    torch.save(content, tmp_path / "old.ckpt")
    assert_same(Loaded.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True), module)
    again, callback = Tested(), cut()
    quiet(callback, max_epochs=2).fit(again, ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert callback.stages_done == 1
    assert_same(again.inner["lm"], module.inner["lm"])


def test_weights_of_other_shapes_without_a_plan_are_refused_by_name(tmp_path):
    path, _ = by_hand_weights_only(tmp_path)
    content = torch.load(path, weights_only=True)
    del content[KEY]
    torch.save(content, tmp_path / "bare.ckpt")
    message = r"holds no pruning plan, and 'inner\.lm\..*has shape .* one of the two was pruned"
    with pytest.raises(PlanError, match=message):
        Loaded.load_from_checkpoint(tmp_path / "bare.ckpt", weights_only=True)
    with pytest.raises(PlanError, match=message):
        quiet(cut()).validate(Tested(), ckpt_path=tmp_path / "bare.ckpt", weights_only=True, verbose=False)
    # what pruning never changes is the module's own affair
    dense = Module()
    weights = {**dense.state_dict(), "inner.lm.lm_head.weight": torch.zeros(3, 32)}
    Loaded.on_load_checkpoint(dense, {"state_dict": weights})


def test_a_plan_that_was_changed_in_the_checkpoint_is_refused(tmp_path):
    path, _ = by_hand_weights_only(tmp_path)
    whole = torch.load(path, weights_only=True)
    for name, change in (
        ("entry", lambda state: state["plan"]["group_sets"].pop()),
        ("digest", lambda state: state["digests"].update(plan=None, now="0" * 64)),
        ("field", lambda state: state.pop("digests")),
        ("version", lambda state: state["plan"].update(version=99)),
    ):
        content = copy.deepcopy(whole)
        change(content[KEY]["states"][0])
        torch.save(content, tmp_path / f"{name}.ckpt")
        module = Loaded()
        before = [p.shape for p in module.parameters()]
        match = {"field": "malformed", "version": "version 99"}.get(name, "changed after it was saved")
        with pytest.raises(PlanError, match=match):
            quiet(cut()).validate(module, ckpt_path=tmp_path / f"{name}.ckpt", weights_only=True, verbose=False)
        with pytest.raises(PlanError, match=match):
            Loaded.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        with pytest.raises(PlanError, match=match):
            convert_checkpoint(tmp_path / f"{name}.ckpt", tiny("llama"))
        assert [p.shape for p in module.parameters()] == before
    content = {**whole, KEY: {"version": 2, "states": []}}
    with pytest.raises(PlanError, match="version 2; this lit_prune reads version 1"):
        Loaded.on_load_checkpoint(Loaded(), content)


class Two(Loadable):
    """Two models, each with a callback of its own."""

    def __init__(self):
        super().__init__()
        self.other = tiny("llama", num_hidden_layers=2)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.other(input_ids=batch, labels=batch).loss


def test_weights_alone_of_two_models_with_a_callback_each(tmp_path):
    def callbacks():
        return [
            cut(model_path="inner.lm"),
            cut(model_path="other", pruning_ratio=0.3),
        ]

    trainer, module = fit(tmp_path, *callbacks(), module=Two(), max_epochs=2)
    path = tmp_path / "two.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    assert_same(Two.load_from_checkpoint(path, weights_only=True), module)
    for given in (callbacks(), callbacks()[:1], []):
        again = Two()
        quiet(*given).validate(again, ckpt_path=path, weights_only=True, verbose=False)
        assert_same(again, module)
    with pytest.raises(PruningError, match=r"plans of several models, \['inner.lm', 'other'\]"):
        convert_checkpoint(path, tiny("llama"))
    assert_same(convert_checkpoint(path, tiny("llama", num_hidden_layers=2), name="other"), module.other)


def test_weights_alone_of_a_run_in_the_middle_of_its_adapters(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True, save_top_k=-1)

    class Whole(Loadable):
        def training_step(self, batch, batch_idx):
            return self.inner["lm"](input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    _, module = fit(
        tmp_path,
        cut(),
        LoRARecovery(r=2),
        saver,
        module=Whole(),
        max_epochs=2,
        enable_checkpointing=True,
    )
    path = tmp_path / "epoch=1.ckpt"
    content = torch.load(path, weights_only=True)
    assert any(".lora_A." in name for name in content["state_dict"])
    loaded, measured = Whole.load_from_checkpoint(path, weights_only=True), Whole()
    quiet(cut()).validate(measured, ckpt_path=path, weights_only=True, verbose=False)
    # peft merged the live ones
    for again in (loaded, measured):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert get_plan(loaded.inner["lm"]) is not None


def saved_sharded(folder: str) -> None:
    """FSDP2, in shards and in one file, weights alone and all; and DDP, in the same two processes."""
    for name, module, trainer in (
        ("shards", Sharded(), trainer_of(RANKS, cut(), strategy=strategy(), max_epochs=2)),
        (
            "full",
            Sharded(),
            trainer_of(RANKS, cut(), strategy=strategy(save_distributed_checkpoint=False), max_epochs=2),
        ),
        ("ddp", Plain(), trainer_of(RANKS, cut(), max_epochs=2)),
    ):
        trainer.fit(module)
        for weights_only in (False, True):
            path = Path(folder, f"{name}-{weights_only}.ckpt")
            trainer.save_checkpoint(path, weights_only=weights_only)
            again = type(module)()
            options = {"strategy": strategy()} if name != "ddp" else {}
            trainer_of(RANKS, cut(), **options).validate(again, ckpt_path=path, verbose=False)
            shards.reshard(again)
            shards.reshard(module)
            for (key, a), b in zip(again.named_parameters(), module.parameters(), strict=True):
                if isinstance(a, DTensor):
                    a, b = a.full_tensor(), b.full_tensor()
                assert torch.equal(a, b), (name, weights_only, key)


def test_shards_full_files_and_ddp_save_weights_alone(tmp_path):
    run_well(saved_sharded, str(tmp_path), folder=tmp_path, processes=RANKS)
    for weights_only in (False, True):
        consolidate(tmp_path / f"shards-{weights_only}.ckpt", tmp_path / "whole.ckpt")
        for path in ("whole.ckpt", f"full-{weights_only}.ckpt", f"ddp-{weights_only}.ckpt"):
            model = convert_checkpoint(tmp_path / path, tiny("llama"))
            assert get_plan(model) is not None


def test_what_is_saved_is_true_to_the_weights_whatever_the_callback_went_through(tmp_path):
    """A model that was pruned before its callback ever ran, and a checkpoint that a step writes while it calibrates."""
    module = Loaded()
    plan = PruningPlan.from_kept(find_group_sets(module.inner["lm"]), uneven_kept(find_group_sets(module.inner["lm"])))
    apply_plan(module.inner["lm"], plan)
    trainer = quiet(cut())
    trainer.validate(module, verbose=False)
    trainer.save_checkpoint(tmp_path / "given.ckpt", weights_only=True)
    assert_same(Loaded.load_from_checkpoint(tmp_path / "given.ckpt", weights_only=True), module)

    class Saves(Loaded):
        def training_step(self, batch, batch_idx):
            if not self.training:
                self.trainer.save_checkpoint(tmp_path / "calibration.ckpt", weights_only=True)
                # on the class, which calibration does not put back
                Saves.saved = copy.deepcopy(self.state_dict())
            return super().training_step(batch, batch_idx)

    _, module = fit(tmp_path, cut(schedule=[Stage(0.1, epoch=0), Stage(0.2, epoch=1)]), module=Saves(), max_epochs=2)
    loaded = Loaded.load_from_checkpoint(tmp_path / "calibration.ckpt", weights_only=True)
    assert get_plan(loaded.inner["lm"]) is not None
    for name, value in module.saved.items():
        assert torch.equal(loaded.state_dict()[name], value), name
