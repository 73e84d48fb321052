"""The engine on one GPU: products in 16 bits, streams, memory, attention kernels, compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_device import DEVICE, needs_gpu

from conftest import SMALL, tiny
from lit_prune import PruningConfig, find_group_sets, get_plan, prune
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.gram import Gram, add_product, multiplies_into_float32
from lit_prune.calibration.random_state import random_state_kept
from lit_prune.ranking.registry import get_criterion
from lit_prune.repair.regression import ridge, unexplained_share

pytestmark = needs_gpu


@pytest.fixture
def device():
    return DEVICE


def batches(device, count=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, SMALL["vocab_size"], (4, 16), generator=generator).to(device) for _ in range(count)]


def loss_of(model):
    return lambda ids: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_have_sums_in_float32(device, dtype):
    assert multiplies_into_float32(device, dtype) == (device.type == "cuda")
    x = torch.randn(5000, 1500, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    y = torch.randn(5000, 30, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    gram, cross = Gram(1500, device, torch.float32), torch.zeros(30, 1500, device=device)
    gram.add(x)
    add_product(cross, y, x)
    expected, expected_cross = x.double().T @ x.double(), y.double().T @ x.double()
    scale = expected.diagonal().max()
    assert float((gram.matrix - expected).abs().max() / scale) < 1e-5
    assert float((cross - expected_cross).abs().max() / scale) < 1e-5


def test_solves_are_those_of_the_cpu(device):
    x = torch.randn(900, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(20, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram, cross, index = x.T @ x, w @ (x.T @ x) + 1.0, torch.arange(300).view(100, 3)
    torch.testing.assert_close(
        ridge(gram.to(device), cross.to(device), w.to(device), 0.1).cpu(),
        ridge(gram, cross, w, 0.1),
        rtol=1e-8,
        atol=1e-10,
    )
    share = unexplained_share(gram.to(device), w.to(device), index, 0.1).cpu()
    torch.testing.assert_close(share, unexplained_share(gram, w, index, 0.1), rtol=1e-5, atol=1e-6)


def test_a_solve_takes_one_matrix_beside_the_gram(device):
    if device.type != "cuda":
        pytest.skip("counts the allocator of CUDA")
    width = 6000
    gram, cross = torch.eye(width, device=device) * 3, torch.ones(64, width, device=device)
    ridge(gram[:64, :64], cross[:, :64], cross[:, :64])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ridge(gram, cross, cross)
    # a matrix in float64 and the workspace of the library
    assert torch.cuda.max_memory_allocated() - before < 2 * 8 * width * width


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_that_are_copied_to_the_cpu_are_those_that_stay(device, offload):
    """Pinned memory, and copies that another stream makes while the device computes on."""
    model = tiny("llama").to(device)
    sets, terms = find_group_sets(model), get_criterion("taylor").terms
    expected = collect_statistics(model, sets, batches(device), loss_of(model), terms, mode="streaming")
    found = collect_statistics(
        model, sets, batches(device), loss_of(model), terms, mode="streaming", offload_gradients=offload
    )
    assert expected.reduced.keys() == found.reduced.keys()
    for key, value in expected.reduced.items():
        torch.testing.assert_close(found.reduced[key].cpu(), value.cpu(), rtol=1e-4, atol=1e-7)


def test_work_on_a_stream_of_the_user_is_waited_for(device):
    if device.type != "cuda":
        pytest.skip("a CPU has no streams")
    model, stream = tiny("llama").to(device), torch.cuda.Stream()
    other = copy.deepcopy(model)
    config = PruningConfig("fisher", 0.2)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        prune(model, batches(device), loss_of(model), config)
    torch.cuda.synchronize()
    prune(other, batches(device), loss_of(other), config)
    assert get_plan(model).digest() == get_plan(other).digest()


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_kernels(device, kernel, dtype):
    """Flash attention takes 16 bits alone: a layer that is replayed in float32 would fail."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type == "cpu" and kernel == "EFFICIENT_ATTENTION":
        pytest.skip("not on a CPU")
    model = tiny("llama", hidden_size=128, head_dim=16).to(device, dtype)
    before = sum(p.numel() for p in model.parameters())
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        prune(model, batches(device), loss_of(model), PruningConfig("fisher", 0.2))
        assert bool(model(batches(device)[0]).logits.isfinite().all())
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_are_replayed_under_autocast_in_its_dtype(device, dtype):
    model = tiny("llama").to(device)
    seen = set()

    def loss(ids):
        with torch.autocast(device.type, dtype=dtype):
            return model(input_ids=ids, labels=ids).loss

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(lambda _, __, y: seen.add(y.dtype))
    prune(model, batches(device), loss, PruningConfig("fisher", 0.2))
    assert seen == {dtype}


def test_random_numbers_of_the_device_go_on_after_an_error(device):
    torch.manual_seed(3)
    torch.rand(4, device=device)
    expected_state = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), random_state_kept():
        torch.rand(4, device=device)
        raise ZeroDivisionError
    state = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(state, expected_state)


def test_a_compiled_model_is_compiled_again(device):
    model = tiny("llama").to(device)
    model.compile()
    ids = batches(device)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    prune(model, batches(device), loss_of(model), PruningConfig("fisher", 0.2))
    compiled = model(ids).logits
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(compiled, model(ids).logits, rtol=1e-3, atol=1e-3)
