"""Calibration data of the command line: sequences that the model has positions for."""

from __future__ import annotations

import pytest
import torch
from architecture_cases import CASES

from lit_prune.calibration_input import Calibration, _check_tokens
from lit_prune.errors import ArgumentValueError

pytestmark = pytest.mark.core
# of 64 positions RoBERTa's begin behind that of padding
POSITIONS = {"RoBERTa, token classification": 63, "XLM-RoBERTa": 63, "OPT": 64, "Llama": 64}


@pytest.mark.parametrize(("name", "most"), POSITIONS.items())
def test_sequences_are_as_long_as_the_positions_reach(name, most):
    model = next(c for c in CASES if c.name == name).build()
    options = Calibration(text="data.txt", block_size=most + 1)
    _check_tokens(model, torch.ones(1, most, dtype=torch.long), options)
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 5))
    with pytest.raises(ArgumentValueError, match=f"sequences of {most + 1} tokens, and the model has {most} positions"):
        _check_tokens(model, torch.ones(1, most + 1, dtype=torch.long), options)
