"""Predicted times are corrected by trial cuts, on machines that are quiet, noisy, and too noisy to say anything.

The machine is a clock that a forward pass advances by 1 second for every parameter of the decoder layers' projections, times
noise, so that what a cut takes has a closed form; all else is real.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import comb

import numpy as np
import pytest

from conftest import tiny
from lit_prune import Budget, PruningConfig, find_group_sets, make_plan
from lit_prune.budgets.latency_table import LatencyTable, Times, save_tables, setting_of
from lit_prune.budgets.trials import ratio_of_pairs
from lit_prune.budgets.workloads import Workload
from lit_prune.surgery.apply import cut

Noise = Callable[[np.random.Generator], float]
MODULES = {"attention": "self_attn", "mlp": "mlp"}


def quiet(_) -> float:
    return 1.0


def bursts(generator) -> float:
    """A third of all passes are disturbed, and take up to three times as long."""
    return generator.uniform(1, 1.01) if generator.random() > 1 / 3 else generator.uniform(1.3, 3)


def chaos(generator) -> float:
    return generator.lognormal(0, 1.5)


class Machine:
    def __init__(self, model, noise: Noise, seed: int) -> None:
        self.model, self.noise, self.now = model, noise, 0.0
        self.generator = np.random.default_rng(seed)
        model.register_forward_hook(lambda *_: self._advance())

    def seconds(self, module: str = "layers") -> float:
        """What a pass, or the modules of one name, take without noise."""
        return float(sum(p.numel() for n, p in self.model.named_parameters() if "_proj" in n and module in n))

    def _advance(self) -> None:
        self.now += self.seconds() * self.noise(self.generator)

    def __call__(self) -> float:
        return self.now


def pruned(tmp_path, claimed: float, noise: Noise, seed: int = 0, patience: float = 300.0) -> tuple[float, float]:
    """Ask for 1.5x with a table that claims so many times what is saved; the true speedup, and the correction."""
    model = tiny(intermediate_size=96)
    machine, group_sets = Machine(model, noise, seed), find_group_sets(model)
    dense, times = machine.seconds(), []
    for kind, module in MODULES.items():
        sets = [s for s in group_sets if s.kind == kind]
        whole = machine.seconds(module) / len(sets)
        times.append(Times(kind, sets[0].size, tuple(s.name for s in sets), (0, sets[0].size), (claimed * whole, 0.0)))
    path = tmp_path / "times.json"
    save_tables(path, [LatencyTable(setting_of(Workload(model, 1, 16), group_sets, "prefill"), dense, tuple(times))])
    config = PruningConfig(importance="magnitude", budget=Budget(latency="1.5x", latency_table=path, length=16))
    goals = config.goals(model, group_sets)
    assert goals is not None

    def propose():
        _, plan = make_plan(model, group_sets, None, config, goals=goals)
        return plan, plan.info["predicted"]

    goals.correct(model, propose, patience, machine)
    undo = cut(model, propose()[0])
    taken = machine.seconds()
    undo()
    return dense / taken, goals.quantities["latency.prefill"].correction


@pytest.mark.parametrize("claimed", [0.6, 1.0, 1.8])
def test_a_wrong_table_is_corrected(tmp_path, claimed):
    speedup, correction = pruned(tmp_path, claimed, quiet)
    assert speedup == pytest.approx(1.5, rel=0.02)
    assert correction == pytest.approx(1 / claimed, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("claimed", [0.7, 1.0, 1.4])
def test_disturbed_pairs_do_not_lead_astray(tmp_path, claimed, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        speedup, _ = pruned(tmp_path, claimed, bursts, seed)
    assert speedup == pytest.approx(1.5, rel=0.05)


# two pairs of times, which say nothing, and as many as there may be
@pytest.mark.parametrize("patience", [0.0, 300.0])
@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_corrects_nothing_and_is_reported(tmp_path, seed, patience):
    with pytest.warns(UserWarning, match=r"do not confirm .* of latency.prefill, .* to .* over \d+ pairs"):
        speedup, correction = pruned(tmp_path, 1.0, chaos, seed, patience)
    assert correction == pytest.approx(1, rel=0.1) and speedup == pytest.approx(1.5, rel=0.05)


def test_a_correction_is_bounded_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="corrected by a factor of 0.50"):
        _, correction = pruned(tmp_path, 2.5, quiet)
    assert correction == 0.5


@pytest.mark.parametrize("count", [2, 5, 6, 9, 12, 40])
def test_the_interval_of_the_median_is_that_of_the_binomial(count):
    ratio = ratio_of_pairs(list(np.random.default_rng(0).permutation(count) + 1.0))
    assert ratio.median == (count + 1) / 2 and ratio.low - 1 == count - ratio.high

    def held(place: float) -> float:
        return 1 - 2 * sum(comb(count, k) for k in range(int(place))) / 2**count

    assert held(ratio.low) >= 0.95 > held(ratio.low + 1) or (count < 6 and ratio.low == 1)
