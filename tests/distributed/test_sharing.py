"""Solves shared out over two processes: the same results as one process has, each process doing a part."""

from __future__ import annotations

import os

import pytest
import torch
from processes import run_well
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from conftest import SMALL, tiny
from lit_prune import PruningConfig, find_group_sets, prune
from lit_prune.distributed.ranks import Ranks
from lit_prune.distributed.shards import held_bytes
from lit_prune.distributed.sharing import Turns, own_part, shared_work
from lit_prune.errors import UnsupportedStrategyError
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.regression import ridge, unexplained_share
from lit_prune.repairing import gradient_bytes


def system(width=40, outputs=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, width, generator=generator)
    y = torch.randn(300, outputs, generator=generator)
    return x.T @ x, y.T @ x, torch.randn(outputs, width, generator=generator)


def in_two_processes() -> None:
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    ranks, rank = Ranks(torch.device("cpu")), torch.distributed.get_rank()
    gram, cross, prior = system()
    alone = ridge(gram, cross, prior, 0.1)
    with shared_work(ranks):
        assert own_part(7) == (range(4), range(4, 7))[rank] and own_part(1) == (range(1), range(1, 1))[rank]
        for number in (7, 1, 2):
            found = ridge(gram, cross[:number], prior[:number], 0.1)
            torch.testing.assert_close(found, alone[:number], rtol=1e-6, atol=1e-7)
            assert len({tuple(f.flatten().tolist()) for f in ranks.gather(found)}) == 1
        # what one process alone finds out of range is kept by both
        broken = cross.clone()
        broken[6] = torch.inf
        assert torch.equal(ridge(gram, broken, prior, 0.1), prior)
        # and nothing here is left to wait for
        assert ranks.all()

        index = torch.arange(40).view(20, 2)
        asked: list[int] = []

        def compute(number: int) -> torch.Tensor:
            asked.append(number)
            return unexplained_share(gram, prior, index, 0.1 * (number + 1))

        turns = Turns()
        for number in range(5):
            turns.add(number, len(index), lambda number=number: compute(number))
        shares = turns.results()
        assert asked == ([0, 2, 4], [1, 3])[rank] and list(shares) == list(range(5))
    for number, share in shares.items():
        assert torch.equal(share, unexplained_share(gram, prior, index, 0.1 * (number + 1)))

    model = tiny("llama")
    sets, ids = find_group_sets(model), torch.arange(64).view(4, 16)
    whole = unexplained_shares(model, sets, [ids], model)
    with shared_work(ranks):
        halves = unexplained_shares(model, sets, [ids[2 * rank : 2 * rank + 2]], model, all_reduce=ranks.sum)
    assert halves.keys() == whole.keys()
    for key, share in whole.items():
        torch.testing.assert_close(halves[key], share, rtol=1e-4, atol=1e-5)


def memory_in_two_processes() -> None:
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    model = tiny("llama")
    whole = held_bytes(model.parameters())
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    outside = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("model.layers."))
    parts = {n: p for n, p in model.named_parameters() if n.startswith("model.layers.")}
    assert (
        held_bytes(parts.values()) == (whole - outside) // 2
        and held_bytes(model.parameters()) == (whole + outside) // 2
    )
    # what a limit in terms of the gradients is taken from
    assert gradient_bytes(model) == (whole + outside) // 2
    model.requires_grad_(False)
    parts["model.layers.0.mlp.up_proj.weight"].requires_grad_()
    assert gradient_bytes(model) == 4 * SMALL["hidden_size"] * SMALL["intermediate_size"] // 2


def test_memory_is_counted_by_what_a_process_holds(tmp_path):
    run_well(memory_in_two_processes, folder=tmp_path, processes=2)


def test_two_processes_share_solves_out(tmp_path):
    run_well(in_two_processes, folder=tmp_path, processes=2)


def test_one_process_does_all_of_the_work():
    assert own_part(7) == range(7) and own_part(0) == range(0)
    turns = Turns()
    for number in range(3):
        turns.add(number, 2, lambda number=number: torch.full((2,), float(number)))
    assert [v.tolist() for v in turns.results().values()] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert Turns().results() == {}


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("units", ["layers", "layers.1", "model"])
def test_parameters_that_fsdp_keeps_in_cpu_memory_are_refused_before_any_work(one_process, units):
    model = tiny("llama")
    mesh, policy = init_device_mesh("cpu", (1,)), CPUOffloadPolicy(pin_memory=False)
    layers = model.model.layers
    chosen = {"layers": list(layers), "layers.1": [layers[1]], "model": [model]}[units]
    for module in chosen:
        fully_shard(module, mesh=mesh, offload_policy=policy)
    before = {name: p.shape for name, p in model.named_parameters()}
    called = []
    with pytest.raises(UnsupportedStrategyError, match=r"CPU memory \(CPUOffloadPolicy\).*without offload_policy"):
        prune(model, [torch.zeros(1, 4, dtype=torch.long)], called.append, PruningConfig(pruning_ratio=0.2))
    assert not called and before == {name: p.shape for name, p in model.named_parameters()}
