"""Recalibration of batch norms after a cut, against statistics that torch computes in training mode and by hand."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings

import lightning.pytorch as pl
import pytest
import torch
from convolution_cases import TwoReaders, group_set, singles
from own_models import MyResNet
from torch import nn
from torch.utils.data import DataLoader

from conftest import tiny, uneven_kept
from lit_prune import PruningConfig, PruningPlan, apply_plan, find_group_sets, get_plan, prune
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.callbacks import StructuredPruning
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Slice
from lit_prune.pipeline import prune_with
from lit_prune.ranking.candidates import masked
from lit_prune.repair.batch_norm import recalibrate_batch_norms


def data_of(batches, forward):
    return functools.partial(contextlib.nullcontext, (batches, forward))


def warmed(model, shape=(16, 3, 8, 8)):
    torch.manual_seed(0)
    model.train()
    for _ in range(5):
        model(torch.randn(*shape))
    return model.eval()


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def buffers(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def case():
    torch.manual_seed(0)
    model = warmed(TwoReaders(), (16, 2, 8, 8))
    sets = model.group_sets()
    plan = PruningPlan.from_kept(sets, [[0, 2, 3, 5], list(range(5))])
    return model, sets, plan, [torch.randn(6, 2, 8, 8) * 2 + 1 for _ in range(4)]


def test_the_statistics_are_those_of_all_values_and_norms_before_the_cut_keep_theirs():
    model, sets, plan, batches = case()
    before = buffers(model)
    with masked(model, sets, plan):
        undo = recalibrate_batch_norms(model, sets, plan, data_of(batches, model))
        with torch.no_grad():
            x = torch.cat([model.norm(model.stem(b)).relu() for b in batches])
            y = model.first(x) + model.second(x)
    values = y.movedim(1, -1).flatten(0, -2).double()
    torch.testing.assert_close(model.norm2.running_mean, values.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm2.running_var, values.var(0).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert torch.equal(model.norm.running_var, before["norm.running_var"])
    assert not any(m.training for m in model.modules())
    undo()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_norms_behind_norms_see_what_training_mode_shows_them():
    """One batch: the running statistics are those of torch's own training mode with a momentum of 1."""
    model = warmed(MyResNet())
    sets = find_group_sets(model)
    plan = PruningPlan.from_kept(sets, uneven_kept(sets))
    batch = torch.randn(8, 3, 8, 8)
    reference = copy.deepcopy(model)
    with masked(model, sets, plan):
        recalibrate_batch_norms(model, sets, plan, data_of([batch], model))
    with masked(reference, sets, plan), torch.no_grad():
        # the first norm runs before anything that lost inputs
        for norm in list(norms(reference).values())[1:]:
            norm.train()
            norm.momentum = 1.0
        reference(batch)
    assert len(norms(model)) == 9
    for name, norm in norms(model).items():
        other = norms(reference)[name]
        torch.testing.assert_close(norm.running_mean, other.running_mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var, other.running_var, rtol=1e-4, atol=1e-6)
        assert int(norm.num_batches_tracked) == 5


def test_skipped_batches_do_not_count_and_random_numbers_go_on():
    model, sets, plan, batches = case()
    other = copy.deepcopy(model)

    def skipping(batch):
        model(batch)
        return SKIPPED if float(batch.mean()) > 50 else None

    state = torch.get_rng_state()
    with masked(model, sets, plan):
        recalibrate_batch_norms(model, sets, plan, data_of([batches[0] + 100, *batches, batches[1] + 100], skipping))
    assert torch.equal(torch.get_rng_state(), state)
    with masked(other, sets, plan):
        recalibrate_batch_norms(other, sets, plan, data_of(batches, other))
    assert all(torch.equal(b, dict(other.named_buffers())[n]) for n, b in model.named_buffers())


def test_processes_add_up_what_they_saw():
    """Two processes with a part of the batches each find what one finds with all of them."""
    model, sets, plan, batches = case()
    parts = [batches[:1], batches[1:]]
    whole = copy.deepcopy(model)
    with masked(whole, sets, plan):
        recalibrate_batch_norms(whole, sets, plan, data_of(batches, whole))
    sums = []

    def note(tensor):
        sums[-1].append(tensor.clone())
        return tensor

    for part in parts:
        sums.append([])
        copied = copy.deepcopy(model)
        with masked(copied, sets, plan):
            recalibrate_batch_norms(copied, sets, plan, data_of(part, copied), all_reduce=note)
    both = iter([a + b for a, b in zip(*sums, strict=True)])
    with masked(model, sets, plan):
        recalibrate_batch_norms(model, sets, plan, data_of(parts[0], model), all_reduce=lambda _: next(both))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(whole.named_buffers())[name], rtol=1e-6, atol=1e-7)


def test_an_error_puts_the_statistics_back():
    model, sets, plan, batches = case()
    before = buffers(model)

    def failing(batch):
        handle = model.norm2.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            model(batch)
        finally:
            handle.remove()

    with pytest.raises(UnsupportedModelError, match=r"batch 0 ran before, and cannot be run again .*division by zero"):
        recalibrate_batch_norms(model, sets, plan, data_of(batches, failing))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_norm_that_sees_one_value_a_channel_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    sets = [group_set(model, "0", [Slice("0.weight", 0, singles(4), 1), Slice("1.weight", 1, singles(4), 1)])]
    plan = PruningPlan.from_kept(sets, [[0, 1]])
    model.eval()
    before = buffers(model)
    recalibrate_batch_norms(model, sets, plan, data_of([torch.randn(1, 3)], model))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    # several batches of one value are several values
    recalibrate_batch_norms(model, sets, plan, data_of([torch.randn(1, 3) for _ in range(3)], model))
    assert not torch.equal(model[2].running_mean, before["2.running_mean"])


@pytest.mark.parametrize("repair", [None, "bias", "least_squares"])
def test_prune_recalibrates_by_default_and_an_error_afterwards_undoes_it(repair):
    torch.manual_seed(0)
    model = warmed(MyResNet())
    batches = [{"pixel_values": torch.randn(8, 3, 8, 8) * 2, "labels": torch.randint(0, 3, (8,))} for _ in range(3)]
    models = [copy.deepcopy(model) for _ in range(2)]
    for flag, one in zip((True, False), models, strict=True):
        config = PruningConfig(pruning_ratio=0.4, repair=repair, recalibrate_batch_norm=flag, iterations=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prune(one, batches, lambda b, one=one: one(**b)[1], config)
    with_it, without = (norms(one) for one in models)
    # of the first norm that was changed: does it scale by the statistics of what it reads?
    first = next(n for n, norm in with_it.items() if not torch.equal(norm.running_var, without[n].running_var))
    apart = []
    for one in models:
        norm, read = one.get_submodule(first), []
        norm.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].detach()))
        for batch in batches:
            one(**batch)
        variance = torch.cat(read).movedim(1, -1).flatten(0, -2).var(0)
        apart.append(float((variance / norm.running_var - 1).abs().max()))
    assert get_plan(models[0]).entries == get_plan(models[1]).entries
    assert apart[0] < 1e-3 < 0.1 < apart[1]
    before = {n: v.clone() for n, v in model.state_dict().items()}

    def refuse(table, plan):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_with(
            model,
            lambda _: contextlib.nullcontext((batches, lambda b: model(**b)[1])),
            PruningConfig(pruning_ratio=0.4, repair=repair),
            record=refuse,
        )
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_models_without_batch_norms_are_not_run_again(batches, loss_of):
    model, runs = tiny("llama"), []

    def loss(batch):
        runs.append(1)
        return loss_of(model)(batch)

    counts = []
    for flag in (True, False):
        model = tiny("llama")
        runs.clear()
        prune(model, batches, loss, PruningConfig("wanda", 0.2, iterations=1, recalibrate_batch_norm=flag))
        counts.append(len(runs))
    assert counts[0] == counts[1]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = MyResNet()

    def training_step(self, batch):
        images, labels = batch
        # noise of the step's own: the same in every pass
        return self.model(images + 0.1 * torch.randn_like(images), labels)[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


@pytest.mark.parametrize("repair", ["bias", "least_squares"])
def test_in_a_fit_convolutions_are_repaired_and_norms_recalibrated_with_no_trace(repair, recwarn, tmp_path):
    torch.manual_seed(0)
    module = Module()
    images = [(torch.randn(3, 8, 8), i % 3) for i in range(32)]
    found = []

    class Look(pl.Callback):
        def on_pruning_end(self, trainer, pl_module, pruning):
            found.append({n: int(m.num_batches_tracked) for n, m in norms(pl_module).items()})

    pruning = StructuredPruning(pruning_ratio=0.4, step=2, calibration_batches=3, validate=False, repair=repair)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning, Look()],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(images, 8, shuffle=True))
    assert trainer.global_step == 8
    assert set(found[0].values()) == {2}
    assert not [w for w in recwarn if "repaired" in str(w.message) or "trace" in str(w.message)]
    before, after = pruning.plan.info["parameters_before"], pruning.plan.info["parameters_after"]
    assert sum(p.numel() for p in module.parameters()) == after < 0.65 * before
    if repair == "bias":
        assert pruning.plan.biases
        name = pruning.plan.biases[0]
        assert module.model.get_submodule(name).bias.shape == (module.model.get_submodule(name).weight.shape[0],)
        fresh = MyResNet()
        apply_plan(fresh, pruning.plan)
        fresh.load_state_dict(module.model.state_dict())
