"""What is one parameter in a model, and what is not, is so in the one that is loaded, whatever the config said."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from hidden_cases import hidden_plan, some
from test_export import pruned, uniform, without_block
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from conftest import tiny
from lit_prune import PruningConfig, UnsupportedModelError, apply_plan, load_pruned, prune, save_pruned
from lit_prune.callbacks import StructuredPruning
from lit_prune.io.huggingface import convert_checkpoint

pytestmark = pytest.mark.core


def narrower(tied: bool) -> nn.Module:
    model = tiny(tie_word_embeddings=tied)
    apply_plan(model, hidden_plan(model, some(32, 24), None))
    return model


CUTS = {
    "uneven": lambda tied: pruned(tie_word_embeddings=tied),
    "uniform": lambda tied: uniform(tiny(tie_word_embeddings=tied)),
    "blocks": lambda tied: without_block(tiny(tie_word_embeddings=tied), 1),
    "hidden": narrower,
}


def untie(model):
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    return model


def tie(model):
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("save", [save_pruned, lambda m, folder: m.save_pretrained(folder)], ids=["ours", "its own"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("tied", "change"), [(True, untie), (False, tie)], ids=["untied", "tied"])
def test_a_head_changed_by_hand_is_saved_as_it_is(tmp_path, tokens, cut, tied, change, save):
    model = change(cut(tied))
    expected = model(tokens).logits
    save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is not tied
    for load in (load_pruned, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "model")
        assert torch.equal(loaded(tokens).logits, expected)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is not tied
    assert torch.equal(model(tokens).logits, expected) and model.config.tie_word_embeddings is tied


def test_a_head_untied_before_the_cut_is_saved_as_it_is(tmp_path, tokens):
    model = uniform(untie(tiny(tie_word_embeddings=True)))
    save_pruned(model, tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(tokens).logits, model(tokens).logits)


class Untied(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = untie(tiny(tie_word_embeddings=True))

    def training_step(self, batch, batch_idx):
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_with_an_untied_head_converts(tmp_path, tokens, tied):
    module = Untied()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[StructuredPruning(pruning_ratio=0.2, step=1, calibration_batches=1)],
    )
    trainer.fit(module, DataLoader(list(tokens), batch_size=1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    converted = convert_checkpoint(tmp_path / "run.ckpt", tiny(tie_word_embeddings=tied))
    assert torch.equal(converted(tokens).logits, module.net.eval()(tokens).logits)
    assert converted.config.tie_word_embeddings is False


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        return self.other(self.down(torch.relu(self.up(self.one(x)))))


def test_a_module_untied_by_hand_loads_as_it_was(tmp_path):
    x = torch.randn(4, 6)
    model = Tied()
    prune(model, [x], lambda b: model(b).square().mean(), PruningConfig(pruning_ratio=0.1))
    model.other.weight = nn.Parameter(3 * model.one.weight.detach())
    save_pruned(model, tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model", model=Tied)(x), model.eval()(x))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
@pytest.mark.parametrize("whole", [False, True])
def test_a_wrapped_model_is_saved_as_the_one_within(tmp_path, tokens, wrap, whole):
    model = pruned()
    wrapped = wrap(model)
    save_pruned(wrapped, tmp_path / "model", state_dict=wrapped.state_dict() if whole else None)
    assert torch.equal(load_pruned(tmp_path / "model")(tokens).logits, model(tokens).logits)


def test_a_model_with_adapters_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pruned(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        save_pruned(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
