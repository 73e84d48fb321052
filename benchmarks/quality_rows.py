"""The rows of benchmarks/quality.py: ways to prune a language model, ours and other people's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peers import causal_loss, flap, torch_pruning, wanda_sp
from peers_modegpt import modegpt
from peers_slicegpt import slicegpt
from peers_uniform import minitron, osscar
from quality_data import PRECISIONS, computing
from torch import Tensor, nn

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, prune, repair
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.statistics import Statistics
from lit_prune.groups import count_parameters
from lit_prune.ranking.candidates import masked_loss
from lit_prune.ranking.registry import get_criterion
from lit_prune.ranking.selection import Limits

ANY_WIDTH = Limits(multiple_of={})
# one cut by one criterion, so that criteria alone are compared
CRITERIA: dict[str, dict[str, Any]] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "wanda, as the seed writes it": {"importance": "wanda", "normalize": None},
    "wanda": {"importance": "wanda"},
    "output_wanda": {"importance": "output_wanda"},
    "taylor": {"importance": "taylor"},
    "taylor_2nd": {"importance": "taylor_2nd"},
    "taylor_batch": {"importance": "taylor_batch"},
    "second_order": {"importance": "second_order"},
    "fisher": {"importance": "fisher"},
    "taylor_batch + output_wanda": {"importance": {"taylor_batch": 0.75, "output_wanda": 0.25}},
    "fisher + output_wanda": {"importance": {"fisher": 0.75, "output_wanda": 0.25}},
    "auto": {"importance": "auto"},
    **{
        f"fisher, widths at multiples of {n}": {"importance": "fisher", "limits": Limits(multiple_of={"mlp": n})}
        for n in (8, 32, 128)
    },
}
# the whole way, with what differs from the defaults
WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"quality": "best"},
    "fast": {"quality": "fast"},
    "default, any width": {"limits": ANY_WIDTH},
    "default, four iterations": {"iterations": 4},
    "one iteration": {"iterations": 1},
    "one iteration, no compensation": {"iterations": 1, "compensation": False},
    "one iteration, uniform widths": {"iterations": 1, "limits": Limits(uniform=True)},
    "one iteration, blocks too": {"iterations": 1, "limits": Limits(kinds=("attention", "mlp", "block"))},
    "one iteration, whole blocks alone": {"iterations": 1, "limits": Limits(kinds=("block",))},
}
Peer = Callable[[nn.Module, Sequence[Tensor], float, int], nn.Module]
# our implementations of the papers, but for torch-pruning, which is the package
PEERS: dict[str, Peer] = {
    "torch-pruning 1.6.1, Taylor": lambda m, b, ratio, size: torch_pruning(m, b, size, "taylor"),
    "torch-pruning 1.6.1, magnitude": lambda m, b, ratio, size: torch_pruning(m, b, size, "magnitude"),
    "FLAP": lambda m, b, ratio, size: flap(m, b, ratio),
    "FLAP, our repair": lambda m, b, ratio, size: flap(m, b, ratio, repair="least_squares"),
    "Wanda-sp, heads rounded down": lambda m, b, ratio, size: wanda_sp(m, b, causal_loss, size, heads_up=False),
    "Wanda-sp, heads rounded up": lambda m, b, ratio, size: wanda_sp(m, b, causal_loss, size, heads_up=True),
    "Minitron's importance, heads rounded down": lambda m, b, ratio, size: minitron(m, b, size, heads_up=False),
    "Minitron's importance, heads rounded up": lambda m, b, ratio, size: minitron(m, b, size, heads_up=True),
    "OSSCAR, heads rounded down": lambda m, b, ratio, size: osscar(m, b, size, heads_up=False),
    "OSSCAR, heads rounded up": lambda m, b, ratio, size: osscar(m, b, size, heads_up=True),
    "MoDeGPT, same share a layer": lambda m, b, ratio, size: modegpt(m, b, size, temperature=None),
    "MoDeGPT, temperature 0.1": lambda m, b, ratio, size: modegpt(m, b, size, temperature=0.1),
    "MoDeGPT, temperature 0.3": lambda m, b, ratio, size: modegpt(m, b, size, temperature=0.3),
    "SliceGPT, as stored": lambda m, b, ratio, size: slicegpt(m, b, size, tied=False),
    "SliceGPT, embeddings and head counted once": lambda m, b, ratio, size: slicegpt(m, b, size, tied=True),
}
# these only take inputs of layers, so that sequences may be stacked
FORWARD_ONLY = ("Minitron", "OSSCAR", "MoDeGPT", "SliceGPT")
STACK = 4


class Setting:
    """The model, one choice of calibration sequences, and the precision that ours are calibrated in."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], seed: int, precision: str = PRECISIONS[0]) -> None:
        self.model, self.batches, self.seed, self.precision = model, batches, seed, precision
        # the same sequences, for what does not depend on the size of the batches: faster
        self.stacked = list(torch.cat(list(batches)).split(STACK))
        self.group_sets = find_group_sets(model)
        self.parameters = count_parameters(model)
        self._statistics: Statistics | None = None

    def loss(self, batch: Tensor) -> Tensor:
        return self._loss_of(self.model, batch)

    def _loss_of(self, model: nn.Module, batch: Tensor) -> Tensor:
        with computing(self.precision):
            return model(input_ids=batch, labels=batch, use_cache=False).loss

    def _hidden(self, batch: Tensor) -> Tensor:
        base: Any = self.model.base_model
        with computing(self.precision):
            return base(input_ids=batch, use_cache=False)

    def statistics(self, rows: Sequence[str]) -> Statistics:
        """What all criteria of some rows need, from one pass over the calibration sequences."""
        if self._statistics is None:
            candidates = [
                PruningConfig(**CRITERIA[row]).candidates for row in rows if row in CRITERIA and row != "auto"
            ]
            names = sorted({name for c in candidates for weights in c.values() for name in weights})
            terms = [t for n in names for t in get_criterion(n).terms]
            self._statistics = collect_statistics(
                self.model, self.group_sets, self.batches, self.loss, terms, activations=True
            )
        return self._statistics

    def pruned(self, row: str, ratio: float, kind: str, rows: Sequence[str]) -> tuple[nn.Module, str]:
        """A pruned copy of the model, and what was chosen for it."""
        if row in PEERS:
            batches = self.stacked if row.startswith(FORWARD_ONLY) else self.batches
            return PEERS[row](self.model, batches, ratio, int((1 - ratio) * self.parameters)), row
        if row in WHOLE:
            model = copy.deepcopy(self.model)
            config = PruningConfig(**WHOLE[row], pruning_ratio=ratio)
            _, plan = prune(model, self.stacked, lambda b: self._loss_of(model, b), config)
            return model, plan.info["importance"]
        alone = {"iterations": 1, "compensation": False, "limits": ANY_WIDTH}
        config = PruningConfig(
            **{**alone, **CRITERIA[row]},
            pruning_ratio=ratio,
            repair=None if kind == "none" else kind,
            seed=self.seed,
        )
        shared = row != "auto"
        own = (
            self.statistics(rows) if shared else calibrate(self.model, self.group_sets, self.batches, self.loss, config)
        )
        _, plan = make_plan(
            self.model,
            self.group_sets,
            own,
            config,
            measure=lambda p: masked_loss(self.model, self.group_sets, p, self.batches, self.loss, config.holds_back),
        )
        plan, weights = repair(self.model, self.group_sets, plan, own, self.stacked, self._hidden, config)
        model = copy.deepcopy(self.model)
        apply_plan(model, plan, weights=weights)
        return model, plan.info["importance"]
