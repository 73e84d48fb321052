"""Hidden channels through the whole way: calibration, ranking, budget, repair, cut, saving, and in a fit."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from hidden_cases import MODELS, hidden_plan, inputs, logits, some
from torch.utils.data import DataLoader

from conftest import tiny, uneven_kept
from lit_prune import (
    Limits,
    PlanError,
    PruningConfig,
    PruningPlan,
    apply_plan,
    calibrate,
    find_group_sets,
    get_plan,
    load_pruned,
    prune,
    save_pruned,
)
from lit_prune.callbacks import StructuredPruning
from lit_prune.errors import BudgetError
from lit_prune.groups import HIDDEN, count_parameters
from lit_prune.ranking.candidates import masked
from lit_prune.ranking.registry import get_criterion

ALL = ("attention", "mlp", HIDDEN)


def loss_of(model):
    return lambda batch: model(**batch, labels=batch["input_ids"]).loss


def batches(model, count=3):
    return [inputs(model, seed, batch=4) for seed in range(20, 20 + count)]


def test_importance_is_the_fisher_information_of_one_gate_for_all_readers():
    """By autograd: one gate a sample and channel on what q, k, v, gate, up and the head read."""
    model = MODELS["llama"]()
    sets = find_group_sets(model, hidden=True)
    batch = inputs(model, 3, batch=4)
    config = PruningConfig(importance="fisher", limits=Limits(kinds=ALL))
    found = calibrate(model, sets, [batch], loss_of(model), config)
    gates = torch.ones(4, 1, 32, requires_grad=True)
    hooks = [
        model.get_submodule(part.module).register_forward_pre_hook(lambda _, args: (args[0] * gates,))
        for part in sets[0].consumers
    ]
    assert len(hooks) == 3 * 5 + 1
    loss_of(model)(batch).backward()
    expected = (gates.grad[:, 0] * 4).square().mean(dim=0)
    (term,) = get_criterion("fisher").terms
    torch.testing.assert_close(found.reduced[term, sets[0].key, 0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_masked_is_cut(name):
    """What candidates are compared by."""
    dense = MODELS[name]()
    sets = find_group_sets(dense, hidden=True)
    plan = hidden_plan(dense, some(32, 20), uneven_kept(sets[1:]))
    with masked(dense, sets, plan):
        expected = logits(dense)
    model = copy.deepcopy(dense)
    apply_plan(model, plan)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [(HIDDEN,), ALL])
@pytest.mark.parametrize(
    ("name", "rotate"), [("llama-tied", False), ("llama-tied", True), ("llama", True), ("gpt2", False)]
)
def test_budget_is_met_exactly(name, rotate, kinds, tmp_path):
    model = MODELS[name]()
    before = count_parameters(model)
    limits = Limits(kinds=kinds, multiple_of={HIDDEN: 4, "mlp": 1}, min_fraction=0.1)
    # hidden channels cost the most, so that they are the first to leave where all are as important
    config = PruningConfig("random", 0.4, limits=limits, rotate_hidden=rotate, iterations=1)
    table, plan = prune(model, batches(model), loss_of(model), config)
    removed = before - count_parameters(model)
    hidden = next(s for s in find_group_sets(MODELS[name](), hidden=True))
    step = (
        (4 if name == "gpt2" else 8) * hidden.cost
        if kinds == (HIDDEN,)
        else max(s.cost for s in find_group_sets(MODELS[name]()))
    )
    # a tied head that was untied has to leave, too
    assert 0 <= 0.4 * before - removed < step
    assert plan.rotated == rotate
    kept = next(len(e.kept) for e in plan.entries if e.kind == HIDDEN)
    assert kept % 4 == 0 and model.config.hidden_size == kept
    assert set(table.to_arrow()["kind"].to_pylist()) == {"attention", "mlp", HIDDEN}
    loaded = load_pruned(save_pruned(model, tmp_path / "m"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert get_plan(loaded).digest() == get_plan(model).digest() == plan.digest()


def test_a_plan_of_turned_states_needs_the_weights_that_go_with_it():
    model = MODELS["qwen3"]()
    limits = Limits(kinds=(HIDDEN,), multiple_of={HIDDEN: 4})
    _, plan = prune(model, batches(model), loss_of(model), PruningConfig(limits=limits, rotate_hidden=True))
    again = PruningPlan.from_dict(plan.to_dict())
    assert again == plan and again.digest() == plan.digest()
    with pytest.raises(PlanError, match="turned"):
        apply_plan(MODELS["qwen3"](), plan)


def test_an_error_undoes_the_rotation():
    model = MODELS["llama-tied"]()
    before = copy.deepcopy(model.state_dict())

    def record(table, plan):
        raise RuntimeError("full disk")

    from contextlib import nullcontext

    from lit_prune.pipeline import prune_with

    config = PruningConfig(limits=Limits(kinds=ALL), rotate_hidden=True)
    with pytest.raises(RuntimeError, match="full disk"):
        prune_with(model, lambda _: nullcontext((batches(model), loss_of(model))), config, record=record)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="'hidden' among the kinds"):
        PruningConfig(rotate_hidden=True)
    with pytest.raises(ValueError, match="repair='bias'"):
        PruningConfig(repair="bias", limits=Limits(kinds=(HIDDEN,)))
    for refused in ({"budget": {"params": "0.8"}}, {"polish_epochs": 2}, {"quality": "best"}):
        with pytest.raises(
            ValueError, match=r"neither budget nor polish_epochs .*quality='best'.* where kinds has 'hidden'"
        ):
            PruningConfig(limits=Limits(kinds=(HIDDEN,)), **refused)
    PruningConfig(limits=Limits(kinds=(HIDDEN,)), quality="fast")
    model = MODELS["llama"]()
    sets = find_group_sets(model, hidden=True)
    with pytest.raises(BudgetError):
        PruningConfig(pruning_ratio=0.99, limits=Limits(kinds=ALL, min_fraction=0.1)).check(model, sets)
    # layers may be protected beside hidden channels, which are kept by the name of their own set
    free = Limits(kinds=(HIDDEN,), protect=[0, "layers.1.mlp"], multiple_of={HIDDEN: 8})
    PruningConfig(pruning_ratio=0.3, limits=free).check(model, sets)
    with pytest.raises(BudgetError):
        PruningConfig(pruning_ratio=0.3, limits=Limits(kinds=(HIDDEN,), protect=["embed_tokens"])).check(model, sets)


class Module(pl.LightningModule):
    def __init__(self, tied):
        super().__init__()
        self.model = tiny("llama", tie_word_embeddings=tied)

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(module, steps, rotate, **options):
    data = torch.randint(1, 64, (16, 10), generator=torch.Generator().manual_seed(0))
    pruning = StructuredPruning(
        importance="random",
        pruning_ratio=0.4,
        step=2,
        kinds=ALL,
        calibration_batches=1,
        iterations=1,
        rotate_hidden=rotate,
        min_fraction=0.1,
    )
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[pruning], **({"enable_checkpointing": False}),
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(data, batch_size=16), **options)
    return trainer, pruning


@pytest.mark.parametrize(("rotate", "tied"), [(False, True), (True, True), (True, False)])
def test_in_a_fit_that_is_resumed(rotate, tied, tmp_path):
    whole = Module(tied)
    trainer, pruning = fit(whole, 4, rotate)
    assert whole.model.config.hidden_size < 32 and pruning.plan.rotated == rotate
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(tied)
    again, _ = fit(resumed, 6, rotate, ckpt_path=tmp_path / "half.ckpt")
    straight = Module(tied)
    fit(straight, 6, rotate)
    for (name, a), (_, b) in zip(resumed.state_dict().items(), straight.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    for a, b in zip(again.optimizers[0].param_groups[0]["params"], resumed.parameters(), strict=True):
        assert a is b
