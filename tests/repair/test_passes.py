"""Passes over the same batches: what ends early, and that nobody notices but the clock."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn

from lit_prune.calibration.statistics import SKIPPED
from lit_prune.repair.passes import Passes


class Setting:
    """Three layers; a batch runs them as often as it says, with noise before and random numbers drawn behind them."""

    def __init__(self, stops):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        self.calls = Counter()
        for name, module in self.model.named_children():
            module.register_forward_hook(lambda *_, name=name: self.calls.update([name]))
        self.passes = Passes(self.model, lambda: contextlib.nullcontext((range(4), self.forward)), None, stops=stops)

    def forward(self, batch):
        for _ in range(1 + batch % 2):
            self.model(torch.randn(3, 4))
        # a loss with noise of its own
        torch.rand(batch + 1)
        return SKIPPED if batch == 2 else torch.zeros(())

    def run(self, names):
        found = []
        self.passes.run(
            names, lambda call: call.output, lambda taken: found.append({n: list(v) for n, v in taken.items()})
        )
        return found


@pytest.mark.parametrize("names", [["0"], ["1"], ["0", "1"], ["2"]])
def test_a_pass_ends_behind_the_last_layer_that_it_is_for(names):
    early, whole = Setting(True), Setting(False)
    for setting in (early, whole):
        setting.run(["0", "1", "2"])
        # the batch that is skipped is run to its end, as only there it says so
        assert setting.calls == {"0": 6, "1": 6, "2": 6}
        setting.calls.clear()
    found, expected = early.run(names), whole.run(names)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    last = int(names[-1])
    # in the batch with two calls the first one goes on to the next
    assert early.calls == {str(n): 6 if n <= last else 3 for n in range(3)}
    assert whole.calls == {"0": 6, "1": 6, "2": 6}


def test_layers_that_the_first_pass_did_not_watch_are_run_to_the_end():
    setting = Setting(True)
    setting.run(["0"])
    setting.calls.clear()
    assert [len(batch["1"]) for batch in setting.run(["0", "1"])] == [1, 2, 2]
    assert setting.calls == {"0": 6, "1": 6, "2": 6}
