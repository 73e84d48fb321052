"""LightningModules around LitGPT's models, as LitGPT's documentation writes them: the callback is the only change."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from litgpt_package import VOCABULARY, ids, import_litgpt, named, write_folder
from test_litgpt import latent
from test_matrix import Mask
from test_pruning import corpus, fit, pruning
from torch.utils.data import DataLoader

from lit_prune import apply_plan, find_group_sets, get_plan, load_pruned, rebuild_from_checkpoint, save_pruned
from lit_prune.callbacks import CubicSchedule, PruningReport

litgpt = import_litgpt()
from litgpt.utils import chunked_cross_entropy  # noqa: E402

CUBIC = CubicSchedule(start=4, end=16, stages=3, unit="step")
# of one key/value head the zeros of the oracle would grow again: the values that they weight are not zero
MODELS = {
    "llama": lambda: named("Llama-3.2-1B"),
    "windows, norms behind": lambda: named("Gemma-2-2b"),
    "experts": lambda: named("Mixtral-8x7B-v0.1"),
    "latent attention": latent,
}


class Data(pl.LightningModule):
    """What the modules have in common: batches of LitGPT's own form, a momentum optimizer."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        rows = [{"input_ids": row, "labels": row} for row in corpus(24, 0) % VOCABULARY]
        return DataLoader(rows, batch_size=4)

    def val_dataloader(self):
        rows = [{"input_ids": row, "labels": row} for row in corpus(8, 1) % VOCABULARY]
        return DataLoader(rows, batch_size=4)


class Chunked(Data):
    """A ``litgpt.GPT`` whose head and loss are computed in chunks, as LitGPT's finetuning does."""

    def __init__(self, model):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"lm": model})

    def loss(self, batch):
        logits = self.inner["lm"](batch["input_ids"], lm_head_chunk_size=4)
        logits[-1] = logits[-1][:, :-1]
        return chunked_cross_entropy(logits, batch["labels"][:, 1:], chunk_size=4)


class LitLLM(Data):
    """The module of LitGPT's README, which builds the model in ``setup``, and what its checkpoints need to load.

    ``LLM.state_dict`` leaves out a part of the names by which ``load_state_dict`` asks for the weights, pruned or not.
    """

    def __init__(self, checkpoint_dir):
        super().__init__()
        self.save_hyperparameters()
        self.llm = litgpt.LLM.load(checkpoint_dir, distribute=None)

    def setup(self, stage):
        self.llm.trainer_setup()

    def loss(self, batch):
        return self.llm(input_ids=batch["input_ids"], target_ids=batch["labels"])[1]

    def on_load_checkpoint(self, checkpoint):
        if self.llm.model is None:
            # load_from_checkpoint calls no setup
            self.llm.trainer_setup()
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"llm.model.{name.removeprefix('llm.')}": w for name, w in weights.items()}
        rebuild_from_checkpoint(self, checkpoint)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_on_as_a_dense_run_with_the_removed_groups_at_zero(tmp_path, name):
    """The optimizer's momentum included; the cut is in the middle of an epoch."""
    callback = pruning(repair=None, step=4, mlp_multiple_of=1)
    trainer, module = fit(tmp_path, callback, module=Chunked(MODELS[name]()), max_epochs=2)
    model = module.inner["lm"]
    assert callback.stages_done == 1
    assert {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    before = callback.plan.info["parameters_before"]
    assert 0.15 * before < before - sum(p.numel() for p in model.parameters()) <= 0.2 * before
    _, dense = fit(tmp_path, Mask(callback.plan, step=4), module=Chunked(MODELS[name]()), max_epochs=2)
    apply_plan(dense.inner["lm"], callback.plan)
    start = MODELS[name]()
    apply_plan(start, callback.plan)
    for key, value in model.state_dict().items():
        expected, first = (m.state_dict()[key].double() for m in (dense.inner["lm"], start))
        moved = (expected - first).norm()
        assert (value.double() - expected).norm() <= 1e-4 * moved + 1e-6 * first.norm(), key


@pytest.mark.parametrize("name", ["llama", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_cubic_schedule_resumed_in_the_middle_ends_bit_for_bit_the_same(tmp_path, name):
    options = {"schedule": CUBIC, "pruning_ratio": 0.25, "iterations": 1, "mlp_multiple_of": 1}

    def run(folder, checkpoint=None):
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=6)
        callback = pruning(**options)
        module = Chunked(MODELS[name]())
        fit(
            tmp_path,
            callback,
            saver,
            module=module,
            checkpoint=checkpoint,
            max_epochs=4,
            enable_checkpointing=True,
        )
        return callback, module

    whole, expected = run(tmp_path / "whole")
    assert whole.stages_done == 3
    # after two of the three cuts; the run that goes on begins with a dense model
    resumed, found = run(tmp_path / "resumed", tmp_path / "whole" / "step=12.ckpt")
    assert resumed.plan == whole.plan
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_the_module_of_the_readme_prunes_saves_and_loads(tmp_path):
    """``LLM.load`` before, ``setup`` builds the model, ``LLM.load`` after: a uniform model is an ordinary folder again."""
    dense = write_folder(tmp_path / "dense")
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="last")
    callback = pruning(epoch=1, uniform=True, mlp_multiple_of=1)
    _, module = fit(tmp_path, callback, saver, module=LitLLM(str(dense)), enable_checkpointing=True, max_epochs=2)
    model = module.llm.model.eval()
    assert get_plan(model) == callback.plan
    assert model.config.n_head == 8 > find_group_sets(model)[0].size

    save_pruned(model, tmp_path / "pruned", dense)
    after = LitLLM(str(tmp_path / "pruned"))
    after.setup("fit")
    with torch.no_grad():
        expected = model(ids())
        assert torch.equal(after.llm.model.eval()(ids()), expected)
        assert torch.equal(load_pruned(tmp_path / "pruned")(ids()), expected)
        last = tmp_path / "checkpoints" / "last.ckpt"
        loaded = LitLLM.load_from_checkpoint(last, weights_only=True)
        assert torch.equal(loaded.llm.model.eval()(ids()), expected)
        again = LitLLM(str(dense))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(accelerator="cpu", callbacks=[pruning(epoch=1)], default_root_dir=tmp_path, **quiet)
        trainer.validate(again, ckpt_path=last, weights_only=True, verbose=False)
        assert torch.equal(again.llm.model.eval()(ids()), expected)


@pytest.mark.slow
def test_the_report_writes_the_model_too(tmp_path):
    report = PruningReport(output_dir=tmp_path / "report", tokenizer=None)
    callback = pruning(epoch=1, uniform=True, mlp_multiple_of=1)
    _, module = fit(tmp_path, callback, report, module=Chunked(MODELS["llama"]()), max_epochs=2)
    with torch.no_grad():
        found = load_pruned(tmp_path / "report" / "model")(ids())
        assert torch.equal(found, module.inner["lm"].eval()(ids()))
