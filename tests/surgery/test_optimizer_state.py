"""Optimizers across a cut: each trains on as on the dense model with the removed groups at zero, or is refused before."""

from __future__ import annotations

import copy
import warnings

import pytest
import pytorch_optimizer
import torch
from optimizer_cases import BUILDERS, step

from conftest import tiny
from lit_prune import PruningConfig, PruningPlan, apply_plan, find_group_sets, get_plan, prune
from lit_prune.errors import OptimizerStateError
from lit_prune.surgery.apply import cut
from lit_prune.surgery.optimizer_search import find_optimizers, states
from lit_prune.surgery.plan_cuts import parameter_cuts
from lit_prune.surgery.state_entries import tensors_in

# their state is no tensor of the parameter's shape, or cannot be told from one that is not: factors of rows and columns
# without the other dimension, preconditioners, projectors, flat vectors, quantised blocks, what is kept by name
REFUSED = {
    "adafactor", "adalite", "adalomo", "adammini", "adamuon", "alice", "came", "conda", "dash", "flashadamw", "galore",
    "kron", "racs", "sara", "scalableshampoo", "shampoo", "soap", "spam", "splus",
}  # fmt: skip
# their step depends on how large a parameter is (means over entries, orthogonalised updates), or draws random numbers of its
# shape, so that a masked dense run does something else
BY_SIZE = {
    "adago", "adahessian", "amos", "avagrad", "bsam", "fadam", "muon", "muonclip", "nero", "normuon", "ranger", "ranger21",
    "rose", "scion", "scionlight", "stableadamw", "torch Adafactor", "torch Muon",
}  # fmt: skip
# einops, several processes, pairs of LoRA's matrices, ten seconds a step
NOT_TRIED = {"demo", "distributedmuon", "lorarite", "spectralsphere"}
# what is normalised by a norm or a sum adds it up in another order
LOOSE = {"adams": 5e-3, "sgdp": 5e-3, "adamp": 2e-3}
AGREE = [name for name in BUILDERS if name not in REFUSED | BY_SIZE | NOT_TRIED]
BATCHES = [torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(5 + k)) for k in range(8)]


def small(layers: int = 1) -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 12, "vocab_size": 32, "max_position_embeddings": 16}
    return tiny("llama", "eager", num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, **sizes)


def plan_of(model: torch.nn.Module) -> PruningPlan:
    group_sets = find_group_sets(model)
    kept = [[0] if s.kind == "attention" else [0, 2, 3, 5, 7, 8, 11] for s in group_sets]
    return PruningPlan.from_kept(group_sets, kept)


def trained(name: str, steps: int = 4, layers: int = 1):
    torch.manual_seed(0)
    model = small(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = BUILDERS[name](model)
        for ids in BATCHES[:steps]:
            step(model, optimizer, ids)
    return model, optimizer


def listed(optimizer):
    return optimizer if isinstance(optimizer, list) else [optimizer]


@torch.no_grad()
def mask(model, optimizer):
    """The oracle: removed weights, and the state for them, at zero; call what is returned after every step."""
    cuts = parameter_cuts(model, plan_of(model), find_group_sets(model))

    def zero(tensor, parameter, of_one):
        for c in of_one:
            if tensor.dim() == parameter.dim() and tensor.shape[c.dim] == parameter.shape[c.dim]:
                tensor.index_fill_(c.dim, c.removed, 0)

    for each in find_optimizers(listed(optimizer)):
        if isinstance(each, torch.optim.LBFGS):
            each.state.clear()
        for _, mapping in states(each):
            for parameter, of_one in ((model.get_parameter(n), c) for n, c in cuts.items()):
                key = id(parameter) if isinstance(next(iter(mapping), None), int) else parameter
                state = mapping.get(key, {})
                for value in [state] if isinstance(state, torch.Tensor) else [f.value for f in tensors_in(state)]:
                    zero(value, parameter, of_one)

    @torch.no_grad()
    def keep_at_zero():
        for name, of_one in cuts.items():
            zero(model.get_parameter(name), model.get_parameter(name), of_one)

    keep_at_zero()
    return keep_at_zero


def shapes_in(optimizer):
    return [
        tuple(f.value.shape)
        for each in find_optimizers(listed(optimizer))
        for _, mapping in states(each)
        for f in tensors_in(mapping)
    ]


@pytest.mark.parametrize("name", AGREE)
def test_training_goes_on_as_on_the_dense_model_with_the_removed_groups_at_zero(name):
    (model, optimizer), (dense, dense_optimizer) = trained(name), trained(name)
    identities = [id(p) for p in model.parameters()]
    apply_plan(model, plan_of(model), listed(optimizer))
    assert [id(p) for p in model.parameters()] == identities
    keep_at_zero = mask(dense, dense_optimizer)
    start = [p.detach().clone() for p in model.parameters()]
    for ids in BATCHES[4:7]:
        torch.manual_seed(int(ids.sum()))
        step(model, optimizer, ids)
        torch.manual_seed(int(ids.sum()))
        step(dense, dense_optimizer, ids)
        keep_at_zero()
    apply_plan(dense, plan_of(dense))
    for (key, found), expected, first in zip(model.named_parameters(), dense.parameters(), start, strict=True):
        moved = (expected - first).norm()
        # TRAC's first steps go back to the start
        assert moved > 0 or name == "TRAC", key
        assert (found - expected).norm() <= LOOSE.get(name, 1e-3) * moved + 1e-7 * first.norm(), key


@pytest.mark.parametrize("name", sorted(BY_SIZE))
def test_training_goes_on_as_with_an_optimizer_built_for_the_smaller_model(name):
    """Its state loaded into an optimizer that was never cut gives the same steps, bit for bit."""
    model, optimizer = trained(name)
    apply_plan(model, plan_of(model), listed(optimizer))
    other = copy.deepcopy(model)
    rebuilt = BUILDERS[name](other)
    for mine, new in zip(listed(optimizer), listed(rebuilt), strict=True):
        new.load_state_dict(copy.deepcopy(mine.state_dict()))
    start = [p.detach().clone() for p in model.parameters()]
    for ids in BATCHES[4:7]:
        torch.manual_seed(1)
        step(model, optimizer, ids)
        torch.manual_seed(1)
        step(other, rebuilt, ids)
    for found, expected, first in zip(model.parameters(), other.parameters(), start, strict=True):
        assert torch.equal(found, expected)
        assert not torch.equal(found, first)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_state_that_no_rule_fits_is_refused_before_any_batch_is_run(name):
    model, optimizer = trained(name)
    before = copy.deepcopy(model.state_dict())
    shapes = shapes_in(optimizer)
    seen = []

    def loss(ids):
        seen.append(ids)
        return model(input_ids=ids, labels=ids).loss

    with pytest.raises(
        OptimizerStateError, match=r"(state .* of 'model\.layers|holds a tensor).*prune before training"
    ):
        prune(model, BATCHES, loss, PruningConfig(importance="fisher", pruning_ratio=0.2), listed(optimizer))
    assert not seen
    assert get_plan(model) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert shapes_in(optimizer) == shapes
    # training goes on dense, and a new optimizer is fine
    step(model, optimizer, BATCHES[4])
    fresh = BUILDERS[name](model)
    apply_plan(model, plan_of(model), listed(fresh) if name not in ("adalomo", "shampoo") else [])


class Unusual(torch.optim.Optimizer):
    """Plain descent that keeps what a test gives it."""

    def __init__(self, parameters, state=lambda p: {}):
        super().__init__(parameters, {"lr": 0.01})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(state(p))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


class Box:
    def __init__(self, value):
        self.value = value


class Subclass(torch.Tensor):
    pass


UNUSUAL = {
    "flat": lambda p: {"flat": p.detach().flatten() if p.dim() > 1 else torch.zeros(3)},
    "nested list": lambda p: {"a": {"b": [torch.zeros(p.shape), torch.zeros(5, 5)]}},
    "tuple": lambda p: {"a": (torch.zeros(7),)},
    "object": lambda p: {"box": Box(torch.zeros(p.shape))},
    "shape": lambda p: {"size": p.shape},
    "preconditioner": lambda p: {"left": torch.eye(len(p))},
    "preconditioners": lambda p: {"both": [torch.eye(n) for n in p.shape]},
    "sparse": lambda p: {"sparse": torch.zeros(p.shape).to_sparse()},
    "subclass": lambda p: {"quantised": torch.zeros(p.shape).as_subclass(Subclass)},
    "view": lambda p: {"part": torch.zeros(2, *p.shape)[0]},
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_state_is_refused_by_name_and_nothing_changes(kind):
    model = small()
    # the square ones alone, too: a matrix that relates rows to rows has their shape
    for parameters in (list(model.parameters()), [model.model.layers[0].self_attn.q_proj.weight]):
        if kind in ("preconditioner",) and len(parameters) == 1:
            continue
        optimizer = Unusual(parameters, UNUSUAL[kind])
        with pytest.raises(OptimizerStateError, match=r"Unusual state '.* of 'model.*"):
            apply_plan(model, plan_of(model), [optimizer])
        assert get_plan(model) is None


def test_tensors_that_an_optimizer_keeps_by_no_parameter_are_refused():
    for name, value in (
        ("flat", lambda m: torch.zeros(sum(p.numel() for p in m.parameters()))),
        ("backup", lambda m: [p.detach().clone() for p in m.parameters()]),
        ("by_name", lambda m: {n: torch.zeros(len(p)) for n, p in m.named_parameters()}),
    ):
        model = small()
        optimizer = Unusual(model.parameters())
        setattr(optimizer, name, value(model))
        with pytest.raises(OptimizerStateError, match=rf"Unusual\.{name} holds a tensor"):
            apply_plan(model, plan_of(model), [optimizer])
        assert get_plan(model) is None


def test_state_in_lists_mappings_and_by_id_is_cut():
    model = small()
    optimizer = Unusual(model.parameters(), lambda p: {"a": {0.9: torch.ones(p.shape)}, "b": [torch.ones(p.shape)]})
    optimizer.by_id = {id(p): torch.ones(p.shape) for p in model.parameters()}
    apply_plan(model, plan_of(model), [optimizer])
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["a"][0.9].shape == state["b"][0].shape == optimizer.by_id[id(p)].shape == p.shape


@pytest.mark.parametrize("kind", ["another copy", "a loss"])
def test_an_optimizer_without_parameters_of_the_model_is_refused_before_any_batch(kind):
    model = small()
    other = small() if kind == "another copy" else torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(OptimizerStateError, match=r"AdamW holds .* none of which is in the LlamaForCausalLM"):
        prune(model, BATCHES, lambda ids: 1 / 0, PruningConfig(pruning_ratio=0.2), [optimizer])
    with pytest.raises(TypeError, match="found a dict"):
        prune(model, BATCHES, lambda ids: 1 / 0, PruningConfig(pruning_ratio=0.2), [{}])
    # one that trains other parameters beside the model's is fine
    mixed = torch.optim.AdamW([*model.parameters(), *torch.nn.Linear(3, 3).parameters()])
    apply_plan(model, plan_of(model), [mixed])


# what they keep of weights, beside gradients: averages, slow or first weights, the last ones
MIRRORS = [
    "Lookahead", "schedulefree AdamW", "schedulefree SGD", "schedulefree RAdam", "schedulefree wrapper", "madgrad", "a2grad",
    "dadaptsgd", "dadaptadagrad", "ranger", "focus", "TRAC",
]  # fmt: skip


@pytest.mark.parametrize("name", [*MIRRORS, "torch SGD", "torch AdamW, fused", "lion", "SAM"])
def test_a_repair_moves_what_mirrors_weights_along(name):
    """With the same gradients, the repaired run stays as far from the other one as the repair moved it: nothing is undone.

    A loss that is linear in the weights has such gradients, and these optimizers move by differences of weights alone.
    """
    runs = []
    for repaired in (False, True):
        model, optimizer = trained(name)
        for each in find_optimizers(listed(optimizer)):
            for group in each.param_groups:
                group.update({k: 0.0 for k in ("weight_decay",) if k in group})
        plan = plan_of(model)
        cuts = parameter_cuts(model, plan, find_group_sets(model))
        generator = torch.Generator().manual_seed(3)
        weights, moved = {}, {}
        for key in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
            stayed = model.get_parameter(key).detach()
            for c in cuts[key]:
                stayed = stayed.index_select(c.dim, c.kept)
            moved[key] = 0.3 * stayed.std() * torch.randn(stayed.shape, generator=generator)
            weights[key] = stayed + moved[key]
        apply_plan(model, plan, listed(optimizer), weights=weights if repaired else None)
        for _ in range(6):
            for p in model.parameters():
                p.grad = 0.1 * torch.randn(p.shape, generator=generator)
            for each in listed(optimizer):
                if name == "SAM":
                    each.first_step(zero_grad=False)
                    each.second_step(zero_grad=False)
                else:
                    each.step()
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for key, value in runs[1].items():
        expected = moved.get(key, torch.zeros(()))
        difference = value - runs[0][key]
        scale = expected.norm() if key in moved else value.norm()
        assert (difference - expected).norm() < 1e-3 * scale, key


def test_an_optimizer_that_computes_weights_from_its_state_is_refused_with_a_repair():
    """FTRL's next step would put the weights back that the repair changed; without a repair it trains on."""
    model, optimizer = trained("ftrl")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptimizerStateError, match=r"FTRL computes the weights anew from state 'z'.*repair=None"):
        prune(model, BATCHES, lambda ids: 1 / 0, PruningConfig(pruning_ratio=0.2), [optimizer])
    key = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(OptimizerStateError, match="FTRL computes the weights anew"):
        apply_plan(model, plan_of(model), [optimizer], weights={key: torch.randn(16, 7)})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    apply_plan(model, plan_of(model), [optimizer])
    step(model, optimizer, BATCHES[0])
    # before its first step it has no state that could be in the way
    model, optimizer = trained("ftrl", steps=0)
    apply_plan(model, plan_of(model), [optimizer], weights={key: torch.randn(16, 7)})


def test_slow_weights_are_the_new_weights_where_they_were_the_old_ones():
    """At a synchronisation of Lookahead slow and fast weights are one, and a dense run with the repair has them so, too."""
    model, optimizer = trained("Lookahead")
    plan, key = plan_of(model), "model.layers.0.mlp.down_proj.weight"
    parameter = model.get_parameter(key)
    assert torch.equal(optimizer.state[parameter]["slow_params"], parameter)
    new = torch.randn(16, 7)
    undo = cut(model, plan, [optimizer], {key: new})
    assert torch.allclose(optimizer.state[parameter]["slow_params"], new, atol=1e-5)
    undo()
    assert torch.equal(optimizer.state[parameter]["slow_params"], parameter)


@pytest.mark.parametrize(
    "name", ["Lookahead", "torch AdamW, fused", "schedulefree SGD", "SAM", "torch Adafactor", "lbfgs", "torch Muon"]
)
def test_undoing_restores_everything_bit_for_bit(name):
    model, optimizer = trained(name)
    everything = find_optimizers(listed(optimizer))

    def snapshot():
        return (
            [(id(p), p.requires_grad, p.detach().clone(), p.grad.clone()) for p in model.parameters()],
            [copy.deepcopy(each.state_dict()["param_groups"] if each.state else None) for each in everything[-1:]],
            [
                [(str(f), id(f.value), f.value.clone()) for p in model.parameters() for f in tensors_in(m.get(p, {}))]
                for each in everything
                for _, m in states(each)
            ],
        )

    before = snapshot()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(True)
    key = "model.layers.0.mlp.down_proj.weight"
    undo = cut(model, plan_of(model), listed(optimizer), {key: torch.randn(16, 7)})
    assert model.get_parameter(key).shape == (16, 7)
    undo()
    after = snapshot()
    assert before[1] == after[1]
    for old, new in zip(
        (*before[0], *(t for m in before[2] for t in m)), (*after[0], *(t for m in after[2] for t in m)), strict=True
    ):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    step(model, optimizer, BATCHES[4])


def test_a_wrapper_of_a_wrapper_is_followed():
    model = small()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = pytorch_optimizer.Lookahead(pytorch_optimizer.OrthoGrad(inner), k=2)
    step(model, outer, BATCHES[0])
    apply_plan(model, plan_of(model), [outer])
    for p in model.parameters():
        assert inner.state[p]["exp_avg"].shape == outer.state[p]["slow_params"].shape == p.shape
    assert len(inner.state) == len(list(model.parameters()))
    step(model, outer, BATCHES[1])
