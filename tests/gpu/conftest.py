"""The device of the tests of this folder: a GPU; with ``LIT_PRUNE_GPU_TESTS=cpu`` their code runs on a CPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import lit_prune

# from a checkout that is not installed
if importlib.util.find_spec("lit_prune.callbacks") is None:
    lit_prune.__path__.append(str(Path(__file__).resolve().parent.parent.parent))

ON_CPU = os.environ.get("LIT_PRUNE_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not (torch.cuda.is_available() or ON_CPU):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device():
    return torch.device("cpu" if ON_CPU else "cuda")
