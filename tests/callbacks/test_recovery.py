"""Recovery: re-warm-up, distillation, LoRA."""

from __future__ import annotations

import copy
import shutil

import lightning.pytorch as pl
import pytest
import torch
from architecture_cases import T5_SMALL, hugging
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from test_pruning import Module, corpus, fit, pruning
from test_resume import Loadable, Repeatable, quiet
from torch.nn import functional
from torch.utils.data import DataLoader

from conftest import tiny, unsettled
from lit_prune import PruningError, PruningPlan, apply_plan, find_group_sets, get_plan
from lit_prune.callbacks import Distillation, LearningRateRewarmup, LoRARecovery, Stage
from lit_prune.callbacks.distillation import distillation_loss, hidden_state_loss
from lit_prune.errors import UnsupportedCallbackError
from lit_prune.io.lightning_checkpoint import merge_adapters


class Recording(torch.optim.SGD):
    """Remembers the learning rate of every step."""

    def step(self, closure=None):
        result = super().step(closure)
        self.rates.append(self.param_groups[0]["lr"])
        return result


SCHEDULERS = {
    "step": lambda o: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "interval": "step"},
    "epoch": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"},
    "cosine": lambda o: {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 18), "interval": "step"},
    "plateau": lambda o: {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
        "monitor": "val_loss",
        "interval": "epoch",
    },
}


# from its first instance on, a class of optimizers runs hooks around its step: also around a subclass's call of it
torch.optim.SGD([torch.zeros(1)])


class Scheduled(Repeatable):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def configure_optimizers(self):
        self.optimizer = Recording(self.parameters(), lr=0.01)
        self.optimizer.rates = []
        return {"optimizer": self.optimizer, "lr_scheduler": SCHEDULERS[self.name](self.optimizer)}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rewarmup_multiplies_what_any_scheduler_says_and_leaves_the_scheduler_alone(tmp_path, name):
    _, plain = fit(tmp_path, pruning(), module=Scheduled(name))
    _, warmed = fit(tmp_path, pruning(), LearningRateRewarmup(steps=5, start_factor=0.2), module=Scheduled(name))
    factors = [1.0] * 6 + [0.2 + 0.8 * k / 5 for k in (1, 2, 3, 4)] + [1.0] * 8
    expected = [rate * factor for rate, factor in zip(plain.optimizer.rates, factors, strict=True)]
    assert warmed.optimizer.rates == pytest.approx(expected, rel=1e-12)
    assert warmed.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_rewarmup_starts_with_the_first_step_whatever_the_order_of_callbacks(tmp_path, order):
    """Also if LoRA makes new optimizers in the middle of an epoch; train.py puts the pruning callback last."""
    made = []

    class Lora(Scheduled):
        def configure_optimizers(self):
            result = super().configure_optimizers()
            made.append(self.optimizer)
            return result

    callbacks = (pruning(step=8), LearningRateRewarmup(steps=4), LoRARecovery())
    fit(tmp_path, *(callbacks[k] for k in order), module=Lora("step"))
    expected = [0.01 * 0.9**k for k in range(18)]
    assert made[0].rates == pytest.approx(expected[:8])
    factors = [0.25, 0.5, 0.75] + [1.0] * 7
    assert made[1].rates == pytest.approx([r * f for r, f in zip(expected[8:], factors, strict=True)])


def test_rewarmup_goes_on_in_the_middle_after_resuming(tmp_path):
    def callbacks():
        return pruning(step=6), LearningRateRewarmup(steps=10)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    _, whole = fit(tmp_path, *callbacks(), saver, module=Scheduled("step"), enable_checkpointing=True)
    trainer, again = quiet(*callbacks(), max_epochs=3), Scheduled("step")
    trainer.fit(again, ckpt_path=tmp_path / "step=12.ckpt", weights_only=True)
    assert again.optimizer.rates == whole.optimizer.rates[12:]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"start_factor": 1.5}])
def test_bad_warmups_are_refused(arguments):
    with pytest.raises(ValueError, match="found"):
        LearningRateRewarmup(**arguments)


def test_the_losses_are_what_their_formulas_say():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(9 * divergence.mean().item(), rel=1e-5)
    some = divergence[mask.bool()].mean().item()
    assert distillation_loss(student, teacher, 3.0, mask).item() == pytest.approx(9 * some, rel=1e-5)
    assert distillation_loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)
    expected = functional.mse_loss(student, teacher) / teacher.square().mean()
    assert hidden_state_loss([student], [teacher]).item() == pytest.approx(expected.item(), rel=1e-5)


class Taught(Repeatable):
    """Dict batches with padding; remembers the losses that its step returned and that were optimized."""

    def __init__(self):
        super().__init__()
        self.optimized = []

    def train_dataloader(self):
        rows = [{"input_ids": ids, "attention_mask": (torch.arange(12) < 10).long()} for ids in corpus(24, 0)]
        return DataLoader(rows, batch_size=4)

    def training_step(self, batch, batch_idx):
        self.batch = batch
        return {"loss": self.inner["lm"](**batch, labels=batch["input_ids"]).loss}

    def on_before_backward(self, loss):
        if self.training:
            self.optimized.append(loss.item())


@pytest.mark.parametrize("source", ["copy", "disk"])
def test_distillation_adds_to_the_loss_from_the_cut_on(tmp_path, source):
    """The loss that is optimized equals the formula, with teacher and student run by hand."""
    checked = []

    class Check(pl.Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            if pruning.plan is None:
                self.dense = copy.deepcopy(pl_module.inner["lm"])

        def on_before_backward(self, trainer, pl_module, loss):
            if not hasattr(self, "dense") or not pl_module.training:
                return
            batch, student = pl_module.batch, copy.deepcopy(pl_module.inner["lm"])
            student._forward_hooks.clear()
            student._forward_pre_hooks.clear()
            teacher = tiny("llama") if source == "disk" else self.dense
            ours = student(**batch, labels=batch["input_ids"], output_hidden_states=True)
            theirs = teacher(**batch, output_hidden_states=True)
            mask = batch["attention_mask"]
            kl = distillation_loss(ours.logits, theirs.logits, 2.0, mask)
            hidden = hidden_state_loss(ours.hidden_states[1:], theirs.hidden_states[1:], mask)
            checked.append((loss.item(), (0.3 * ours.loss + 0.7 * kl + 0.1 * hidden).item()))

    class Remove(pl.Callback):
        """The teacher on disk is loaded once: it is not there for later cuts."""

        def on_pruning_end(self, trainer, pl_module, pruning):
            shutil.rmtree(tmp_path / "teacher", ignore_errors=True)

    options = {}
    if source == "disk":
        tiny("llama").save_pretrained(tmp_path / "teacher")
        options["teacher"] = str(tmp_path / "teacher")
    distillation = Distillation(weight=0.7, hidden_weight=0.1, **options)
    twice = pruning(schedule=[Stage(0.1, epoch=1), Stage(0.2, epoch=2)])
    trainer, module = fit(tmp_path, twice, distillation, Check(), Remove(), module=Taught())
    assert twice.stages_done == 2
    assert len(checked) == 12
    for loss, expected in checked:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert {"distillation_loss", "hidden_state_loss"} <= set(trainer.callback_metrics)
    assert "training_step" not in vars(module)
    assert not module.inner["lm"]._forward_hooks
    assert not any("teacher" in name for name in module.state_dict())


class Translates(Repeatable):
    """An encoder-decoder on tuples; source and target are of one length, and both are padded."""

    def __init__(self, decoder_mask):
        super().__init__()
        torch.manual_seed(0)
        self.inner["lm"] = unsettled(hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL)("sdpa"))
        self.decoder_mask = decoder_mask

    def train_dataloader(self):
        source, target = torch.arange(12) < 7, torch.arange(12) < 10
        return DataLoader([(ids, source.long(), ids.flip(0), target.long()) for ids in corpus(12, 0)], batch_size=4)

    def training_step(self, batch, batch_idx):
        ids, mask, labels, shown = batch
        self.call = ((ids, mask), {"labels": labels, "decoder_attention_mask": shown if self.decoder_mask else None})
        return self.inner["lm"](*self.call[0], **self.call[1]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner["lm"](batch, labels=batch).loss)


@pytest.mark.parametrize("decoder_mask", [False, True])
def test_distillation_of_an_encoder_decoder_counts_the_decoders_tokens(tmp_path, decoder_mask):
    checked = []

    class Check(pl.Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            self.dense = copy.deepcopy(pl_module.inner["lm"])

        def on_before_backward(self, trainer, pl_module, loss):
            if not hasattr(self, "dense") or not pl_module.training:
                return
            (args, kwargs), student = pl_module.call, copy.deepcopy(pl_module.inner["lm"])
            student._forward_hooks.clear()
            student._forward_pre_hooks.clear()
            ours = student(*args, **kwargs, output_hidden_states=True)
            theirs = self.dense(*args, **kwargs, output_hidden_states=True)
            mask = (torch.arange(12) < (10 if decoder_mask else 12)).long().expand(4, -1)
            kl = distillation_loss(ours.logits, theirs.logits, 2.0, mask)
            states = (o.decoder_hidden_states[1:] for o in (ours, theirs))
            checked.append((loss.item(), (0.5 * ours.loss + 0.5 * kl + 0.1 * hidden_state_loss(*states, mask)).item()))

    fit(tmp_path, pruning(epoch=1), Distillation(hidden_weight=0.1), Check(), module=Translates(decoder_mask))
    assert len(checked) == 6
    for loss, expected in checked:
        assert loss == pytest.approx(expected, rel=1e-5)


def test_distillation_leaves_calibration_of_later_cuts_alone(tmp_path):
    """The second stage's table is that of a run without distillation, if the learning rate is 0."""

    class Still(Taught):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    tables = []
    for extra in ((), (Distillation(hidden_weight=1.0),)):
        callback = pruning(schedule=[Stage(0.1, epoch=1), Stage(0.2, epoch=2)], importance="taylor_2nd")
        fit(tmp_path, callback, *extra, module=Still())
        tables.append(callback.table)
    assert (tables[0].importance == tables[1].importance).all()


def test_distillation_resumes_with_the_same_teacher(tmp_path):
    def callbacks(directory):
        return pruning(), Distillation(directory=directory)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    _, whole = fit(tmp_path, *callbacks(tmp_path), saver, module=Taught(), enable_checkpointing=True)
    again = Taught()
    quiet(*callbacks(tmp_path), max_epochs=3).fit(again, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert again.optimized == whole.optimized[-6:]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(PruningError, match=r"not at None\. Give Distillation the directory"):
        quiet(*callbacks(None), max_epochs=3).fit(Taught(), ckpt_path=tmp_path / "epoch=1.ckpt")
    quiet(*callbacks(None)).validate(Taught(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)


def test_what_cannot_be_distilled_is_refused(tmp_path):
    class ByHand(Module):
        automatic_optimization = False

    with pytest.raises(PruningError, match="optimizes by hand"):
        fit(tmp_path, pruning(), Distillation(), module=ByHand())

    class Parts(Repeatable):
        def training_step(self, batch, batch_idx):
            lm = self.inner["lm"]
            return lm.lm_head(lm.model(input_ids=batch).last_hidden_state).square().mean()

    with pytest.raises(PruningError, match="did not run the forward of the model"):
        fit(tmp_path, pruning(repair=None), Distillation(), module=Parts())
    for arguments in ({"weight": 0.0}, {"temperature": 0.0}, {"teacher": "a", "directory": "b"}):
        with pytest.raises(ValueError):
            Distillation(**arguments)


# LoRA


class Adapted(Loadable):
    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_lora_trains_adapters_alone_and_merges_into_a_plain_pruned_model(tmp_path):
    seen = {}

    class Look(pl.Callback):
        def on_pruning_end(self, trainer, pl_module, pruning):
            seen["pruned"] = {k: v.clone() for k, v in pl_module.inner["lm"].state_dict().items()}

        def on_train_start(self, trainer, pl_module):
            seen["names"] = [n for n, _ in pl_module.named_modules()]

        def on_train_end(self, trainer, pl_module):
            seen["trained"] = [n for n, p in pl_module.named_parameters() if p.requires_grad]
            optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
            assert optimized == {id(p) for p in pl_module.parameters() if p.requires_grad}
            seen["rate"] = trainer.optimizers[0].param_groups[0]["lr"]
            seen["adapted"] = pl_module.inner["lm"].eval()(ids).logits

    ids = torch.arange(12)[None]
    callback, look = pruning(), Look()
    trainer, module = fit(tmp_path, callback, LoRARecovery(r=4), look, module=Adapted(), max_epochs=6)
    assert seen["trained"] and all("lora_" in name for name in seen["trained"])
    assert seen["rate"] == pytest.approx(1e-2 * 0.95**36)
    model = module.inner["lm"]
    # plain again: the modules it began with, and what peft computed with adapters beside them
    assert [n for n, _ in module.named_modules()] == seen["names"]
    torch.testing.assert_close(model.eval()(ids).logits, seen["adapted"], rtol=1e-4, atol=1e-4)
    assert get_plan(model).digest() == callback.plan.digest()
    assert all(p.requires_grad for p in model.parameters())
    targets = {s.parameter for g in find_group_sets(model) for s in g.slices}
    for name, value in model.state_dict().items():
        before = (
            seen["pruned"][name.replace(".weight", ".base_layer.weight")] if name in targets else seen["pruned"][name]
        )
        assert torch.equal(value, before) == (name not in targets), name
    assert trainer.callback_metrics["val_loss"] < callback.metrics["pruned"]["val_loss"]


def test_lora_runs_resume_validate_and_load(tmp_path):
    def callbacks():
        return pruning(), LoRARecovery(r=4)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    _, whole = fit(tmp_path, *callbacks(), saver, module=Adapted(), max_epochs=4, enable_checkpointing=True)
    for epoch in (0, 1, 2):
        again = Adapted()
        quiet(*callbacks(), max_epochs=4).fit(again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (epoch, name)
    last = tmp_path / "epoch=3.ckpt"
    [expected] = quiet().validate(whole, verbose=False)
    for trainer in (quiet(*callbacks()), quiet(pruning()), quiet()):
        [measured] = trainer.validate(Adapted(), ckpt_path=last, verbose=False)
        assert measured["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    loaded = Adapted.load_from_checkpoint(last, weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_run_that_merged_goes_on_with_all_weights(tmp_path):
    trainer, module = fit(tmp_path, pruning(), LoRARecovery(), module=Adapted(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "merged.ckpt")
    again = Adapted()
    quiet(pruning(), LoRARecovery(), max_epochs=3).fit(again, ckpt_path=tmp_path / "merged.ckpt", weights_only=True)
    head = "inner.lm.lm_head.weight"
    assert not torch.equal(again.state_dict()[head], module.state_dict()[head])


def test_peft_itself_takes_the_pruned_model(tmp_path):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, [list(range(1, s.size)) for s in group_sets]))
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "down_proj"]))
    ids = torch.arange(12)[None]
    assert torch.equal(wrapped.eval()(ids).logits, model.eval()(ids).logits)


def test_the_check_of_names_changes_nothing():
    model = tiny("llama", num_hidden_layers=1)
    model.model.embed_tokens.weight.requires_grad_(False)
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    flags, random = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    recovery = LoRARecovery(target_modules=["q_proj", "embed_tokens"])
    for path in ("model.layers.0.self_attn.q_proj", "model.embed_tokens"):
        recovery._check_adaptable(model, path)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("layers.0.self_attn", "reads past any adapters"),
        ("layers.0.self_attn.out_proj", "reads past any adapters"),
        ("convolution", "cannot merge"),
        ("layers.0.norm1", "cannot adapt"),
        ("layers", "cannot adapt"),
    ],
)
def test_names_whose_adapters_would_be_lost_are_refused_and_left_as_they_were(path, reason):
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1)
    model.convolution = torch.nn.Conv2d(8, 8, 3, groups=2)
    before, weights = repr(model), list(model.state_dict())
    recovery = LoRARecovery(target_modules=[path.rpartition(".")[2]])
    with pytest.raises(PruningError, match=f"name '{path}' .*{reason}"):
        recovery._check_adaptable(model, path)
    assert repr(model) == before
    assert list(model.state_dict()) == weights
    assert all(p.requires_grad for p in model.parameters())


class Kinds(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.line = torch.nn.Embedding(10, 6), torch.nn.Conv1d(6, 8, 3, padding=1)
        self.plane, self.point = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, ids):
        x = self.line(self.words(ids).transpose(1, 2))
        return self.head(self.point(self.plane(x[:, None])).mean(1).transpose(1, 2))


@pytest.mark.parametrize("names", [["head"], ["words"], ["line"], ["plane"], ["point"], ["words", "line", "head"]])
def test_adapters_of_any_kind_of_layer_merge_in_a_checkpoint(names):
    torch.manual_seed(0)
    model = Kinds()
    dense = copy.deepcopy(model)
    recovery = LoRARecovery(r=2, target_modules=names)
    recovery._state.begin(model)
    recovery._inject(model)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    ids = torch.randint(0, 10, (2, 7))
    expected = model(ids)
    checkpoint = {"state_dict": model.state_dict(), "callbacks": {recovery.state_key: recovery.state_dict()}}
    merge_adapters(dense, checkpoint)
    dense.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(dense(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_bad_adapters_are_refused(arguments):
    with pytest.raises(ValueError, match="found"):
        LoRARecovery(**arguments)


def test_adapters_beside_an_average_are_refused(tmp_path):
    with pytest.raises(UnsupportedCallbackError, match="EMAWeightAveraging averages into a copy"):
        fit(tmp_path, pruning(), LoRARecovery(), EMAWeightAveraging())


def test_adapters_that_cannot_be_added_leave_the_random_numbers_as_they_were():
    """Peft refuses a layer that it does not know once it draws others' weights; the run may go on without adapters."""
    model = tiny("llama", num_hidden_layers=1)
    recovery = LoRARecovery(target_modules=["q_proj", "input_layernorm"])
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="not supported"):
        recovery._inject(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


class Numbers(pl.LightningModule):
    def __init__(self, model, shape):
        super().__init__()
        self.model, self.shape = model, shape

    def training_step(self, batch, batch_idx):
        if not batch.is_floating_point():
            return self.model(input_ids=batch, labels=batch).loss
        return (self.model(batch) - 1).square().mean()

    def train_dataloader(self):
        data = torch.randn(16, *self.shape) if self.shape else torch.randint(3, 64, (16, 8))
        return torch.utils.data.DataLoader(data, batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("kind", ["fused experts", "torch attention"])
def test_default_adapters_leave_out_what_cannot_have_any(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "fused experts":
        module = Numbers(tiny("mixtral", num_local_experts=3, num_experts_per_tok=2), None)
    else:
        layer = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        module = Numbers(torch.nn.TransformerEncoder(layer, 2), (6, 16))
    adapters = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            adapters.append([n for n, p in pl_module.named_parameters() if "lora" in n and p.requires_grad])

    callback = pruning(step=2, importance="magnitude", repair=None, validate=False)
    fit(tmp_path, callback, LoRARecovery(r=4), Look(), module=module, max_epochs=1)
    assert not adapters[0]
    assert adapters[-1]
    assert not any("experts" in n or "self_attn.out_proj" in n for n in adapters[-1] if kind != "fused experts")
    assert not any("lora" in n for n, _ in module.named_parameters())
