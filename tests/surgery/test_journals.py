"""What is kept to undo a cut: the removed parts, in CPU memory, and no second copy of what stayed."""

from __future__ import annotations

import weakref

import pytest
import torch

from conftest import tiny, uneven_kept
from lit_prune import PruningPlan, find_group_sets
from lit_prune.surgery.apply import cut
from lit_prune.surgery.plan_cuts import parameter_cuts
from lit_prune.surgery.tensors import DimensionCut, UndoCut, cut_tensor, move_to_cpu, set_data

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("repaired", [False, True])
def test_the_journals_of_two_cuts_hold_nothing_of_the_cut_before(repaired, device):
    layer = torch.nn.Linear(64, 64, bias=False, device=device)
    before = layer.weight.detach().clone()
    undos, stale = [], []
    for size in (64, 48):
        cuts = [DimensionCut(1, torch.arange(size - 16), torch.arange(size - 16, size))]
        stayed, removed = cut_tensor(layer.weight.data, cuts)
        undo = UndoCut(layer.weight, cuts, stayed, removed, replaced=repaired)
        stale.append(weakref.ref(stayed))
        set_data(layer.weight, stayed + 1 if repaired else stayed)
        undo.settle()
        undos.append(undo)
        del stayed, removed
    # on a CPU the values that a repair replaces are there already
    alive = [tensor() is not None for tensor in stale]
    assert alive == [repaired and device == "cpu"] * 2
    for undo in reversed(undos):
        undo()
        undo()
    assert torch.equal(layer.weight, before) and layer.weight.device.type == device


def test_values_come_back_bit_for_bit_after_two_cuts_and_training_in_between():
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    undos = []
    for _ in range(2):
        group_sets = find_group_sets(model)
        plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
        weights = {}
        for name, cuts in parameter_cuts(model, plan, group_sets).items():
            if "down_proj" in name:
                stayed, _ = cut_tensor(model.get_parameter(name).data, cuts)
                weights[name] = stayed + torch.randn(stayed.shape, generator=generator)
        undos.append(cut(model, plan, (), weights))
    for undo in reversed(undos):
        undo()
        undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_leave_move_to_cpu_memory_and_back(device):
    tensors = [torch.nn.Parameter(torch.ones(8, 8, device=device)), torch.ones(3)]
    back = move_to_cpu(tensors)
    assert [t.device.type for t in tensors] == ["cpu", "cpu"]
    back()
    assert [t.device.type for t in tensors] == [device, "cpu"]
    assert all(bool((t == 1).all()) for t in tensors)


def test_a_model_without_values_can_be_cut_and_put_back():
    with torch.device("meta"):
        model = tiny("llama")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    group_sets = find_group_sets(model)
    undo = cut(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    assert {name: p.shape for name, p in model.named_parameters()} != shapes
    undo()
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
