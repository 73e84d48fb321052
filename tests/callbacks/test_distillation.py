"""Distillation of models of many kinds: what it copies, what it compares, and what it refuses before the cut."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from test_pruning import fit, pruning
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.utils.data import DataLoader, default_collate
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from conftest import tiny
from lit_prune import PruningError, find_group_sets
from lit_prune.calibration.agreement import Agreement
from lit_prune.calibration.gates import Gates
from lit_prune.callbacks import Distillation
from lit_prune.callbacks.teacher import fingerprint, frozen, run_teacher
from lit_prune.errors import ArgumentValueError
from lit_prune.repair.dense_outputs import OutputReader


class Task(pl.LightningModule):
    """A model that is trained by the loss that it computes of batches of keyword arguments."""

    def __init__(self, model, rows):
        super().__init__()
        self.model, self.rows = model, rows

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4)


def images(labels):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": label} for label in labels]


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(config)


def test_a_model_with_buffers_of_integers_teaches(tmp_path):
    rows = images(torch.arange(24) % 4)
    trainer, _ = fit(
        tmp_path, pruning(epoch=1), Distillation(directory=tmp_path), module=Task(resnet(), rows), max_epochs=2
    )
    assert trainer.callback_metrics["distillation_loss"] > 0
    assert (tmp_path / "teacher.safetensors").exists()


class Stateful(nn.Module):
    """A parameter and a buffer of any data type; extra state that is no tensor."""

    def __init__(self, buffer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("buffer", buffer)

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_the_fingerprint_reads_buffers_of_any_data_type(dtype):
    values = [torch.tensor(v).to(dtype) for v in ([1, 0, 1], [1, 0, 1], [1, 1, 1])]
    first, same, other = (fingerprint(Stateful(v)) for v in values)
    assert first == same != other


def bert(**options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        **options,
    )
    return BertForSequenceClassification(config)


def segformer():
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        classifier_dropout_prob=0.0,
        num_labels=3,
        drop_path_rate=0.0,
        initializer_range=0.2,
    )
    return SegformerForSemanticSegmentation(config)


def mobilenet():
    torch.manual_seed(0)
    return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(num_labels=5, depth_multiplier=0.25, image_size=64))


def sentences(labels):
    ids = torch.randint(0, 64, (len(labels), 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def mean_kl(distribution, student, teacher, temperature):
    found = kl_divergence(*(distribution(logits=logits / temperature) for logits in (teacher, student)))
    return temperature**2 * found.mean()


def squared(student, teacher, _):
    return (student - teacher).square().mean()


def of_classes(student, teacher, temperature):
    return mean_kl(Categorical, student, teacher, temperature)


def of_labels(student, teacher, temperature):
    return mean_kl(Bernoulli, student, teacher, temperature)


def of_maps(student, teacher, temperature):
    return mean_kl(Categorical, student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1), temperature)


MULTI = "multi_label_classification"


# the model, its batches, and what its logits are compared by
TASKS = {
    "one number": (lambda: bert(num_labels=1), lambda: sentences(torch.randn(24)), squared),
    "numbers": (
        lambda: bert(num_labels=3, problem_type="regression"),
        lambda: sentences(torch.randn(24, 3)),
        squared,
    ),
    "classes": (lambda: bert(num_labels=3), lambda: sentences(torch.arange(24) % 3), of_classes),
    "labels": (
        lambda: bert(num_labels=3, problem_type=MULTI),
        lambda: sentences(torch.eye(3).repeat(8, 1)),
        of_labels,
    ),
    "maps": (segformer, lambda: images([torch.arange(32) % 3 * torch.ones(32, 1).long()] * 24), of_maps),
}


def bare(model):
    """A copy without the hooks of the library; transformers has some of its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook.__module__.startswith("lit_prune")]:
                del hooks[key]
    return model


@pytest.mark.parametrize("task", TASKS)
def test_outputs_are_compared_by_what_they_are_of(tmp_path, task):
    build, rows, expected = TASKS[task]
    checked = []

    class Check(pl.Callback):
        def on_pruning_start(self, trainer, pl_module, pruning):
            self.dense = copy.deepcopy(pl_module.model)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

        def on_before_backward(self, trainer, pl_module, loss):
            if hasattr(self, "dense") and pl_module.training:
                ours, theirs = bare(pl_module.model)(**self.batch), self.dense(**self.batch)
                divergence = expected(ours.logits, theirs.logits, 2.0)
                checked.append((loss.item(), (0.5 * ours.loss + 0.5 * divergence).item(), divergence.item()))

    recovery = Distillation(weight=0.5, temperature=2.0)
    fit(tmp_path, pruning(epoch=1), recovery, Check(), module=Task(build().eval(), rows()), max_epochs=2)
    assert len(checked) == 6
    for loss, wanted, divergence in checked:
        assert loss == pytest.approx(wanted, rel=1e-4) and divergence > 1e-5


@pytest.mark.parametrize("task", [name for name in TASKS if name != "maps"])
def test_gates_compare_outputs_by_what_they_are_of(task):
    build, rows, expected = TASKS[task]
    model, batch = build().eval(), default_collate(rows()[:4])
    group_sets = find_group_sets(model)
    gates = Gates(model, group_sets)
    gates.set([torch.arange(s.size) > 0 for s in group_sets])
    with gates, Agreement(model, gates) as agreement, gates.open():
        logits = model(**batch).logits
    torch.testing.assert_close(agreement.take(), expected(logits, model(**batch).logits, 1.0))


@pytest.mark.parametrize("task", ["classes", "labels", "mobile maps"])
def test_the_difference_that_polish_lowers_is_by_what_outputs_are_of(task):
    build, rows, expected = TASKS.get(task, (mobilenet, lambda: images([torch.tensor(0)] * 2), of_maps))
    model, batch = build().eval(), default_collate(rows()[:2])
    batch.pop("labels")
    reader = OutputReader(model)
    with torch.no_grad(), reader.reading():
        reader.start_batch(batch)
        model(**batch)
    ((dense, mask),) = reader.calls
    given = dense + torch.randn(dense.shape[:2] + (1,) * (dense.dim() - 2))
    torch.testing.assert_close(reader.difference(given, dense, mask), expected(given, dense, 1.0))


class Classifier(nn.Module):
    """Logits of four classes from images, given in one of several ways."""

    def __init__(self, wrap):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, 4))
        self.wrap = wrap

    def forward(self, pixel_values):
        return self.wrap(self.layers(pixel_values))


class Own(Task):
    """Takes the loss itself, and counts its steps."""

    def training_step(self, batch, batch_idx):
        output = self.model(batch["pixel_values"])
        self.steps = getattr(self, "steps", 0) + 1
        logits = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
        return nn.functional.cross_entropy(logits, batch["labels"])


WRAPS = {
    "a tensor": lambda logits: logits,
    "a dict": lambda logits: {"scores": logits},
    "an output of start and end": lambda logits: QuestionAnsweringModelOutput(start_logits=logits),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_an_output_without_logits_is_refused_before_the_cut(tmp_path, wrap):
    module = Own(Classifier(WRAPS[wrap]), images(torch.arange(24) % 4))
    with pytest.raises(PruningError, match="expected an output of the model with an attribute of that name"):
        fit(tmp_path, pruning(epoch=1), Distillation(), module=module)
    assert module.model.layers[1].out_features == 32
    assert not module.model._forward_hooks


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (bert, {"kinds": ["hidden"]}, "expected hidden_weight=0 where kinds has 'hidden'"),
        (bert, {"kinds": ["mlp", "hidden"]}, "expected hidden_weight=0 where kinds has 'hidden'"),
        (lambda: Classifier(WRAPS["a tensor"]), {}, "Classifier takes no output_hidden_states"),
    ],
    ids=["hidden", "mlp and hidden", "no hidden states"],
)
def test_hidden_states_that_cannot_be_compared_are_refused_before_training(tmp_path, build, options, match):
    module = Own(build(), images(torch.arange(24) % 4))
    with pytest.raises((ArgumentValueError, PruningError), match=match):
        fit(tmp_path, pruning(**options), Distillation(hidden_weight=1.0), module=module)
    assert not hasattr(module, "steps")


def convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=4, initializer_range=0.2)
    return ConvNextForImageClassification(config)


def embedded(count):
    return torch.randn(count, 12, 32, generator=torch.Generator().manual_seed(0))


# models, and what they are called with in float32
CALLS = {
    "convolutions": (convnext, lambda: {"pixel_values": default_collate(images([0, 0]))["pixel_values"]}),
    "batch norms": (resnet, lambda: {"pixel_values": default_collate(images([0, 0]))["pixel_values"]}),
    "embeddings": (lambda: bert(num_labels=3), lambda: {"inputs_embeds": embedded(2)}),
    "rotary positions": (lambda: tiny("llama"), lambda: {"input_ids": torch.arange(24).view(2, 12)}),
    "a table of floats": (lambda: Tabled(), lambda: {"x": embedded(2)}),
}


class Tabled(nn.Module):
    """A network of positions, whose table is no part of the state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("table", torch.randn(12, 8), persistent=False)
        self.positions, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(x + self.positions(self.table)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("call", CALLS)
def test_a_teacher_of_another_data_type_gives_what_the_model_gives(call, dtype):
    build, arguments = CALLS[call]
    model, dtype = build().eval(), getattr(torch, dtype)
    teacher = frozen(copy.deepcopy(model), torch.device("cpu"), dtype)
    assert all(p.dtype == dtype for p in teacher.parameters())
    given, dense = run_teacher(teacher, dtype, (), arguments()).logits.float(), model(**arguments()).logits
    tolerance = 0.05 if dtype.itemsize == 2 else 1e-4
    assert (given - dense).norm() < tolerance * dense.norm()


def test_frequencies_of_positions_keep_their_bits():
    model = tiny("llama")
    teacher = frozen(copy.deepcopy(model), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(teacher.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_a_teacher_of_16_bits_takes_batches_of_floats(tmp_path):
    module = Task(convnext(), images(torch.arange(24) % 4))
    trainer, _ = fit(tmp_path, pruning(epoch=1), Distillation(dtype="bfloat16"), module=module, max_epochs=2)
    assert 0 < trainer.callback_metrics["distillation_loss"] < 10
