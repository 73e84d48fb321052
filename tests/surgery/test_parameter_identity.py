"""Parameters stay the objects that they are: hooks, lists, ties and whatever else holds them follow a cut."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from conftest import tiny, uneven_kept, zeroed
from lit_prune import PruningConfig, PruningPlan, apply_plan, find_group_sets, get_plan, prune
from lit_prune.errors import OptimizerStateError, ReferenceHeldError, UnsupportedModelError
from lit_prune.surgery.apply import cut

GATE = "model.layers.0.mlp.gate_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def plan_of(model: nn.Module) -> PruningPlan:
    group_sets = find_group_sets(model)
    return PruningPlan.from_kept(group_sets, uneven_kept(group_sets))


def backward(model: nn.Module, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_parameters_stay_the_objects_that_they_are(tokens):
    """A penalty over a list that was made before the cut is that of the dense model with the removed groups at zero."""
    model = tiny("qwen2", tie_word_embeddings=True)
    held = list(model.parameters())
    group_sets = find_group_sets(model)
    oracle = zeroed(model, uneven_kept(group_sets))
    backward(model, tokens)
    apply_plan(model, plan_of(model))
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert model.get_parameter(GATE).grad is None
    model.zero_grad()
    penalty = sum(p.square().sum() for p in held)
    assert torch.allclose(penalty, sum(p.square().sum() for p in oracle.parameters()))
    penalty.backward()
    assert all(torch.equal(p.grad, 2 * p) for p in held)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hooks_stay_and_see_the_smaller_gradients(tokens):
    """A frozen part stays frozen by its hook; a doubled gradient is doubled; also where a graph's node is still alive."""
    model = tiny("llama")
    gate, down = model.get_parameter(GATE), model.get_parameter(DOWN)
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    seen = []
    gate.register_hook(lambda g: torch.zeros_like(g))
    handle = down.register_hook(lambda g: seen.append(tuple(g.shape)))
    down.register_post_accumulate_grad_hook(lambda p: seen.append(("after", tuple(p.grad.shape))))
    backward(model, tokens)
    apply_plan(model, plan_of(model))
    plain = copy.deepcopy(model)
    seen.clear()
    model.zero_grad()
    backward(model, tokens)
    backward(plain, tokens)
    assert seen == [tuple(down.shape), ("after", tuple(down.shape))]
    assert down.shape != (32, 24)
    assert not gate.grad.any()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.shape == p.shape
        if name != GATE:
            assert torch.equal(p.grad, q.grad), name
    handle.remove()
    backward(model, tokens)
    assert len(seen) == 3
    assert len(nodes) == len(list(model.parameters()))


def test_undoing_restores_values_gradients_flags_and_hooks(tokens):
    model = tiny("qwen2")
    seen = []
    model.get_parameter(GATE).register_hook(lambda g: seen.append(tuple(g.shape)))
    backward(model, tokens)
    model.get_parameter(DOWN).requires_grad_(False)

    def snapshot():
        return [(id(p), p.requires_grad, p.detach().clone(), p.grad.clone()) for p in model.parameters()]

    before, logits = snapshot(), model(tokens).logits
    undo = cut(model, plan_of(model))
    assert model.get_parameter(GATE).shape[0] < 24
    undo()
    for old, new in zip(before, snapshot(), strict=True):
        assert old[:2] == new[:2]
        assert torch.equal(old[2], new[2])
        assert torch.equal(old[3], new[3])
    assert torch.equal(model(tokens).logits, logits)
    seen.clear()
    backward(model, tokens)
    assert seen == [(24, 32)]


class Masking:
    def __init__(self, mask):
        self.mask = mask

    def __call__(self, gradient):
        return gradient * self.mask

    def masked(self, gradient):
        return gradient * self.mask


def closure_over(mask):
    return lambda gradient: gradient * mask


HOLDING = {
    "closure": closure_over,
    "partial": lambda mask: functools.partial(torch.mul, mask),
    "object": Masking,
    "method": lambda mask: Masking(mask).masked,
    "list": lambda mask: closure_over_list([mask]),
    "default": lambda mask: default(mask),
}


def closure_over_list(masks):
    return lambda gradient: gradient * masks[0]


def default(value):
    def hook(gradient, mask=value):
        return gradient * mask

    return hook


@pytest.mark.parametrize("shape", [(24, 32), (24, 1)], ids=["whole", "rows"])
@pytest.mark.parametrize("kind", HOLDING)
def test_a_hook_that_holds_a_tensor_of_the_old_size_is_refused_by_name_before_any_batch(kind, shape, batches):
    model = tiny("llama")
    mask = torch.ones(shape)
    handle = model.get_parameter(GATE).register_hook(HOLDING[kind](mask))
    with pytest.raises(ReferenceHeldError, match=rf"hook of the parameter '{GATE}'.*shape \({shape[0]}, {shape[1]}\)"):
        prune(model, batches, lambda ids: 1 / 0, PruningConfig(pruning_ratio=0.2))
    assert get_plan(model) is None
    handle.remove()
    # of a size that does not depend on the groups, or of a parameter that no plan cuts
    model.get_parameter(GATE).register_hook(HOLDING[kind](torch.ones(1, 32)))
    model.model.norm.weight.register_hook(HOLDING[kind](torch.ones(32)))
    apply_plan(model, plan_of(model))
    backward(model, batches[0])


@pytest.mark.parametrize("importance", ["taylor", "fisher", "wanda"])
def test_hooks_are_not_called_in_calibration_and_are_back_after_it(importance, batches, loss_of):
    """One that steps within the backward pass, as GaLore's and the tutorial's do, would change the weights."""
    model, plain = tiny("llama"), tiny("llama")
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}
    called = []

    def step(parameter):
        called.append(parameter)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in model.parameters():
        p.register_hook(lambda gradient: gradient * 1.0)
        p.register_post_accumulate_grad_hook(step)
    config = PruningConfig(importance=importance, pruning_ratio=0.2, iterations=1)
    backward(model, batches[0])
    weights = copy.deepcopy(model.state_dict())
    plain.load_state_dict(weights)
    called.clear()
    _, plan = prune(model, batches, loss_of(model), config)
    assert not called
    assert plan == prune(plain, batches, loss_of(plain), config)[1]
    # every parameter is trained again, with the momentum that is left of before
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, batches[1])
    assert {id(p) for p in called} == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), name
        assert optimizers[p].state[p]["momentum_buffer"].shape == p.shape


def test_optimizers_that_modules_hold_are_cut_along(batches, loss_of):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny("llama")
            self.optimizers = {p: torch.optim.AdamW([p]) for p in self.lm.parameters()}

    whole = Whole()
    backward(whole.lm, batches[0])
    for optimizer in whole.optimizers.values():
        optimizer.step()
    # a new bias would be in none of them
    with pytest.raises(OptimizerStateError, match="repair='bias' gives layers new biases"):
        prune(whole, batches, lambda ids: 1 / 0, PruningConfig(pruning_ratio=0.2, repair="bias"))
    prune(whole, batches, loss_of(whole.lm), PruningConfig(pruning_ratio=0.2, iterations=1))
    for p, optimizer in whole.optimizers.items():
        assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_a_weight_that_a_module_beside_the_model_uses_is_refused(batches):
    whole = nn.ModuleDict({"lm": tiny("llama"), "head": nn.Linear(32, 24, bias=False)})
    whole["head"].weight = whole["lm"].get_parameter(GATE)
    with pytest.raises(UnsupportedModelError, match=rf"'{GATE}' shares its values with 'weight' of head"):
        prune(whole, batches, lambda ids: 1 / 0, PruningConfig(pruning_ratio=0.2))
    with pytest.raises(ReferenceHeldError, match=rf"'{GATE}' of the model is tied to 'head.weight'"):
        apply_plan(whole, plan_of(whole["lm"]))
    # what no plan cuts may be tied: embeddings
    whole["head"].weight = whole["lm"].model.embed_tokens.weight
    apply_plan(whole, plan_of(whole["lm"]))
    assert whole["head"].weight is whole["lm"].model.embed_tokens.weight
