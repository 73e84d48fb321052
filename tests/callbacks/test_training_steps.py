"""What a user's training step may do while its model is calibrated: optimize by hand, skip, return anything, rely on hooks.

The oracle of a step that optimizes by hand is a module that returns the same loss under automatic optimization: both have to
come to the same plan. And a dry run of it has to train as a run without the callback does, bit for bit.
"""

from __future__ import annotations

import collections
import types
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from processes import run_well
from test_pruning import corpus
from torch.nn import functional
from torch.utils.data import DataLoader

from conftest import tiny
from lit_prune import CalibrationError
from lit_prune.callbacks import StructuredPruning


class Auto(pl.LightningModule):
    """A tiny language model under automatic optimization."""

    def __init__(self):
        super().__init__()
        self.gen = tiny("llama", num_hidden_layers=2)

    def loss(self, batch):
        return self.gen(input_ids=batch, labels=batch).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(corpus(16, 0), batch_size=4)


def run(module, *, dry_run=False, callback=True, epochs=2, **options):
    """Fit, with a cut (or, in a dry run, a calibration) before the second epoch."""
    pl.seed_everything(7, verbose=False)
    settings = {"pruning_ratio": 0.2, "calibration_batches": 4, "iterations": 1, "validate": False}
    pruning = StructuredPruning(**{**settings, "dry_run": dry_run, "model_path": "gen", **options})
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning] if callback else [],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")
        trainer.fit(module)
    return pruning


def planned(module, **options):
    """What a module's plan at step 0 keeps, from nothing but calibration: no repair, no compensation."""
    settings = {"dry_run": True, "epochs": 1, "step": 0, "repair": None, **options}
    callback = run(module, **settings)
    return {entry.key: entry.kept for entry in callback.plan.entries}


def assert_trains_as_without(make, **options):
    """A dry run leaves weights, buffers and optimizer rates bit for bit as they are without the callback."""
    plain, dry = make(), make()
    run(plain, callback=False)
    assert run(dry, dry_run=True, **options).table.removed_cost > 0
    expected = plain.state_dict()
    assert expected.keys() == dry.state_dict().keys()
    for name, value in dry.state_dict().items():
        assert torch.equal(value, expected[name]), name
    rates = [[g["lr"] for o in m.trainer.optimizers for g in o.param_groups] for m in (plain, dry)]
    assert rates[0] == rates[1]


# manual optimization, of one loss


class Manual(Auto):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        opt.step()
        return loss


class NothingReturned(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class RawBackward(Manual):
    def training_step(self, batch, batch_idx):
        opt = self.optimizers(use_pl_optimizer=False)
        opt.zero_grad()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        opt.step()


class OwnBackward(Manual):
    def backward(self, loss, *args, **kwargs):
        loss.backward(retain_graph=True)


class Clipped(Manual):
    def training_step(self, batch, batch_idx):
        opt, scheduler = self.optimizers(), self.lr_schedulers()
        with self.toggled_optimizer(opt):
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            opt.step()
            opt.zero_grad()
        scheduler.step()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.003)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Warmup(Manual):
    """Sets its learning rate itself."""

    def training_step(self, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["lr"] = group["lr"] * 1.1
        return super().training_step(batch, batch_idx)


class Closure(Manual):
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            loss = self.loss(batch)
            opt.zero_grad()
            self.manual_backward(loss)
            return loss

        with opt.toggle_model():
            opt.step(closure=closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)


class Accumulated(Manual):
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if (batch_idx + 1) % 2 == 0:
            opt.step()
            opt.zero_grad()


class Truncated(Manual):
    """Backpropagation through time by hand: a backward pass and a step for each of two parts of a batch."""

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        for part in batch.chunk(2):
            opt.zero_grad()
            loss = self.loss(part)
            self.manual_backward(loss)
            opt.step()
        return loss


class InTwoParts(Auto):
    def training_step(self, batch, batch_idx):
        return sum(self.loss(part) for part in batch.chunk(2))


class TwoOptimizers(Manual):
    """Each for a part of the model, kept by the module itself, one loss."""

    def training_step(self, batch, batch_idx):
        first, second = self.pair
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        second.step()

    def configure_optimizers(self):
        named = list(self.named_parameters())
        attention = [p for n, p in named if "attn" in n]
        rest = [p for n, p in named if "attn" not in n]
        self.pair = [torch.optim.SGD(attention, lr=0.01), torch.optim.AdamW(rest, lr=1e-3)]
        return self.pair


class SharpnessAware(Manual):
    """An optimizer with steps of its own names, which read gradients."""

    class Sam(torch.optim.SGD):
        @torch.no_grad()
        def first_step(self, zero_grad=False):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["away"] = 0.01 * p.grad / p.grad.norm()
                    p.add_(self.state[p]["away"])
            if zero_grad:
                self.zero_grad()

        @torch.no_grad()
        def second_step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(self.state[p].pop("away"))
            self.step()
            self.zero_grad()

    def training_step(self, batch, batch_idx):
        opt = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.loss(batch))
        opt.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch))
        opt.second_step()

    def configure_optimizers(self):
        return self.Sam(self.parameters(), lr=0.01)


CASES = [
    Manual,
    NothingReturned,
    RawBackward,
    OwnBackward,
    Clipped,
    Warmup,
    Closure,
    Accumulated,
    TwoOptimizers,
    SharpnessAware,
]


@pytest.fixture(scope="module")
def automatic():
    """The plans of the automatic module, by criterion."""
    return {name: planned(Auto(), importance=name) for name in ("fisher", "taylor", "wanda")}


@pytest.mark.parametrize("kind", CASES)
def test_optimizing_by_hand_gives_the_plan_of_the_same_loss(kind, automatic):
    for name in ("fisher", "taylor"):
        assert planned(kind(), importance=name) == automatic[name], name


@pytest.mark.parametrize("kind", [*CASES, Truncated])
def test_optimizing_by_hand_leaves_no_trace(kind):
    assert_trains_as_without(kind)


def test_what_needs_no_gradients_runs_by_hand_as_well(automatic):
    assert planned(NothingReturned(), importance="wanda") == automatic["wanda"]


def test_every_backward_pass_before_a_step_counts():
    assert planned(Truncated()) == planned(InTwoParts())


def test_a_module_that_optimizes_by_hand_is_pruned_and_trains_on():
    module = Clipped()
    callback = run(module, iterations=2)
    assert callback.plan.info["parameters_after"] == sum(p.numel() for p in module.gen.parameters())
    assert module.trainer.global_step == 8


# several networks


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, logits):
        return self.layers(logits.softmax(-1)).mean(dim=(1, 2))


class Adversarial(Manual):
    """A GAN: a discriminator tells the generator's logits from one-hot tokens."""

    first, detached, toggled, returned = "gen", True, True, False

    def __init__(self):
        super().__init__()
        self.dis = Critic()

    def g_loss(self, batch):
        return -self.dis(self.gen(input_ids=batch).logits).mean()

    def d_loss(self, batch):
        fake = self.gen(input_ids=batch).logits
        real = 5.0 * functional.one_hot(batch, 64).float()
        return self.dis(fake.detach() if self.detached else fake).mean() - self.dis(real).mean()

    def training_step(self, batch, batch_idx):
        optimizers = dict(zip(("gen", "dis"), self.optimizers(), strict=True))
        losses = {"gen": self.g_loss, "dis": self.d_loss}
        for name in sorted(losses, key=lambda n: n != self.first):
            if self.toggled:
                self.toggle_optimizer(optimizers[name])
            optimizers[name].zero_grad()
            loss = losses[name](batch)
            self.manual_backward(loss)
            optimizers[name].step()
            if self.toggled:
                self.untoggle_optimizer(optimizers[name])
        return {"loss": loss} if self.returned else None

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.gen.parameters(), lr=1e-3),
            torch.optim.Adam(self.dis.parameters(), lr=1e-3),
        ]


class Clamped(Adversarial):
    """The weights of the critic are clipped in place, after its step, in the middle of what the generator's loss needs."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        with torch.no_grad():
            for p in self.dis.parameters():
                p.clamp_(-0.05, 0.05)


class GeneratorOnly(Auto):
    """The generator's loss under automatic optimization."""

    def __init__(self):
        super().__init__()
        self.dis = Critic()

    def training_step(self, batch, batch_idx):
        return -self.dis(self.gen(input_ids=batch).logits).mean()


@pytest.mark.parametrize("importance", ["fisher", "taylor"])
@pytest.mark.parametrize(
    "options",
    [
        {"toggled": False},
        {"toggled": False, "first": "dis"},
        {"detached": False},
        {"detached": False, "toggled": False},
        {"detached": False, "toggled": False, "first": "dis"},
        {"returned": True},
    ],
    ids=str,
)
def test_a_gan_is_pruned_by_the_loss_of_its_generator(options, importance):
    module = type("Gan", (Adversarial,), options)()
    assert planned(module, importance=importance) == planned(GeneratorOnly(), importance=importance)


@pytest.mark.parametrize("kind", [Adversarial, Clamped])
def test_a_gan_trains_as_without_the_callback(kind):
    assert_trains_as_without(kind)
    assert planned(kind()) == planned(GeneratorOnly())


class Alternating(Adversarial):
    def training_step(self, batch, batch_idx):
        turn = batch_idx % 2
        opt = self.optimizers()[turn]
        opt.zero_grad()
        self.manual_backward((self.g_loss, self.d_loss)[turn](batch))
        opt.step()


def test_batches_that_train_another_network_do_not_count():
    class EverySecond(GeneratorOnly):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None

    for kind in (Alternating, EverySecond):
        callback = run(kind(), dry_run=True, repair=None)
        assert callback.plan.info["calibration_batches"] == 2
        assert callback.plan.info["skipped_batches"] == 2
    assert planned(Alternating()) == planned(EverySecond())


def test_flags_and_gradients_of_other_networks_are_left_alone():
    """A frozen teacher, a critic that an actor's loss passes through, gradients that are there or not."""

    class ActorCritic(Auto):
        def __init__(self):
            super().__init__()
            self.critic = Critic()
            self.teacher = tiny("llama", num_hidden_layers=2).requires_grad_(False)
            self.seen = []

        def training_step(self, batch, batch_idx):
            logits = self.gen(input_ids=batch).logits
            value = self.critic(logits.detach())
            # a gradient by the critic's own weights, as in a penalty
            penalty = torch.autograd.grad(value.sum(), self.critic.parameters(), create_graph=True)
            with torch.no_grad():
                taught = self.teacher(input_ids=batch).logits
            actor = functional.mse_loss(logits, taught) - self.critic(logits).mean()
            return actor + value.square().mean() + sum(p.square().sum() for p in penalty)

        def on_before_zero_grad(self, optimizer):
            parameters = dict(self.named_parameters())
            self.seen.append({n: (p.requires_grad, p.grad is None) for n, p in parameters.items()})

    modules = [ActorCritic(), ActorCritic()]
    for module, callback in zip(modules, (False, True), strict=True):
        run(module, callback=callback, dry_run=True)
    assert modules[0].seen == modules[1].seen
    assert_trains_as_without(ActorCritic)
    assert_trains_as_without(ActorCritic, importance="taylor")


def test_gradients_by_the_input_are_computed_where_a_step_asks_for_them(automatic):
    """An adversarial sample by ``loss.backward()``, whose gradients of weights Lightning then zeroes."""

    class FastGradient(Auto):
        def training_step(self, batch, batch_idx):
            embedded = self.gen.get_input_embeddings()(batch).detach().requires_grad_()
            self.gen(inputs_embeds=embedded, labels=batch).loss.backward()
            moved = embedded.detach() + 0.5 * embedded.grad.sign()
            return self.gen(inputs_embeds=moved, labels=batch).loss

    class ByAutograd(Auto):
        def training_step(self, batch, batch_idx):
            embedded = self.gen.get_input_embeddings()(batch).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.gen(inputs_embeds=embedded, labels=batch).loss, embedded)
            return self.gen(inputs_embeds=embedded.detach() + 0.5 * gradient.sign(), labels=batch).loss

    for options in ({}, {"kinds": ("attention", "mlp", "block")}):
        found = planned(FastGradient(), **options)
        assert found == planned(ByAutograd(), **options)
    assert found != automatic["fisher"]
    assert_trains_as_without(FastGradient)


def test_an_optimizer_within_the_backward_pass_does_not_step():
    class Within(Auto):
        def configure_optimizers(self):
            self.small = {p: torch.optim.SGD([p], lr=0.01) for p in self.parameters()}

            def hook(parameter):
                self.small[parameter].step()
                parameter.grad = None

            for p in self.parameters():
                p.register_post_accumulate_grad_hook(hook)

    assert_trains_as_without(Within)
    assert_trains_as_without(Within, importance="taylor")


# what a step returns


class RunsInHooks(Auto):
    """Runs the model around the step, too, to look at what it gives."""

    def look(self, batch):
        self.shown = self.gen(input_ids=torch.zeros_like(batch).repeat(3, 1)).logits.mean()

    def on_train_epoch_start(self):
        self.look(torch.zeros(2, 4, dtype=torch.long))

    def on_train_batch_start(self, batch, batch_idx):
        self.look(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.look(batch)


@pytest.mark.parametrize("options", [{"importance": "fisher"}, {"importance": "wanda"}, {"repair": "bias"}])
def test_what_hooks_run_the_model_for_is_no_calibration_data(options):
    plain, looking = Auto(), RunsInHooks()
    first = run(plain, **options)
    second = run(looking, **options)
    assert first.plan == second.plan
    for (name, value), other in zip(plain.gen.state_dict().items(), looking.gen.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_batches_without_a_loss_are_skipped_and_counted():
    class Skips(Auto):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            # the usual check: what went through the model before it must not count either
            if batch_idx == 1:
                loss = self.loss(batch) * torch.nan
            return loss if torch.isfinite(loss) else None

    class Three(Auto):
        def train_dataloader(self):
            ids = corpus(16, 0)
            return DataLoader(torch.cat([ids[:4], ids[8:]]), batch_size=4)

    for importance in ("fisher", "wanda"):
        plans = [run(k(), importance=importance, step=0, epochs=1, calibration_batches=4) for k in (Skips, Three)]
        assert plans[0].plan.info["skipped_batches"] == 1
        assert plans[0].plan.info["calibration_batches"] == 3
        assert plans[0].plan.entries == plans[1].plan.entries


def test_it_is_an_error_if_all_batches_are_skipped():
    class Never(Auto):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) if self.training else None

    for importance in ("fisher", "wanda", "magnitude"):
        with pytest.raises(CalibrationError, match="All 4 calibration batches were skipped"):
            run(Never(), importance=importance)


class SkipsOnOneRank(Auto):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return None if not self.training and (self.global_rank, batch_idx) in {(0, 0), (1, 1)} else loss


def on_a_rank(folder):
    plans = []
    for importance in ("fisher", "wanda"):
        pl.seed_everything(7, verbose=False)
        settings = {"calibration_batches": 4, "iterations": 1, "validate": False, "epoch": 0, "pruning_ratio": 0.2}
        callback = StructuredPruning(importance, model_path="gen", **settings)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        trainer.fit(SkipsOnOneRank())
        assert (callback.plan.info["calibration_batches"], callback.plan.info["skipped_batches"]) == (2, 2)
        plans.append(callback.plan.digest())
    (folder / f"{trainer.global_rank}.txt").write_text(str(plans))


def test_a_batch_that_one_process_skips_is_skipped_by_all(tmp_path):
    run_well(on_a_rank, tmp_path, folder=tmp_path, processes=2)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


Named = collections.namedtuple("Named", ["loss", "logits"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: {"loss": loss, "log": {}},
        lambda loss: collections.UserDict(loss=loss),
        lambda loss: types.MappingProxyType({"loss": loss}),
        lambda loss: Named(loss, None),
        lambda loss: types.SimpleNamespace(loss=loss),
    ],
)
def test_a_loss_may_come_in_what_holds_one(wrap, automatic):
    class Wrapped(Auto):
        def training_step(self, batch, batch_idx):
            # the rest of the run is Lightning's, which takes less
            loss = self.loss(batch)
            return loss if self.training else wrap(loss)

    assert planned(Wrapped()) == automatic["fisher"]


@pytest.mark.parametrize("wrong", [{"logits": 1}, "loss", 3.0])
def test_anything_else_is_refused_by_name(wrong):
    class Wrong(Auto):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) if self.training else wrong

    with pytest.raises(CalibrationError, match="batch 0 gave no scalar loss; found"):
        run(Wrong())


def test_an_error_in_calibration_says_where_it_was_raised_and_is_cleaned_up():
    class Fails(Clipped):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if not self.training:
                self.gen.model.layers[0].mlp.down_proj.weight.data.zero_()
                raise KeyError("gone")

    module = Fails()
    backward = torch.autograd.backward
    with pytest.raises(KeyError, match="gone") as caught:
        run(module)
    if hasattr(caught.value, "__notes__"):
        assert "while StructuredPruning calibrated" in caught.value.__notes__[0]
    assert torch.autograd.backward is backward
    assert not {"manual_backward", "toggle_optimizer", "clip_gradients", "log"} & vars(module).keys()
    assert module.gen.model.layers[0].mlp.down_proj.weight.abs().sum() > 0
    assert not torch.nn.modules.module._global_forward_hooks


# hooks around the step


class Hooked(Auto):
    """Reads in its step what the hooks around it have set."""

    def on_train_epoch_start(self):
        self.factor = 1.0 + self.current_epoch
        self.epochs = getattr(self, "epochs", 0) + 1

    def on_train_batch_start(self, batch, batch_idx):
        self.at_start = (int(batch.sum()), batch_idx)
        return -1 if batch_idx == self.stop_at else None

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.before = int(batch.sum())
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.moved = int(batch.sum())
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.after = int(batch.sum())
        return batch

    stop_at = -1

    def training_step(self, batch, batch_idx):
        now = int(batch.sum())
        assert (self.at_start, self.before, self.moved, self.after) == ((now, batch_idx), now, now, now)
        assert self.epochs == self.current_epoch + 1
        assert not getattr(self, "open", False)
        self.open = True
        return self.loss(batch) * self.factor

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["loss"].item() > 0 and not outputs["loss"].requires_grad
        assert self.at_start == (int(batch.sum()), batch_idx)
        self.open = False


@pytest.mark.parametrize("point", [{"epoch": 0}, {"epoch": 1}, {"step": 0}, {"step": 3}], ids=str)
@pytest.mark.parametrize("importance", ["fisher", "auto"])
def test_the_step_finds_what_its_hooks_have_set(point, importance):
    callback = run(Hooked(), importance=importance, iterations=2, **point)
    assert callback.plan.info["parameters_after"] < callback.plan.info["parameters_before"]


def test_hooks_leave_no_trace():
    assert_trains_as_without(Hooked, epoch=1)


@pytest.mark.parametrize("kind", [Hooked, Clipped])
def test_validate_runs_what_no_training_has_run(kind, automatic):
    class Validated(kind):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def val_dataloader(self):
            return self.train_dataloader()

    module = Validated()
    settings = {"epoch": 0, "calibration_batches": 4, "iterations": 1, "repair": None, "pruning_ratio": 0.2}
    callback = StructuredPruning(dry_run=True, **settings)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[callback], **options)
    trainer.validate(module, verbose=False)
    assert {e.key: e.kept for e in callback.plan.entries} == automatic["fisher"]
    assert not hasattr(module, "epochs") and trainer.optimizers == []


def test_a_batch_that_ends_the_epoch_is_skipped():
    class Stops(Hooked):
        stop_at = 3

    callback = run(Stops(), dry_run=True, repair=None)
    assert (callback.plan.info["calibration_batches"], callback.plan.info["skipped_batches"]) == (3, 1)


@pytest.mark.parametrize("amount", [1, 3])
def test_a_step_may_take_its_batches_from_an_iterator(amount, automatic):
    class Takes(Auto):
        def training_step(self, dataloader_iter):
            losses = [self.loss(next(dataloader_iter)[0]) for _ in range(amount)]
            return torch.stack(losses).mean()

    with pytest.warns(UserWarning, match="dataloader_iter"):
        callback = run(Takes(), dry_run=True, repair=None, step=0, epochs=1)
    if amount == 1:
        assert {e.key: e.kept for e in callback.plan.entries} == automatic["fisher"]
    else:
        assert (callback.plan.info["calibration_batches"], callback.plan.info["skipped_batches"]) == (1, 1)
    assert_trains_as_without(Takes)
