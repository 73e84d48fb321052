"""Low precision: what is summed is float32 or wider, blocks are replayed as they were run, and no answer hangs on rounding."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from convolution_cases import TwoReaders
from torch import nn
from torch.nn import functional

from conftest import SMALL, tiny, uneven_kept
from lit_prune import PruningPlan, find_group_sets
from lit_prune.architectures.tracing import trial
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.precision import Precision, scaled_loss, transposed_product
from lit_prune.ranking.candidates import masked
from lit_prune.ranking.importance import group_importance
from lit_prune.ranking.registry import get_criterion
from lit_prune.repair.calls import copy_to_cut
from lit_prune.repair.passes import Replacements
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import least_squares
from lit_prune.repair.replay import _adds_up, _dense_pass
from lit_prune.repair.streams import _record
from lit_prune.surgery.apply import cut

ROOT = Path(__file__).parents[2]
LOW = [torch.bfloat16, torch.float16]
CRITERIA = [
    "fisher",
    "taylor",
    "taylor_2nd",
    "taylor_batch",
    "second_order",
    "wanda",
    "output_wanda",
    "flap",
    "magnitude",
]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SIZES = {
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
}


def batches(count=3, vocabulary=SMALL["vocab_size"]):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocabulary, (4, 60), generator=generator) for _ in range(count)]


def loss_of(model):
    return lambda batch: model(input_ids=batch, labels=batch, use_cache=False).loss


def convolutions(norm=True):
    """A model of convolutions that is no chain of blocks, its groups, batches and the loss on one."""
    torch.manual_seed(0)
    model = TwoReaders(norm)
    model(torch.randn(64, 2, 8, 8))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(6, 2, 8, 8, generator=generator) for _ in range(3)]

    def loss(batch):
        weight = model.stem.weight
        return functional.cross_entropy(model(batch.to(weight.dtype)).to(weight.dtype), torch.arange(6) % 3)

    return model, model.group_sets(), images, loss


# sums


def constructors_without_dtype(path):
    makers = {"zeros", "ones", "empty", "full", "rand", "randn", "eye", "linspace", "as_tensor"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        function = node.func if isinstance(node, ast.Call) else None
        named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
        made = named and function.value.id == "torch" and function.attr in makers
        if made and not any(keyword.arg == "dtype" for keyword in node.keywords):
            yield f"{path.relative_to(ROOT)}:{node.lineno} torch.{function.attr}"


def test_no_tensor_of_statistics_or_repair_takes_the_default_dtype():
    """Lightning sets it to bfloat16 within a training step."""
    files = [p for part in ("calibration", "repair", "ranking") for p in (ROOT / "lit_prune" / part).rglob("*.py")]
    assert [found for path in files for found in constructors_without_dtype(path)] == []


def importances(model, names=CRITERIA):
    group_sets = find_group_sets(model)
    criteria = {name: get_criterion(name) for name in names}
    terms = [term for criterion in criteria.values() for term in criterion.terms]
    statistics = collect_statistics(model, group_sets, batches(), loss_of(model), terms)
    parameters = dict(model.named_parameters())
    return {n: torch.cat(group_importance(c, parameters, group_sets, statistics)) for n, c in criteria.items()}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe"])
def test_statistics_do_not_depend_on_the_default_dtype_and_are_those_of_float64(family):
    options = {"num_hidden_layers": 2, **SIZES.get(family, {})}
    wanted = importances(tiny(family, **options))
    for dtype in LOW:
        model = tiny(family, **options)
        with default_dtype(dtype):
            found = importances(model)
        for name in CRITERIA:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], wanted[name]), name
    if "moe" in family:
        # torch multiplies groups of experts in no more than float32
        return
    exact = importances(tiny(family, **options).double())
    for name in CRITERIA:
        torch.testing.assert_close(wanted[name].double(), exact[name].double(), rtol=5e-3, atol=1e-9)


def test_statistics_of_channels_do_not_depend_on_the_default_dtype_and_are_those_of_float64():
    names = [n for n in CRITERIA if n != "output_wanda"]
    criteria = {name: get_criterion(name) for name in names}
    terms = [term for criterion in criteria.values() for term in criterion.terms]

    def found(dtype, default):
        model, group_sets, images, loss = convolutions()
        model.to(dtype)
        with default_dtype(default):
            statistics = collect_statistics(model, group_sets, images, loss, terms, activations=True)
            parameters = dict(model.named_parameters())
            return {n: torch.cat(group_importance(c, parameters, group_sets, statistics)) for n, c in criteria.items()}

    wanted, exact = found(torch.float32, torch.float32), found(torch.float64, torch.float32)
    for low in LOW:
        for name, value in found(torch.float32, low).items():
            assert value.dtype == torch.float32 and torch.equal(value, wanted[name]), name
    for name in names:
        torch.testing.assert_close(wanted[name].double(), exact[name].double(), rtol=5e-3, atol=1e-9)


def derivatives_by_hand(model, group_sets, loss, data=None, over=lambda x: x.sum(dim=1)):
    """By consumer, for each batch and sample: the sum over tokens of input times gradient, both as the model has them."""
    taken = {part.module: [] for s in group_sets for part in s.consumers}
    handles = []
    for name, found in taken.items():

        def hook(_, args, found=found):
            # retain_grad in place of a mask; a view, as other layers may read the same tensor
            found.append(args[0].view_as(args[0]))
            found[-1].retain_grad()
            return (found[-1],)

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    for batch in data or batches():
        loss(batch).backward()
    for handle in handles:
        handle.remove()
    return {n: [over(x.double() * x.grad.double()) for x in found] for n, found in taken.items()}


@pytest.mark.parametrize("dtype", LOW)
def test_the_statistics_of_a_model_of_16_bits_are_sums_of_its_values_in_float64(dtype):
    model = tiny("llama", num_hidden_layers=2).to(dtype)
    group_sets = find_group_sets(model)
    loss = loss_of(model)

    def small(batch):
        # as the gradients of long batches are: their products with inputs are below the smallest float16
        return loss(batch) * 1e-3

    by_hand = derivatives_by_hand(model, group_sets, small)
    model.zero_grad()
    criterion = get_criterion("fisher")
    with default_dtype(dtype):
        statistics = collect_statistics(model, group_sets, batches(), small, criterion.terms, activations=True)
    (term,) = criterion.terms
    for group_set in group_sets:
        expected = 0.0
        for part in group_set.consumers:
            expected = torch.cat([d[:, part.index].sum(dim=2) * len(d) for d in by_hand[part.module]]) + expected
        found = statistics.reduced[term, group_set.key, 0]
        torch.testing.assert_close(found.double(), expected.square().mean(dim=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", LOW)
def test_fisher_of_channels_of_16_bits_is_that_of_their_values_in_float64(dtype):
    model, group_sets, images, loss = convolutions(norm=False)
    model.to(dtype)

    def small(batch):
        return loss(batch) * 1e-3

    by_hand = derivatives_by_hand(model, group_sets, small, images, lambda x: x.flatten(2).sum(2) if x.dim() > 2 else x)
    model.zero_grad()
    (term,) = get_criterion("fisher").terms
    with default_dtype(dtype):
        statistics = collect_statistics(model, group_sets, images, small, [term])
    for group_set in group_sets:
        expected = 0.0
        for part in group_set.consumers:
            expected = torch.cat([d[:, part.index].sum(dim=2) * len(d) for d in by_hand[part.module]]) + expected
        found = statistics.reduced[term, group_set.key, 0]
        torch.testing.assert_close(found.double(), expected.square().mean(dim=0), rtol=1e-3, atol=0)


def test_a_variance_survives_a_mean_that_is_a_thousand_times_its_root():
    model = tiny("llama", num_hidden_layers=1, mlp_bias=True)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.bias.fill_(1.0)
        mlp.up_proj.bias.add_(5000.0)
    seen = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    group_sets = find_group_sets(model)
    statistics = collect_statistics(
        model, group_sets, batches(), loss_of(model), get_criterion("flap").terms, activations=True
    )
    handle.remove()
    inputs = torch.cat(seen).double()
    expected = inputs.var(dim=0, unbiased=False)
    assert float((inputs.mean(dim=0).abs() / expected.sqrt()).min()) > 500
    torch.testing.assert_close(
        statistics.activations["model.layers.0.mlp.down_proj"].variance.double(), expected, rtol=1e-6, atol=0
    )


# float16 and the scale of its gradients


def test_fisher_values_do_not_depend_on_the_scale_of_the_loss():
    criterion = get_criterion("fisher")
    for blocks in (False, True):
        model = tiny("llama", num_hidden_layers=2)
        group_sets = find_group_sets(model, blocks=blocks)
        plain = collect_statistics(model, group_sets, batches(), loss_of(model), criterion.terms)
        with scaled_loss(1024.0):
            scaled = collect_statistics(
                model, group_sets, batches(), lambda b: loss_of(model)(b) * 1024.0, criterion.terms
            )
        for key, value in plain.reduced.items():
            torch.testing.assert_close(scaled.reduced[key], value, rtol=1e-4, atol=0)


def test_fisher_values_of_channels_do_not_depend_on_the_scale_of_the_loss():
    model, group_sets, images, loss = convolutions()
    terms = get_criterion("fisher").terms
    plain = collect_statistics(model, group_sets, images, loss, terms)
    with scaled_loss(1024.0):
        scaled = collect_statistics(model, group_sets, images, lambda batch: loss(batch) * 1024.0, terms)
    assert plain.reduced
    for key, value in plain.reduced.items():
        torch.testing.assert_close(scaled.reduced[key], value, rtol=1e-4, atol=0)


# whether a block adds up


def sums(model, wanted_dtype):
    """For every block, whether its output is its input plus what its consumers give."""
    group_sets = find_group_sets(model)
    found = []
    with torch.no_grad(), evaluation_mode(model):
        for stream in _record(model, group_sets, batches(1), loss_of(model)):
            states = stream.inputs
            assert states[0].dtype == wanted_dtype
            for name in stream.blocks:
                paths = [p.module.removeprefix(f"{name}.") for s in group_sets if s.block == name for p in s.repairable]
                following, wanted = _dense_pass(model.get_submodule(name), paths, states, stream, name)
                found.append(_adds_up(states[0], wanted[0], following[0]))
                states = following
    return found


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize(
    ("family", "adds_up"),
    [
        ("llama", True),
        ("qwen2", True),
        ("gpt_neox", True),
        ("opt", True),
        # its consumers give what is multiplied before it is added
        ("granite", False),
        # its consumers give what a norm scales before it is added
        ("gemma2", False),
    ],
)
def test_whether_blocks_add_up_does_not_depend_on_the_precision(family, adds_up, dtype):
    options = {"residual_multiplier": 0.8} if family == "granite" else {}
    model = tiny(family, "eager", num_hidden_layers=3, **options).to(dtype)
    # a massive channel, as deep models have them
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 500.0
    assert sums(model, dtype) == [adds_up] * 3


# autocast


def plan_of(model):
    group_sets = find_group_sets(model)
    return group_sets, PruningPlan.from_kept(group_sets, uneven_kept(group_sets))


def watched(model):
    """Dtypes that the projections of decoder layers gave, and the default dtype that they were called under."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda _, __, y: seen.add((y.dtype, torch.get_default_dtype())))
    return seen


FAMILIES = ["llama", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_replayed_in_the_precision_that_the_loss_is_computed_in(family):
    model = tiny(family, num_hidden_layers=2)
    group_sets, plan = plan_of(model)
    seen = watched(model)

    def loss(batch):
        with default_dtype(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)(batch)

    unexplained_shares(model, group_sets, batches(), loss)
    within = least_squares(model, group_sets, plan, batches(), loss)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert within and all(w.dtype == torch.float32 and w.isfinite().all() for w in within.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_around_all_of_it_changes_no_sum(family):
    """The products that systems are made of stay float32, within the forward of experts, too."""
    model = tiny(family, num_hidden_layers=2)
    group_sets, plan = plan_of(model)

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)(batch)

    inside = least_squares(model, group_sets, plan, batches(), loss)
    shares = unexplained_shares(model, group_sets, batches(), loss)
    with torch.autocast("cpu", torch.bfloat16):
        around = least_squares(model, group_sets, plan, batches(), loss_of(model))
        shares_around = unexplained_shares(model, group_sets, batches(), loss_of(model))
    assert inside.keys() == around.keys() and shares.keys() == shares_around.keys()
    for name, weight in inside.items():
        assert torch.equal(weight, around[name]), name
    for key, share in shares.items():
        assert torch.equal(share, shares_around[key]), key


def test_autocast_around_all_of_it_changes_no_sum_of_layers_in_module_order():
    model, group_sets, images, loss = convolutions()
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    seen = set()
    model.first.register_forward_hook(lambda _, __, y: seen.add((y.dtype, torch.get_default_dtype())))

    def low(batch):
        with default_dtype(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            return loss(batch)

    inside = least_squares(model, group_sets, plan, images, low)
    shares = unexplained_shares(model, group_sets, images, low)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    with default_dtype(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        around = least_squares(model, group_sets, plan, images, loss)
        shares_around = unexplained_shares(model, group_sets, images, loss)
    assert inside and inside.keys() == around.keys()
    for name, weight in inside.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, around[name]), name
    assert shares and shares.keys() == shares_around.keys()
    for key, share in shares.items():
        assert share.dtype == torch.float32 and torch.equal(share, shares_around[key]), key


@contextlib.contextmanager
def cut_and_back(model, group_sets, plan):
    with evaluation_mode(model):
        undo = cut(model, plan)
        try:
            yield
        finally:
            undo()


def replaced(model, group_sets, plan):
    values = Replacements(model)
    values[group_sets[0].consumers[0].parameter].zero_()
    return values.applied()


def masked_in_trial(model, group_sets, plan):
    return trial.masked(model, group_sets[:1], [torch.tensor([0])])


def cut_in_trial(model, group_sets, plan):
    return trial.without(model, group_sets[:1], [torch.tensor([0])])


@pytest.mark.parametrize("change", [masked, replaced, masked_in_trial, cut_in_trial, cut_and_back])
def test_an_autocast_around_all_of_it_sees_changed_weights(change):
    model = tiny("llama", num_hidden_layers=2)
    group_sets, plan = plan_of(model)
    tokens = batches(1)[0]

    def output():
        return model(input_ids=tokens, use_cache=False).logits.detach()

    def uncached():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return output()

    with torch.autocast("cpu", torch.bfloat16):
        dense = output()
        with change(model, group_sets, plan):
            within, expected = output(), uncached()
        after = output()
    assert not torch.equal(expected, dense)
    assert torch.equal(within, expected) and torch.equal(after, dense)


def test_a_precision_is_put_back_after_an_error():
    precision = Precision("cpu", torch.bfloat16, torch.float16)
    with pytest.raises(KeyError), precision.entered():
        assert Precision.current(torch.device("cpu")) == precision
        raise KeyError
    assert Precision.current(torch.device("cpu")) == Precision("cpu", None, torch.float32)


def test_products_are_exact_under_autocast():
    a = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = transposed_product(a, a)
    torch.testing.assert_close(found.double(), a.double().T @ a.double(), rtol=1e-5, atol=1e-5)


# copies


def test_a_copy_to_cut_shares_what_is_not_written_into():
    block = tiny("llama", num_hidden_layers=1).model.layers[0]
    copied = dict(copy_to_cut(block, {"mlp.down_proj.weight"}).named_parameters())
    shared = {n for n, p in block.named_parameters() if copied[n].data_ptr() == p.data_ptr()}
    assert copied.keys() - shared == {"mlp.down_proj.weight"}
    assert all(copied[n] is not p and torch.equal(copied[n], p) for n, p in block.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_writes_nothing_into_the_model(family):
    model = tiny(family, num_hidden_layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    group_sets, plan = plan_of(model)
    assert least_squares(model, group_sets, plan, batches(), loss_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
