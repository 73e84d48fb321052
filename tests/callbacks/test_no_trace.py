"""Calibration leaves no trace: state that a training step changes in Python is as it was, in place, also after an error.

The oracle is the same run without the callback; every value that the run produces has to be equal, bit for bit.
"""

from __future__ import annotations

import collections
import functools
import random
import warnings
import weakref

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from test_pruning import corpus
from torch.utils.data import DataLoader, Dataset, Sampler

from conftest import tiny
from lit_prune.calibration.random_state import random_state_kept
from lit_prune.callbacks import StructuredPruning
from lit_prune.callbacks.snapshot import Snapshot
from lit_prune.callbacks.write_guard import WriteGuard, checksum


class Noisy(Dataset):
    """Draws by three generators of its own, and counts in what it holds."""

    def __init__(self):
        self.ids = corpus(16, 0)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(2)
        self.python_generator = random.Random(3)
        self.reads = collections.Counter()
        self.cache = np.zeros(16)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.reads[index] += 1
        self.cache[index] += 1
        draws = torch.rand((), generator=self.torch_generator).item()
        draws += self.numpy_generator.random() + self.python_generator.random()
        return self.ids[index], draws + self.reads[index] + self.cache[index]


class Shuffled(Sampler):
    """A sampler of one's own, whose order depends on how often it was iterated."""

    def __init__(self, size):
        self.size = size
        self.rounds = 0
        self.random = np.random.RandomState(4)

    def __len__(self):
        return self.size

    def __iter__(self):
        self.rounds += 1
        order = self.random.permutation(self.size)
        return iter(np.roll(order, self.rounds).tolist())


class Collate:
    calls = 0

    def __call__(self, items):
        self.calls += 1
        return torch.stack([ids for ids, _ in items]), torch.tensor([draw for _, draw in items]) + self.calls


class Meter:
    """What a user writes to average something."""

    __slots__ = ("history", "total")

    def __init__(self):
        self.total, self.history = 0.0, collections.deque(maxlen=3)

    def update(self, value):
        self.total += value
        self.history.append(value)


class Stateful(pl.LightningModule):
    """Everything at once that a training step may change."""

    def __init__(self):
        super().__init__()
        self.lm = tiny("llama", num_hidden_layers=2)
        self.ema = tiny("llama", num_hidden_layers=2).requires_grad_(False)
        self.head = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(12)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros(3))
        self.metric = torchmetrics.MeanMetric()
        self.outputs = []
        self.alias = self.outputs
        self.nested = {
            "losses": collections.defaultdict(list),
            "names": {"first"},
            "order": collections.OrderedDict(a=1),
        }
        self.meter = Meter()
        self.noise = torch.Generator().manual_seed(5)
        self.steps = 0
        self.shadow = {"weight": torch.zeros(3, 3)}
        self.means, self.draws = [], []
        counter = 0

        def count():
            nonlocal counter
            counter += 1
            return counter

        self.count = count
        self.partial = functools.partial(self.nested["losses"]["partial"].append)
        self.inner_state = torch.nn.Module()
        self.inner_state.calls = 0

    def on_train_epoch_start(self):
        self.epoch_scale = getattr(self, "epoch_scale", 0) + 1

    def on_train_batch_start(self, batch, batch_idx):
        self.scale = 1 + 0.01 * self.count()

    def training_step(self, batch, batch_idx):
        ids, draws = batch
        loss = self.lm(input_ids=ids, labels=ids).loss * self.scale * self.epoch_scale
        loss = loss + 0 * self.norm(torch.rand(4, 12, generator=self.noise)).sum()
        self.steps += 1
        self.inner_state.calls += 1
        self.seen = self.seen + 1
        self.in_place += draws.mean()
        self.outputs.append(loss.detach())
        self.nested["losses"][batch_idx].append(loss.item())
        self.nested["names"].add(self.steps)
        self.nested["order"][self.steps] = loss.item()
        self.partial(self.steps)
        self.meter.update(loss.item())
        self.metric.update(loss.detach())
        self.new_in_the_step = self.steps
        with torch.no_grad():
            # an average of the weights, and a constraint on others, both in place
            for average, weight in zip(self.ema.parameters(), self.lm.parameters(), strict=True):
                if average.shape == weight.shape:
                    average.lerp_(weight, 0.1)
            self.head.weight.data.clamp_(-0.1, 0.1)
            self.head.weight.add_(0.001)
            self.head.bias = torch.nn.Parameter(self.head.bias + 1)
            self.shadow["weight"].add_(self.head.weight)
        self.draws.append(
            [draws.sum().item(), torch.rand(()).item(), random.random(), np.random.rand(), self.meter.total, self.steps]
        )
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.lm.model.norm.weight.data.mul_(0.999)
        self.ended = batch_idx

    def on_train_epoch_end(self):
        assert self.alias is self.outputs
        self.means.append((len(self.outputs), torch.stack(self.outputs).mean().item(), self.metric.compute().item()))
        self.outputs.clear()
        self.metric.reset()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.lm.parameters(), lr=1e-3)

    def train_dataloader(self):
        data = Noisy()
        return DataLoader(data, batch_size=4, sampler=Shuffled(len(data)), collate_fn=Collate())


def fit(module, *callbacks):
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")
        warnings.filterwarnings("error", message="Calibration leaves a trace")
        trainer.fit(module)
    return module


def dry(**options):
    return StructuredPruning(dry_run=True, model_path="lm", calibration_batches=3, iterations=1, **options)


@pytest.fixture(scope="module")
def plain():
    return fit(Stateful())


@pytest.mark.parametrize(
    "options",
    [
        {"epoch": 1},
        {"step": 6, "importance": "taylor"},
        {"epoch": 0, "importance": "wanda", "repair": "bias"},
        {
            "step": 5,
            "importance": "auto",
            "calibration_dataloader": DataLoader(Noisy(), batch_size=4, collate_fn=Collate()),
        },
    ],
    ids=lambda options: options.get("importance", "fisher"),
)
def test_a_module_that_changes_everything_runs_as_without_the_callback(plain, options):
    callback = dry(**options)
    other = fit(Stateful(), callback)
    assert callback.table.removed_cost > 0
    assert [count for count, *_ in other.means] == [4, 4, 4]
    for name in ("means", "draws", "steps", "nested", "epoch_scale", "scale", "new_in_the_step", "ended"):
        assert getattr(other, name) == getattr(plain, name), name
    assert (other.meter.total, other.meter.history) == (plain.meter.total, plain.meter.history)
    # twelve batches, and this call
    assert (other.inner_state.calls, other.count()) == (plain.inner_state.calls, 13)
    assert other.outputs is other.alias
    expected = plain.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(other.shadow["weight"], plain.shadow["weight"])


def test_what_was_not_there_before_is_not_there_in_the_first_batch():
    class First(Stateful):
        def training_step(self, batch, batch_idx):
            if self.training and self.steps == 0:
                assert not hasattr(self, "new_in_the_step")
            return super().training_step(batch, batch_idx)

    fit(First(), dry(epoch=0))


@pytest.mark.parametrize("options", [{}, {"polish_epochs": 2}], ids=["repaired", "polished"])
def test_a_cut_run_goes_on_from_the_same_state(plain, options):
    class Counts(Stateful):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    module = fit(Counts(), StructuredPruning(model_path="lm", calibration_batches=3, **options))
    assert [count for count, *_ in module.means] == [4, 4, 4]
    assert [d[0] for d in module.draws] == [d[0] for d in plain.draws]
    assert module.steps == plain.steps


def test_a_step_that_writes_into_polished_weights_is_undone_and_the_polish_stays():
    class Shrinks(Stateful):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.lm.model.layers[0].mlp.down_proj.weight.data.mul_(0.999)
            return loss

    class Watch(pl.Callback):
        def on_pruning_end(self, trainer, pl_module, pruning):
            self.weights = {n: p.detach().clone() for n, p in pl_module.lm.named_parameters()}

    found = []
    for module in (Stateful(), Shrinks()):
        callback, watch = StructuredPruning(epoch=0, model_path="lm", calibration_batches=3, polish_epochs=2), Watch()
        fit(module, callback, watch)
        assert len(callback.plan.info["polish"]) == 3
        found.append(watch.weights)
    # a backward pass after the step reads what the step wrote
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["training_step", "on_train_batch_start", "on_train_batch_end", "__getitem__"])
def test_an_error_restores_everything_too(error, place):
    class Fails(Stateful):
        def train_dataloader(self):
            loader = super().train_dataloader()
            self.data, self.order = [loader.dataset], loader.sampler
            return loader

    module = Fails()
    seen = {}

    class Watch(pl.Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            owner = pl_module.data[0] if place == "__getitem__" else pl_module
            original = getattr(type(owner), place)

            def raising(*arguments):
                original(*arguments) if place == "__getitem__" else original(pl_module, *arguments)
                if pl_module.steps >= 2 and not pl_module.training:
                    raise error("stop")

            if place == "__getitem__":
                kind = type("Raising", (Noisy,), {"__getitem__": raising})
                owner.__class__ = kind
            else:
                setattr(owner, place, raising)
            seen["before"] = state(pl_module)

        def on_exception(self, trainer, pl_module, exception):
            seen["after"] = state(pl_module)

    def state(m):
        data = m.data[0]
        # equal sets may print in different orders
        nested = {**m.nested, "names": sorted(m.nested["names"], key=str)}
        plain = [
            (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
            (m.outputs, nested, m.meter.total, m.meter.history, m.steps, m.inner_state.calls, m.order.rounds),
            (data.reads, data.cache.tolist(), m.noise.get_state().tolist(), data.torch_generator.get_state().tolist()),
            (data.numpy_generator.bit_generator.state, data.python_generator.getstate(), sorted(vars(m))),
            ([p.requires_grad for p in m.parameters()], [x.training for x in m.modules()], m.metric.metric_state),
        ]
        return repr(plain), {n: p.clone() for n, p in m.state_dict().items()}

    with pytest.raises((error, SystemExit)):
        fit(module, Watch(), dry(epoch=1))
    assert seen["after"][0] == seen["before"][0]
    torch.testing.assert_close(seen["after"][1], seen["before"][1], rtol=0, atol=0)


def test_one_warning_names_what_cannot_be_put_back():
    class Opaque(Stateful):
        def __init__(self):
            super().__init__()
            self.stream = (random.random() for _ in range(1000))
            self.untouched = iter([1, 2, 3])
            self.pointer = torch.nn.Parameter(torch.zeros(600, 600), requires_grad=False)
            self.view = weakref.ref(self)

        def training_step(self, batch, batch_idx):
            next(self.stream)
            # past everything that PyTorch could see
            self.pointer.numpy()[0, 0] += 1
            return super().training_step(batch, batch_idx)

    module = Opaque()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warnings, "filterwarnings", lambda *_, **__: None)
            fit(module, dry(epoch=1, repair=None))
    found = [str(w.message) for w in caught if "leaves a trace" in str(w.message)]
    assert len(found) == 1
    assert "module.stream" in found[0] and "module.pointer" in found[0] and "untouched" not in found[0]


# the pieces


def test_a_snapshot_restores_in_place_and_keeps_aliases():
    class Holder:
        pass

    holder = Holder()
    holder.items, holder.array, holder.text = [1, [2]], np.zeros(2), "a"
    holder.dict, holder.bytes, holder.loop = {"a": 1, "b": 2}, bytearray(b"ab"), holder
    holder.ordered, holder.tensor = collections.OrderedDict(a=1), torch.zeros(2)
    aliases = (holder.items, holder.items[1], holder.array, holder.dict, holder.ordered, holder.tensor)
    snapshot = Snapshot([("holder", holder)])
    holder.items[1].append(3)
    holder.items.clear()
    holder.array += 1
    del holder.dict["a"]
    holder.dict["a"] = 0
    holder.bytes.extend(b"c")
    holder.ordered.move_to_end("a")
    holder.ordered["b"] = 2
    holder.tensor.add_(1)
    holder.text, holder.new, holder.tensor = "b", 1, torch.ones(3)
    del holder.loop
    snapshot.restore()
    assert snapshot.lost == []
    assert (holder.items, holder.text, list(holder.dict), holder.bytes) == ([1, [2]], "a", ["a", "b"], b"ab")
    assert (holder.loop, list(holder.ordered)) == (holder, ["a"])
    assert not hasattr(holder, "new")
    assert holder.array.tolist() == holder.tensor.tolist() == [0, 0]
    now = (holder.items, holder.items[1], holder.array, holder.dict, holder.ordered, holder.tensor)
    assert all(a is b for a, b in zip(now, aliases, strict=True))


def test_a_large_data_set_is_not_copied():
    class Large(Dataset):
        def __init__(self):
            self.rows = list(range(300_000))
            self.array = np.zeros(2**20)
            self.tensor = torch.zeros(2**20)
            self.reads = 0

    data = Large()
    snapshot = Snapshot([("data", data)])
    data.reads += 1
    assert snapshot.unknown == ["data.rows", "data.array"]
    assert [name for name, _ in snapshot.large] == ["data.tensor"]
    data.rows.append(1)
    snapshot.restore()
    assert snapshot.lost == ["data.rows"]
    assert data.reads == 0


def test_random_states_come_back_after_an_interrupt():
    def draws():
        return torch.rand(2).tolist(), np.random.rand(), random.random()

    pl.seed_everything(1, verbose=False)
    expected = draws()
    pl.seed_everything(1, verbose=False)
    with pytest.raises(KeyboardInterrupt), random_state_kept():
        draws()
        raise KeyboardInterrupt
    assert draws() == expected


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.zero_(),
        lambda w: w.detach()[0].fill_(3),
        lambda w: w.data.view(-1)[1:].copy_(torch.ones(5)),
        lambda w: torch._foreach_mul_([w], 2),
        lambda w: torch.add(torch.ones(2, 3), 1, out=w),
        lambda w: w.data.set_(torch.ones(2, 3)),
        lambda w: torch.nn.init.normal_(w),
    ],
)
@torch.no_grad()
def test_the_guard_sees_every_kind_of_write(write):
    weight, other = torch.rand(2, 3), torch.rand(2)
    before = weight.clone()
    guard = WriteGuard([("weight", weight), ("other", other)])
    with guard.watching():
        write(weight)
        weight.mul(2)
    guard.restore()
    assert torch.equal(weight, before)
    assert guard.changed() == []


def test_the_guard_lets_a_backward_pass_find_the_graph_as_it_was():
    weight = torch.rand(3, requires_grad=True)
    before = weight.detach().clone()
    guard = WriteGuard([("weight", weight)])
    with guard.watching():
        with torch.no_grad():
            weight.mul_(2)
        loss = weight.square().sum()
        mark = guard.mark()
        with torch.no_grad():
            weight.zero_()
    guard.rewind(mark)
    loss.backward()
    assert torch.equal(weight.grad, 4 * before)
    guard.restore()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64, torch.int8]
)
def test_a_checksum_sees_one_bit(dtype):
    values = torch.zeros(5, dtype=dtype)
    before = checksum(values)
    values[3] = 1
    assert checksum(values) != before
    assert checksum(torch.zeros(4, 5, dtype=dtype).T) == before
