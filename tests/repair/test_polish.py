"""Polishing: the layers that a repair refits, trained towards the dense model's outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from lit_prune import PruningConfig, prune
from lit_prune.architectures import find_group_sets
from lit_prune.calibration.precision import scaled_loss
from lit_prune.detection import find_or_trace
from lit_prune.errors import CalibrationError
from lit_prune.repair import dense_outputs
from lit_prune.repair.dense_outputs import OutputReader, record_outputs
from lit_prune.repair.polish import polish

CUT = {"iterations": 1, "compensation": False, "importance": "magnitude", "pruning_ratio": 0.3, "ratio_of": "prunable"}


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=3, initializer_range=0.2)
    return AutoModelForSequenceClassification.from_config(config).eval()


class Perceptron(nn.Module):
    """Numbers from numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, x):
        return self.layers(x)


def perceptron():
    torch.manual_seed(0)
    return Perceptron().eval()


def tokens(count, seed=1):
    return list(torch.randint(0, 64, (count, 16, 16), generator=torch.Generator().manual_seed(seed)))


def written(count, seed=1):
    """Text that the dense model writes, which is therefore the best model of it."""
    torch.manual_seed(seed)
    start = torch.randint(0, 64, (count * 16, 1))
    text = llama().generate(start, do_sample=True, top_k=0, max_new_tokens=15, min_new_tokens=15, eos_token_id=None)
    return list(text.view(count, 16, 16))


@torch.no_grad()
def classes(batch):
    """Labels as the dense model would give them."""
    generator = torch.Generator().manual_seed(int(batch.sum()))
    return torch.multinomial(bert()(input_ids=batch).logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def measured(batch):
    """What the dense model gives, and an error of measurement."""
    outputs = perceptron()(batch)
    generator = torch.Generator().manual_seed(int(1000 * batch.abs().sum()))
    return outputs + 0.01 * torch.randn(outputs.shape, generator=generator)


def numbers(count, seed=1):
    return list(torch.randn(count, 32, 8, generator=torch.Generator().manual_seed(seed)))


CASES = {
    "llama": (llama, written, lambda m, b: m(input_ids=b, labels=b).loss),
    "bert": (bert, tokens, lambda m, b: m(input_ids=b, labels=classes(b)).loss),
    "perceptron": (perceptron, numbers, lambda m, b: (m(b) - measured(b)).square().mean()),
}


def given(model, batch):
    output = model(batch)
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def distance(model, dense, batches, kind):
    """The difference, computed here by other means."""
    pairs = [(given(model, b), given(dense, b)) for b in batches]
    if kind == "perceptron":
        return sum(((x - y).square().mean() / y.square().mean()).item() for x, y in pairs) / len(pairs)
    found = [torch.distributions.Categorical(logits=y.float()) for _, y in pairs]
    pruned = [torch.distributions.Categorical(logits=x.float()) for x, _ in pairs]
    return sum(torch.distributions.kl_divergence(d, p).mean().item() for d, p in zip(found, pruned, strict=True)) / len(
        pairs
    )


@torch.no_grad()
def mean_loss(loss, model, batches):
    return sum(loss(model, b).item() for b in batches) / len(batches)


@pytest.mark.parametrize("kind", CASES)
def test_it_comes_closer_to_the_dense_model_also_on_other_batches(kind):
    build, batches_of, loss = CASES[kind]
    dense = build()
    batches, others = batches_of(16), batches_of(8, seed=2)
    found = {}
    for epochs in (0, 6):
        model = copy.deepcopy(dense)
        config = PruningConfig(**CUT, polish_epochs=epochs)
        _, plan = prune(model, batches, lambda b, model=model: loss(model, b), config)
        found[epochs] = distance(model, dense, others, kind)
    losses = plan.info["polish"]
    assert len(losses) == 7
    held = [batches[7], batches[15]]
    assert min(losses) == pytest.approx(mean_loss(loss, model, held), rel=1e-4, abs=1e-6)
    # what the dense model loses itself cannot be won
    least = mean_loss(loss, dense, held)
    assert min(losses) - least < 0.97 * (losses[0] - least)
    assert found[6] < 0.98 * found[0]


class Squeezed(Perceptron):
    """One number for every sample, in one dimension, and a loss beside it."""

    def forward(self, x):
        output = super().forward(x)[:, 0]
        return output.square().mean(), output


def test_an_output_of_one_dimension_has_one_feature():
    torch.manual_seed(0)
    dense, batches, found = Squeezed().eval(), numbers(16), {}
    for epochs in (0, 6):
        model = copy.deepcopy(dense)

        def run(batch, model=model):
            model(batch)

        prune(model, batches, run, PruningConfig(**{**CUT, "importance": "wanda"}, polish_epochs=epochs))
        pairs = [(model(b)[1], dense(b)[1]) for b in numbers(8, seed=2)]
        found[epochs] = sum(((x - y).square().mean() / y.square().mean()).item() for x, y in pairs) / len(pairs)
    assert found[6] < 0.98 * found[0]


@dataclasses.dataclass
class Wrapped:
    value: torch.Tensor


class Wrapping(Perceptron):
    """Gives its numbers in an object that nothing outside knows."""

    def forward(self, x):
        return Wrapped(super().forward(x))


NOTHING_TO_READ = {
    "a part of the model is called, not the model": (perceptron, numbers, lambda m, b: m.layers(b).square().mean()),
    "a loss of hidden states and the weights of the head": (
        llama,
        tokens,
        lambda m, b: functional.cross_entropy(
            (m.model(b).last_hidden_state @ m.lm_head.weight.T).flatten(0, 1), b.flatten()
        ),
    ),
    "an output without tensors": (lambda: Wrapping().eval(), numbers, lambda m, b: m(b).value.square().mean()),
}


@pytest.mark.parametrize("kind", NOTHING_TO_READ)
def test_a_model_without_an_output_to_compare_is_pruned_with_a_warning(kind):
    build, batches_of, loss = NOTHING_TO_READ[kind]
    model = build()
    with pytest.warns(UserWarning, match="Nothing will be polished"):
        _, plan = prune(model, batches_of(8), lambda b: loss(model, b), PruningConfig(**CUT, polish_epochs=1))
    assert "polish" not in plan.info
    assert plan.entries


@pytest.mark.parametrize("importance", ["fisher", "auto"])
@pytest.mark.parametrize("kind", CASES)
def test_batches_that_decide_when_to_stop_were_seen_by_nothing_before(kind, importance):
    build, batches_of, loss = CASES[kind]
    dense, batches = build(), batches_of(16)
    plain, polished = copy.deepcopy(dense), copy.deepcopy(dense)
    _, plan = prune(
        polished,
        batches,
        lambda b: loss(polished, b),
        PruningConfig(**{**CUT, "importance": importance}, polish_epochs=1),
    )
    others = [b for number, b in enumerate(batches) if number % 8 != 7]
    config = PruningConfig(**{**CUT, "importance": plan.info["weights"]})
    _, again = prune(plain, others, lambda b: loss(plain, b), config)
    assert [e.kept for e in again.entries] == [e.kept for e in plan.entries]
    held = [batches[7], batches[15]]
    assert plan.info["polish"][0] == pytest.approx(mean_loss(loss, plain, held), rel=1e-4, abs=1e-6)


def test_without_a_loss_the_difference_from_the_dense_model_decides():
    dense, batches = llama(), written(8)
    model = copy.deepcopy(dense)

    def run(batch):
        model(input_ids=batch)

    _, plan = prune(model, batches, run, PruningConfig(**CUT, polish_epochs=3))
    values = plan.info["polish"]
    assert min(values) == pytest.approx(distance(model, dense, batches[7:], "llama"), rel=1e-3)
    assert min(values) < values[0]


def test_only_refitted_layers_change_and_nothing_else_of_the_model():
    batches, dense = tokens(8), llama()
    plain, polished = copy.deepcopy(dense), copy.deepcopy(dense)
    polished.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    for model, epochs in ((plain, 0), (polished, 3)):
        model.train()
        prune(
            model, batches, lambda b, m=model: m(input_ids=b, labels=b).loss, PruningConfig(**CUT, polish_epochs=epochs)
        )
    before = dict(plain.named_parameters())
    for name, parameter in polished.named_parameters():
        read = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(parameter, before[name]) != read, name
        assert parameter.requires_grad != (name == "model.layers.0.self_attn.q_proj.weight")
        assert parameter.grad is None
    assert polished.training


def test_the_gradient_of_the_difference_is_that_of_the_divergence(monkeypatch):
    """In one piece by autograd, where the library goes through the vocabulary in chunks."""
    monkeypatch.setattr(dense_outputs, "CHUNK", 5)
    model = llama()
    student, teacher = torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    student.requires_grad_()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, :3] = False
    ours = OutputReader(model).difference(student, teacher, mask)
    (gradient,) = torch.autograd.grad(3 * ours, student)
    logits = model.lm_head(student)[mask], model.lm_head(teacher)[mask]
    whole = functional.kl_div(logits[0].log_softmax(-1), logits[1].softmax(-1), reduction="batchmean")
    (wanted,) = torch.autograd.grad(3 * whole, student)
    torch.testing.assert_close(ours.float(), whole.detach())
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[0, :3] == 0).all()


def granite():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=16.0, initializer_range=0.2)).eval()


def cohere():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, bos_token_id=1, eos_token_id=2, initializer_range=0.2)).eval()


def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=8, final_logit_softcapping=3.0)
    model = Gemma2ForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(20)
    return model


class ScaledInPlace(LlamaForCausalLM):
    """Logits that are written over what the head gave."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits.mul_(0.25)
        return output


def scaled_in_place():
    torch.manual_seed(0)
    return ScaledInPlace(LlamaConfig(**SMALL, initializer_range=0.2)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "features"), [(llama, 32), (granite, 32), (cohere, 32), (scaled_in_place, 32), (gemma, 64)]
)
def test_what_a_model_does_to_the_output_of_its_head_is_part_of_the_difference(build, features, dtype):
    model, batches = build().to(dtype), tokens(3)
    dense = copy.deepcopy(model)
    recorded = record_outputs(
        model, lambda: contextlib.nullcontext((batches, lambda b: model(input_ids=b, labels=b).loss))
    )
    assert [b.outputs[0].shape[-1] for b in recorded.batches] == [features] * 3
    for name, parameter in model.named_parameters():
        if "layers" in name:
            parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    reader = recorded.reader
    for batch, known in zip(batches, recorded.batches, strict=True):
        with reader.reading(), torch.no_grad():
            reader.start_batch(batch)
            model(input_ids=batch)
        ((states, mask),) = reader.calls
        found = float(reader.difference(states, known.outputs[0], mask))
        wanted = distance(model, dense, [batch], "language model")
        # the logits of a model in 16 bits are rounded once more
        assert found == pytest.approx(wanted, rel=1e-3 if dtype == torch.float32 else 0.05)
        assert wanted > 1e-4


def test_capped_logits_are_polished():
    dense, batches, others, found = gemma(), tokens(16), tokens(8, seed=2), {}
    for epochs in (0, 6):
        model = copy.deepcopy(dense)
        config = PruningConfig(**{**CUT, "importance": "wanda"}, polish_epochs=epochs)
        prune(model, batches, lambda b, model=model: model(input_ids=b) and None, config)
        found[epochs] = distance(model, dense, others, "language model")
    assert found[6] < 0.98 * found[0]


def masked_bert():
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(BertConfig(**SMALL, initializer_range=0.2)).eval()


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        do_layer_norm_before=False,
        init_std=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("build", [llama, masked_bert, opt])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_works_where_steps_cast_to_16_bits(build, dtype):
    """What the output embeddings read there has another dtype than their weights in some models (a projection before them)."""
    model = build()

    def loss(batch):
        with torch.autocast("cpu", dtype):
            return model(input_ids=batch, labels=batch).loss

    _, plan = prune(model, tokens(8), loss, PruningConfig(**CUT, polish_epochs=2))
    assert all(math.isfinite(value) for value in plan.info["polish"])
    assert len(set(plan.info["polish"])) > 1


@pytest.mark.parametrize("kind", CASES)
def test_losses_that_come_scaled_do_not_change_the_steps(kind):
    """As in float16, where a hook of every parameter divides its gradient again."""
    build, batches_of, loss = CASES[kind]
    weights = {}
    for scale in (1.0, 2.0**20):
        model, batches = build(), batches_of(4)

        @contextlib.contextmanager
        def data(model=model, batches=batches, scale=scale):
            handles = [p.register_hook(lambda g: g / scale) for p in model.parameters() if p.requires_grad]
            with scaled_loss(scale):
                yield batches, partial(loss, model)
            for handle in handles:
                handle.remove()

        outputs = record_outputs(model, data)
        found = find_or_trace(model, batches, partial(loss, model))
        sets = find_group_sets(model) if found is None else found
        read = {part.parameter for group_set in sets for part in group_set.repairable}
        for name in read:
            model.get_parameter(name).data[:, ::2] *= 1.001
        polish(model, sets, data, outputs, 2)
        weights[scale] = [model.get_parameter(name).detach() for name in sorted(read)]
    torch.testing.assert_close(weights[1.0], weights[2.0**20], rtol=1e-5, atol=1e-7)


def test_padding_has_no_part_in_it():
    model, dense = llama(), llama()
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.data.mul_(0.5)
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 5, dtype=torch.long)], 1)
    results = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        outputs = record_outputs(dense, lambda b=batch: contextlib.nullcontext(([b], lambda b: dense(**b))))
        reader = OutputReader(model)
        with reader.reading(), torch.no_grad():
            reader.start_batch(batch)
            model(**batch)
            ((states, real),) = reader.calls
            results.append(float(reader.difference(states, outputs.batches[0].outputs[0], real)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_a_failure_leaves_the_model_as_it_was(kind):
    build, batches_of, loss = CASES[kind]
    model, calls = build(), []
    before = copy.deepcopy(model.state_dict())

    def fails_late(batch):
        calls.append(1)
        if len(calls) == fail_at:
            raise RuntimeError("no more")
        return loss(model, batch)

    fail_at = 0
    trial = copy.deepcopy(model)
    prune(trial, batches_of(8), lambda b: (calls.append(1), loss(trial, b))[1], PruningConfig(**CUT, polish_epochs=2))
    fail_at = len(calls) - 3
    calls.clear()
    with pytest.raises(RuntimeError, match="no more"):
        prune(model, batches_of(8), fails_late, PruningConfig(**CUT, polish_epochs=2))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Lengthening:
    """Batches of other shapes every time."""

    def __init__(self, batches):
        self.shapes = iter(range(4, 40))

    def __iter__(self):
        yield from (torch.randint(0, 64, (2, next(self.shapes))) for _ in range(8))


class ReadOn:
    """A stream, as from a socket, that goes on where it was."""

    def __init__(self, batches):
        self.batches = iter(tokens(200))

    def __iter__(self):
        return itertools.islice(self.batches, 8)


def shuffled(batches):
    return DataLoader(batches, None, shuffle=True, generator=torch.Generator().manual_seed(0))


OTHERS = {
    "shapes": (Lengthening, lambda m, b: m(input_ids=b, labels=b).loss),
    "a stream": (ReadOn, lambda m, b: m(input_ids=b, labels=b).loss),
    "a generator of its own": (shuffled, lambda m, b: m(input_ids=b, labels=b).loss),
    "only parts of the model are called": (
        shuffled,
        lambda m, b: m.lm_head(m.model(b).last_hidden_state).logsumexp(-1).mean(),
    ),
    "embeddings in float": (
        shuffled,
        lambda m, b: m(inputs_embeds=functional.one_hot(b % 32, 32).float(), labels=b).loss,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_batches_that_change_between_passes_are_refused(kind):
    loader, loss = OTHERS[kind]
    model, batches = llama(), loader(tokens(8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="polish_epochs=0"):
        prune(model, batches, lambda b: loss(model, b), PruningConfig(**CUT, repair=None, polish_epochs=1))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def masked(model, batch):
    """A step that draws what it masks, as long as the batch is."""
    hidden = torch.rand(batch.shape) < 0.15
    return model(input_ids=batch.masked_fill(hidden, 0), labels=batch).loss


def test_a_step_that_draws_random_numbers_draws_the_same_in_every_pass():
    model = llama()
    _, plan = prune(model, tokens(16), lambda b: masked(model, b), PruningConfig(**CUT, polish_epochs=2))
    assert len(plan.info["polish"]) == 3


def test_a_loader_that_shuffles_by_the_global_random_numbers_gives_one_order_in_every_pass():
    batches, found = DataLoader(written(8), None, shuffle=True), []
    for fixed in (True, False):
        model = llama()
        torch.manual_seed(3)
        order = list(batches) if fixed else batches
        torch.manual_seed(3)
        state = torch.get_rng_state()
        loss = partial(CASES["llama"][2], model)
        _, plan = prune(model, order, loss, PruningConfig(**CUT, polish_epochs=2))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(plan.info["polish"])
    assert found[0] == found[1]


@pytest.mark.parametrize(("build", "batches_of"), [(bert, tokens), (opt, tokens), (perceptron, numbers)])
def test_biases_of_zeros_are_trained(build, batches_of):
    model = build()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()

    def run(batch):
        model(batch)

    config = PruningConfig(**{**CUT, "importance": "wanda"}, repair=None, polish_epochs=1)
    prune(model, batches_of(7), run, config)
    names = (
        {"layers.2.bias"}
        if build is perceptron
        else {
            f"{name}.bias"
            for name, _ in model.named_modules()
            if name.endswith(("attention.output.dense", "output.dense", "out_proj", "fc2")) and "pooler" not in name
        }
    )
    assert names
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert bool(parameter.any()) == (name in names or name == "layers.4.bias"), name


def test_weights_of_16_bits_take_steps_smaller_than_they_tell_apart():
    batches, dense = tokens(16), llama().to(torch.bfloat16)
    found = {}
    for epochs in (0, 6):
        model = copy.deepcopy(dense)
        prune(
            model, batches, lambda b, m=model: m(input_ids=b, labels=b).loss, PruningConfig(**CUT, polish_epochs=epochs)
        )
        found[epochs] = distance(model.float(), copy.deepcopy(dense).float(), tokens(8, seed=2), "llama")
    assert found[6] < 0.98 * found[0]
