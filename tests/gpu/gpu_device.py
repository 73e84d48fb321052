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


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or ON_CPU), reason="needs a GPU"),
]

DEVICE = torch.device("cpu" if ON_CPU else "cuda")
