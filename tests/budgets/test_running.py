"""Which modules are being called, whatever fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_prune.budgets.running import running_modules

pytestmark = pytest.mark.core


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("no")


def test_the_list_follows_the_calls_and_those_that_fail():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()), Fails())
    seen = []
    handles = [
        model[1][0].register_forward_pre_hook(lambda *_: seen.append(list(running))),
        model[1][0].register_forward_hook(lambda *_: seen.append(list(running))),
    ]
    with running_modules(model) as running:
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                model(torch.ones(1, 2))
            assert running == []
    assert seen == [["", "1"], ["", "1", "1.0"]] * 2
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
