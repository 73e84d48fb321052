"""A live optimizer after a cut and one that a resumed run builds from the smaller model: equal, parameter by parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_pruning import fit, pruning
from test_resume import Repeatable, quiet

from conftest import tiny
from lit_prune import Limits, PruningConfig, apply_plan, get_plan, prune


def plain(named):
    return [p for _, p in named]


def plain_named(named):
    return named


def _split(named, decayed, with_names):
    groups = [[(n, p) for n, p in named if decayed(n, p)], [(n, p) for n, p in named if not decayed(n, p)]]
    groups = groups if with_names else [plain(g) for g in groups]
    return [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]


def by_dimension(named):
    return _split(named, lambda n, p: p.dim() > 1, False)


def by_dimension_named(named):
    return _split(named, lambda n, p: p.dim() > 1, True)


def by_name(named):
    return _split(named, lambda n, p: not n.endswith("bias") and "norm" not in n, True)


def biases_alone(named):
    """No group for biases has anything in it where the model has none."""
    return _split(named, lambda n, p: not n.endswith("bias"), False)


def by_layer(named):
    """A learning rate for each layer, split by decay: many groups hold biases."""
    groups = []
    for layer in ("embed_tokens", "layers.0.", "layers.1.", "layers.2.", "model.norm", "lm_head"):
        inside = [(n, p) for n, p in named if layer in n]
        groups += [g for g in _split(inside, lambda n, p: p.dim() > 1, False) if g["params"]]
    return groups


GROUPINGS = [plain, plain_named, by_dimension, by_dimension_named, by_name, biases_alone, by_layer]


def optimizer_of(model, grouping):
    return torch.optim.AdamW(
        grouping([(f"inner.{n}", p) for n, p in model.named_parameters()]), lr=1e-2, weight_decay=0.05
    )


def described(model, optimizer):
    """By parameter name: the options of its group, its name there, its position, and its state."""
    found = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            name = group["param_names"][position] if "param_names" in group else None
            found[names[id(p)]] = (number, position, group["weight_decay"], name, dict(optimizer.state[p]))
    return found


def train(model, optimizer, batches):
    for ids in batches:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("kind", ["bias", "blocks", "bias, in a model with biases"])
def test_the_live_state_is_that_of_an_optimizer_built_from_the_smaller_model(kind, grouping, batches):
    def fresh():
        return tiny("qwen2" if kind.endswith("biases") else "llama")

    if grouping is by_layer and kind == "blocks":
        pytest.skip("an optimizer with a group for each layer has another number of groups in the smaller model")
    model = fresh()
    optimizer = optimizer_of(model, grouping)
    train(model, optimizer, batches)
    kinds = ["block"] if kind == "blocks" else None
    config = PruningConfig(
        importance="taylor" if kind == "blocks" else "wanda",
        pruning_ratio=0.35 if kind == "blocks" else 0.2,
        repair=None if kind == "blocks" else "bias",
        iterations=1,
        limits=Limits(kinds=kinds, min_fraction=0.0),
    )
    prune(model, batches, lambda ids: model(input_ids=ids, labels=ids).loss, config, [optimizer])
    plan = get_plan(model)
    assert plan.blocks if kind == "blocks" else plan.biases

    resumed = fresh()
    apply_plan(resumed, plan)
    resumed.load_state_dict(model.state_dict())
    rebuilt = optimizer_of(resumed, grouping)
    fresh_names = described(resumed, rebuilt)
    rebuilt.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    live, other = described(model, optimizer), described(resumed, rebuilt)
    assert live.keys() == other.keys() == dict(model.named_parameters()).keys()
    for name, (number, position, decay, label, state) in live.items():
        assert (number, position, decay, label) == fresh_names[name][:4] == other[name][:4], name
        assert state.keys() == other[name][4].keys()
        for key, value in state.items():
            assert torch.equal(value, other[name][4][key]), (name, key)
    # the two go on alike, bit for bit
    train(model, optimizer, batches[:2])
    train(resumed, rebuilt, batches[:2])
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


class Split(Repeatable):
    def configure_optimizers(self):
        named = list(self.named_parameters())
        return torch.optim.AdamW(by_dimension_named(named), lr=3e-3)

    def training_step(self, batch, batch_idx):
        return self.inner["lm"](input_ids=batch, labels=batch).loss


def test_a_run_with_new_biases_resumes_from_its_checkpoint_bit_for_bit(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback = pruning(importance="wanda", repair="bias", validate=False)
    options = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 0}
    _, whole = fit(tmp_path, callback, saver, module=Split(), enable_checkpointing=True, **options)
    assert callback.plan.biases
    again = Split()
    quiet(pruning(importance="wanda", repair="bias", validate=False), **options).fit(
        again, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True
    )
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
