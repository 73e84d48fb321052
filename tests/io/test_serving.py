"""Pruned models with layers of different widths leave PyTorch: torch.export and ONNX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_export import pruned
from torch import nn

from lit_prune import load_pruned, save_pruned


class Logits(nn.Module):
    """A model as one function of token ids."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Logits(load_pruned(save_pruned(pruned("llama"), tmp_path_factory.mktemp("model") / "model"))).eval()


@pytest.fixture(scope="module")
def program(model):
    ids = torch.randint(0, 64, (2, 12))
    shapes = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=64)}}
    with torch.no_grad():
        return torch.export.export(model, (ids,), dynamic_shapes=shapes)


def other(length):
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [12, 7])
def test_an_exported_program_is_saved_and_gives_the_same(tmp_path, model, program, length):
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(other(length)), model(other(length)))


@pytest.mark.parametrize("length", [12, 7])
def test_onnx_runtime_gives_the_same(tmp_path, model, program, length):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, f=str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": other(length).numpy().astype(np.int64)})
    np.testing.assert_allclose(found, model(other(length)).detach().numpy(), rtol=1e-4, atol=1e-4)
