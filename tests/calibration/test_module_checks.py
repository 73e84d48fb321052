"""Modules that are not what they look like are refused before calibration, and nothing that is what it looks like is."""

from __future__ import annotations

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from architecture_cases import CASES, loss_of, output_of, random_ids
from own_models import MyResNet, TextClassifier
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader

import lit_prune
from conftest import tiny, uneven_kept, unsettled
from lit_prune import Limits, PruningConfig, PruningPlan, UnsupportedModelError, apply_plan, find_group_sets, find_model
from lit_prune.architectures.weight_checks import check_parameters
from lit_prune.calibration.module_checks import check_computation
from lit_prune.callbacks import StructuredPruning
from lit_prune.errors import PlanError
from lit_prune.io.huggingface import load_pruned, save_pruned
from lit_prune.repair.refit import least_squares

CASE = {case.name: case for case in CASES}
BATCHES = [{"input_ids": random_ids(seed), "labels": random_ids(seed)} for seed in range(3)]


def pruned(model, batches=BATCHES, config=None, loss=None):
    """Prune a model; give the number of batches that were run."""
    runs = []

    def count(batch):
        runs.append(batch)
        return loss_of(model, batch) if loss is None else loss(batch)

    try:
        lit_prune.prune(model, batches, count, config or PruningConfig("taylor", 0.2, iterations=1))
    finally:
        model.runs = len(runs)


def refused(model, match, runs, **options):
    """The model is refused after so many batches, and is as it was."""
    inner = find_model(model)[1]
    before = {n: (id(p), p.detach().clone()) for n, p in inner.named_parameters() if not p.is_meta}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in inner.named_modules()}
    with pytest.raises(UnsupportedModelError, match=match):
        pruned(model, **options)
    assert model.runs == runs
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in inner.named_modules()} == hooks
    after = dict(inner.named_parameters())
    assert all(id(after[n]) == i and torch.equal(after[n], value) for n, (i, value) in before.items())


# weights that are made of others


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, r"_WeightNorm\).*remove_parametrizations\(module, 'weight'\)"),
    "spectral_norm": (parametrizations.spectral_norm, r"_SpectralNorm\).*remove_parametrizations"),
    "own": (
        lambda m: parametrize.register_parametrization(m, "weight", Halved()),
        r"Halved\).*remove_parametrizations",
    ),
    "legacy weight_norm": (nn.utils.weight_norm, r"weight_norm.*remove_weight_norm\(module, 'weight'\)"),
    "legacy spectral_norm": (nn.utils.spectral_norm, r"spectral_norm.*remove_spectral_norm\(module, 'weight'\)"),
    "prune": (
        lambda m: torch_prune.l1_unstructured(m, "weight", amount=0.3),
        r"masked by torch\.nn\.utils\.prune.*prune\.remove\(module, 'weight'\)",
    ),
    "prune, bias": (
        lambda m: torch_prune.random_unstructured(m, "bias", amount=0.3),
        r"masked by.*prune\.remove\(module, 'bias'\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.up_proj"])
def test_weights_that_are_computed_are_refused_with_what_to_call_first(name, place):
    change, message = PARAMETRIZED[name]
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    change(model.model.layers[1].get_submodule(place))
    refused(model, rf"model\.layers\.1\.{place} .*{message}", 0)


@pytest.mark.parametrize("name", ["GPT-2", "nn.TransformerEncoder", "Mixtral"])
def test_whatever_holds_the_weight(name):
    model = CASE[name].build()
    inner = find_model(model)[1]
    path = next(s.consumers[0].module for s in find_group_sets(model) if s.consumers and s.kind != "expert")
    parameter = "weight" if hasattr(inner.get_submodule(path), "weight") else "in_proj_weight"
    parameter = parameter if hasattr(inner.get_submodule(path), parameter) else "down_proj"
    torch_prune.l1_unstructured(inner.get_submodule(path), parameter, amount=0.3)
    refused(model, rf"{path.replace('.', '[.]')} .*prune\.remove\(module, '{parameter}'\)", 0)


@pytest.mark.parametrize("repair", [None, "bias", "least_squares"])
def test_a_masked_weight_of_a_model_that_is_found_by_running_it_is_cut_with_its_mask(repair):
    model = CASE["ResNet"].build().eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        torch_prune.l1_unstructured(convolution, "weight", amount=0.3)
    before = [c.weight.shape for c in convolutions]
    batches = [{"pixel_values": torch.randn(8, 3, 8, 8), "labels": torch.randint(0, 3, (8,))}]
    lit_prune.prune(model, batches, lambda b: model(**b)[1], PruningConfig(pruning_ratio=0.2, repair=repair))
    model(**batches[0])[1].backward()
    assert [c.weight.shape for c in convolutions] != before
    for convolution in convolutions:
        assert torch.equal(convolution.weight, convolution.weight_orig * convolution.weight_mask)
        assert convolution.weight_orig.grad.shape == convolution.weight.shape


def test_after_what_the_message_says_it_works():
    model = tiny("llama")
    projection = model.model.layers[1].mlp.up_proj
    parametrizations.weight_norm(projection)
    parametrize.remove_parametrizations(projection, "weight")
    torch_prune.l1_unstructured(projection, "weight", amount=0.3)
    torch_prune.remove(projection, "weight")
    pruned(model)
    assert lit_prune.get_plan(model) is not None


class Module(pl.LightningModule):
    def __init__(self, model=None):
        super().__init__()
        self.model = tiny("llama") if model is None else model
        self.steps = 0

    def training_step(self, batch, index):
        self.steps += 1
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(module, *callbacks, epochs=2):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(BATCHES, batch_size=None))


def test_lightnings_own_masks_are_refused_by_name():
    module = Module()
    masks = pl.callbacks.ModelPruning(
        "l1_unstructured", [(module.model.model.layers[0].mlp.down_proj, "weight")], amount=0.3
    )
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.down_proj .*prune\.remove\(module, 'weight'\)"):
        fit(module, masks, StructuredPruning(epoch=1, calibration_batches=2, validate=False))


# tensors beside the weight: they may give nothing now, and be in the way of a cut all the same


class Masked(nn.Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x):
        return functional.linear(x, self.weight * self.mask, self.bias)


class LowRank(nn.Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.ones(self.out_features))

    def forward(self, x):
        return super().forward(x) * self.scale


class PlainMask(nn.Linear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.mask = torch.ones(self.out_features)

    def forward(self, x):
        return super().forward(x) * self.mask


@pytest.mark.parametrize(
    ("kind", "names"),
    [(Masked, "mask"), (LowRank, r"down\.weight', 'up\.weight"), (Scaled, "scale"), (PlainMask, "mask")],
)
@pytest.mark.parametrize("place", ["q_proj", "o_proj"])
def test_subclasses_with_tensors_of_their_own_are_refused(kind, names, place):
    model = tiny("llama")
    attention = model.model.layers[2].self_attn
    replace_by(kind, attention, place)
    refused(model, rf"layers\.2\.self_attn\.{place} \({kind.__name__}\) has tensors .*\['{names}'\]", 0)


def replace_by(kind, owner, name):
    old = getattr(owner, name)
    new = kind(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict(), strict=False)
    setattr(owner, name, new)


# what a module computes


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x.roll(1, dims=-1))


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        states, weights = super().forward(*args, **kwargs)
        return 3 * states, weights


def triple_in_place(_, args):
    args[0].mul_(3)


CHANGES = {
    "an output": lambda m: m.register_forward_hook(lambda _, __, output: 3 * output),
    "an output, in place": lambda m: m.register_forward_hook(lambda _, __, output: output.mul_(3)),
    "an input": lambda m: m.register_forward_pre_hook(lambda _, args: (3 * args[0],)),
    "an input, in place": lambda m: m.register_forward_pre_hook(triple_in_place),
    "the forward": lambda m: setattr(m, "forward", lambda x, f=m.forward: 3 * f(x)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"])
def test_hooks_that_change_something_are_refused_after_one_batch(change, place):
    model = tiny("llama")
    CHANGES[change](model.model.layers[1].get_submodule(place))
    hint = "pre-hook .*changes its input" if "input" in change else r"does not compute x W\^T \+ b .*difference 2\)"
    refused(model, rf"layers\.1\.{place} \(Linear\).*{hint}", 1)


@pytest.mark.parametrize("kind", [Tripled, Shifted])
def test_subclasses_that_compute_something_else_are_refused(kind):
    model = tiny("llama")
    for layer in model.model.layers:
        replace_by(kind, layer.mlp, "down_proj")
    refused(model, rf"layers\.0\.mlp\.down_proj \({kind.__name__}\) .*{kind.__name__} does.*\(2 more", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GPT-2", r"Conv1D\) does not compute x W \+ b"),
        ("BLOOM", r"Linear\) does not compute x W\^T \+ b"),
        ("Mixtral", r"MixtralExperts\) does not compute what the forward of MixtralExperts does"),
        ("nn.TransformerEncoder", r"MultiheadAttention\) does not compute what the forward of MultiheadAttention does"),
        ("ResNet", r"Conv2d\) does not compute the convolution of its input with its weight"),
    ],
)
def test_hooks_show_on_every_kind_of_module(name, message):
    case = CASE[name]
    model = case.build()
    sets = [s for s in find_group_sets(model) if any(p.input_dim is not None for p in s.slices)]
    part = next(
        p for s in sets for p in s.consumers if p.unobservable_input or name in ("GPT-2", "BLOOM") or "conv" in p.module
    )
    path = part.module.removesuffix(".out_proj")

    def triple(_, __, output):
        return (3 * output[0], *output[1:]) if isinstance(output, tuple) else 3 * output

    find_model(model)[1].get_submodule(path).register_forward_hook(triple)
    refused(model, rf"{path.replace('.', '[.]')} \({message}", 1, batches=[case.batch(0), case.batch(1)])


def test_attention_of_torch_that_does_something_of_its_own_is_refused():
    model = unsettled(TextClassifier(64))
    for layer in model.encoder.layers:
        layer.self_attn.__class__ = OwnAttention
    batches = [CASE["nn.TransformerEncoder"].batch(0)]
    refused(
        model, r"self_attn \(OwnAttention\) does not compute what the forward of MultiheadAttention", 1, batches=batches
    )


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.filterwarnings("ignore:.*parameters of MyResNet can be pruned")
def test_a_convolution_that_norms_its_weight_keeps_its_inputs_and_the_rest_is_pruned():
    model = unsettled(MyResNet())
    norming = model.stages[0].conv2
    norming.__class__ = Standardized
    before = norming.weight.detach().clone()
    batches = [CASE["ResNet"].batch(0), CASE["ResNet"].batch(1)]
    pruned(model, batches=batches, config=PruningConfig(pruning_ratio=0.3, iterations=1))
    assert norming.weight.shape[1] == before.shape[1]
    # its outputs may go, and nothing else of its weight changes
    rows = [next(i for i, old in enumerate(before) if torch.equal(old, row)) for row in norming.weight]
    assert rows == sorted(rows)
    assert sum(p.numel() for p in model.parameters()) < 0.75 * sum(p.numel() for p in MyResNet().parameters())


class Tripling(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


def test_a_layer_that_does_more_than_multiply_is_cut_and_left_out_of_the_repair():
    model = unsettled(MyResNet())
    model.stages[0].conv2.__class__ = Tripling
    before = model.stages[0].conv2.weight.detach().clone()
    config = PruningConfig(pruning_ratio=0.5, iterations=1, repair="least_squares")
    with pytest.warns(UserWarning, match=r"\['stages\.0\.conv2'\] compute more than a product"):
        pruned(model, batches=[CASE["ResNet"].batch(n) for n in range(3)], config=config)
    after = model.stages[0].conv2.weight
    assert after.shape[1] < before.shape[1]
    values = set(before.flatten().tolist())
    assert all(v in values for v in after.flatten().tolist())


def test_an_error_of_training_is_not_ours_and_batches_that_skip_the_model_are_passed_over():
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, output: 3 * output)
    skip = iter([True, True, False])
    refused(model, "does not compute", 3, loss=lambda b: None if next(skip) else loss_of(model, b))
    with pytest.raises(ZeroDivisionError):
        pruned(tiny("llama"), loss=lambda b: 1 / 0)


def test_the_silent_case_is_refused_in_a_fit_before_calibration():
    module = Module()
    module.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, output: 3 * output)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.down_proj .*hooks are .*<lambda>: remove"):
        fit(module, StructuredPruning(step=0, calibration_batches=2, validate=False))
    assert module.global_step == 0


FAMILIES = [
    "Llama", "GPT-2", "BERT, masked language model", "BLOOM", "Mixtral", "Llama 4, text", "gpt-oss", "T5",
    "nn.TransformerEncoder", "nn.Transformer", "ResNet", "Qwen3-Next", "GPT-BigCode / StarCoder",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in CASE if n in FAMILIES or n.startswith("ViT")])
def test_what_is_what_it_looks_like_passes_before_and_after_a_cut(name, dtype):
    case = CASE[name]
    if name == "ResNet" and dtype != torch.float32:
        pytest.skip("the images that it is traced with are float32")
    model = case.build()
    for _ in range(2):
        typed = copy.deepcopy(model).to(dtype)
        inner, group_sets = find_model(typed)[1], find_group_sets(typed)
        seen = []
        for part in (p for s in group_sets for p in s.slices):
            inner.get_submodule(part.module).register_forward_hook(lambda *_: seen.append(1))
        check_parameters(inner, group_sets, typed)
        batch = case.batch(0)
        if isinstance(batch, dict):
            batch = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        check_computation(inner, group_sets, [batch], lambda b, m=typed: loss_of(m, b), root=typed)
        assert seen
        group_sets = find_group_sets(model)
        apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))


# values that are not in memory


def test_offloaded_weights_are_refused_before_a_batch_is_run():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny("llama"))
    assert torch.isfinite(model(**BATCHES[0]).loss)
    refused(model, r"model\.embed_tokens\.weight.*'meta'\): accelerate's \w+ at .*offloads it.*Load the whole model", 0)
    refused(tiny("llama").to("meta"), r"has no values in memory \(it is on the device 'meta'\)\. Load", 0)


def test_modules_that_accelerate_only_wraps_are_right():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("llama")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(io_same_device=True))
    pruned(model, config=PruningConfig("taylor", 0.2, iterations=1, repair=None))
    assert model.runs == 1 + len(BATCHES)


# ties


def weight_of(model):
    return model.model.layers[1].mlp.down_proj


TIES = {
    "a sibling": lambda m: setattr(m, "probe", sharing(weight_of(m.model))),
    "a list of Python's": lambda m: setattr(m, "probes", [nn.ReLU(), sharing(weight_of(m.model))]),
    "a dictionary of tuples": lambda m: setattr(m, "probes", {"one": (sharing(weight_of(m.model)),)}),
    "its memory": lambda m: setattr(
        m, "probe", sharing(weight_of(m.model), nn.Parameter(weight_of(m.model).weight.data))
    ),
    "in the model, unregistered": lambda m: setattr(m.model, "_probes", [sharing(weight_of(m.model))]),
}


def sharing(linear, weight=None):
    probe = nn.Linear(linear.in_features, linear.out_features, bias=False)
    probe.weight = linear.weight if weight is None else weight
    return probe


@pytest.mark.parametrize("tie", TIES)
def test_weights_tied_to_a_module_beside_the_model_are_refused_before_training(tie):
    module = Module()
    TIES[tie](module)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj\.weight' shares .*probes?.*Untie"):
        fit(module, StructuredPruning(epoch=1, calibration_batches=2, validate=False))
    assert module.steps == 0


def test_the_same_module_in_another_place_is_no_tie():
    module = Module()
    module.alias, module.aliases = weight_of(module.model), [module.model.model.layers]
    fit(module, StructuredPruning(epoch=1, calibration_batches=2, validate=False, importance="wanda", iterations=1))
    assert module.alias is weight_of(module.model)
    assert module.alias.in_features < 24


# blocks that cannot be run again


def prefix_tuned():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_with_prefix_tuning_channels_leave_and_are_repaired_and_heads_are_refused(recwarn):
    model = prefix_tuned()
    refused(model, r"called with a cache that holds tokens .*kinds=\['mlp'\]", 1, config=PruningConfig("wanda", 0.2))
    weights = weight_of(model.base_model).weight.detach().clone()
    config = PruningConfig("wanda", 0.1, limits=Limits(kinds=("mlp",)), iterations=1)
    pruned(model, config=config)
    assert not [w for w in recwarn if "Nothing was repaired" in str(w.message)]
    plan = lit_prune.get_plan(find_model(model)[1])
    kept = next(list(e.kept) for e in plan.entries if e.layer == 1)
    assert weight_of(model.base_model).weight.shape == weights[:, kept].shape
    assert not torch.equal(weight_of(model.base_model).weight, weights[:, kept])
    assert torch.isfinite(loss_of(model, BATCHES[0]))


def test_a_sequence_in_pieces_is_pruned_and_repaired(recwarn):
    model = tiny("llama")

    def loss(batch):
        first = model(input_ids=batch["input_ids"][:, :5], use_cache=True)
        ids = batch["input_ids"][:, 5:]
        return model(input_ids=ids, labels=ids, past_key_values=first.past_key_values).loss

    whole = copy.deepcopy(model)
    pruned(model, loss=loss)
    assert not [w for w in recwarn if "Nothing was repaired" in str(w.message)]
    apply_plan(whole, PruningPlan(lit_prune.get_plan(model).entries))
    assert weight_of(model).weight.shape == weight_of(whole).weight.shape
    assert not torch.equal(weight_of(model).weight, weight_of(whole).weight)
    assert torch.isfinite(loss(BATCHES[0]))


class Remembering(nn.Module):
    """Adds to what a layer gives something of what it gave before."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.mlp, self.layer, self.before = layer.self_attn, layer.mlp, [layer], []

    def forward(self, hidden_states, **kwargs):
        output = self.layer[0](hidden_states, **kwargs)
        self.before.append(output)
        return output + 0.1 * len(self.before)


class Failing(Remembering):
    def forward(self, hidden_states, **kwargs):
        if self.before:
            raise RuntimeError("I run once")
        self.before.append(1)
        return self.layer[0](hidden_states, **kwargs)


@pytest.mark.parametrize("kind", [Remembering, Failing])
def test_blocks_that_give_something_else_or_fail_when_run_on_their_own_are_repaired_in_the_model(kind, recwarn):
    model = tiny("llama")
    model.model.layers[1] = kind(model.model.layers[1])
    whole = copy.deepcopy(model)
    # one batch with no data for importance: the block runs in the check and in the recording
    pruned(model, BATCHES[:1], PruningConfig("magnitude", 0.2, iterations=1), loss=fresh(model, kind))
    assert not [w for w in recwarn if "Nothing was repaired" in str(w.message)]
    apply_plan(whole, PruningPlan(lit_prune.get_plan(model).entries))
    assert not torch.equal(weight_of(model).weight, weight_of(whole).weight)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Remembering, r"model\.layers.* does not give what it gave on the same batch before \(largest"),
        (Failing, r"batch 0 ran before, and cannot be run again \(RuntimeError: I run once\)"),
    ],
)
def test_models_that_give_something_else_or_fail_when_run_again_are_not_repaired(kind, message):
    model = tiny("llama")
    model.model.layers[1] = kind(model.model.layers[1])
    module, runs = model.model.layers[1], []

    def loss(batch):
        # the check, the batch with no statistics, and the recording of the blocks
        if kind is Failing and len(runs) < 3:
            module.before.clear()
        runs.append(batch)
        return loss_of(model, batch)

    with pytest.warns(UserWarning, match=f"Nothing was repaired: .*{message}"):
        pruned(model, BATCHES[:1], PruningConfig("magnitude", 0.2, iterations=1), loss=loss)
    assert lit_prune.get_plan(model) is not None


def fresh(model, kind):
    def loss(batch):
        for module in model.modules():
            if isinstance(module, kind):
                module.before.clear()
        return loss_of(model, batch)

    return loss


class Fixed(nn.Module):
    """An MLP that knows its width."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        inner = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner.view(*x.shape[:-1], 24))


def test_a_block_that_does_not_run_once_it_is_cut_is_an_error_before_the_cut():
    model = tiny("llama")
    model.model.layers[1].mlp = Fixed(model.model.layers[1].mlp)
    with pytest.raises(PlanError, match=r"layers\.1 runs on its own as it is, but not once it is cut.*shape"):
        pruned(model, config=PruningConfig("magnitude", 0.2, limits=Limits(kinds=("mlp",))))
    assert lit_prune.get_plan(model) is None and model.model.layers[1].mlp.up_proj.out_features == 24


def test_autocast_in_the_recording_alone_is_no_reason():
    model = tiny("llama")
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))

    def forward(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    assert least_squares(model, group_sets, plan, BATCHES, forward)


# after the cut


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "nn.Transformer", "BLOOM", "MPT", "T5", "GPT-2", "Llama"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_cut_model_is_pickled_whole(name, empty):
    case = CASE[name]
    model = case.build()
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    if empty:
        kept = [k if s.minimum else [] for s, k in zip(group_sets, kept, strict=True)]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(output_of(loaded, case.batch(0)), output_of(model, case.batch(0)))
    again = [s.key for s in find_group_sets(loaded)]
    assert again == [s.key for s in find_group_sets(model)]


def test_continuous_batching_is_refused_once_key_value_heads_differ(tmp_path):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    channels = [[0, 1] if s.kind == "mlp" else list(range(s.size)) for s in group_sets]
    apply_plan(model, PruningPlan.from_kept(group_sets, channels))
    assert "init_continuous_batching" not in vars(model)
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    save_pruned(model, tmp_path / "model")
    for cut in (model, copy.deepcopy(model), load_pruned(tmp_path / "model")):
        with pytest.raises(UnsupportedModelError, match=r"num_key_value_heads for every layer.*Use generate"):
            cut.generate_batch(inputs=[[1, 2, 3]])


def test_a_uniform_model_is_an_ordinary_one_once_it_is_loaded(tmp_path):
    """For continuous batching and prefix tuning, which read one number of heads from its config."""
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, [range(s.size // 2) for s in group_sets]))
    save_pruned(model, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    assert loaded.config.num_key_value_heads == 2 and "init_continuous_batching" not in vars(loaded)
    tuned = peft.get_peft_model(loaded, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert torch.isfinite(loss_of(tuned, BATCHES[0]))
