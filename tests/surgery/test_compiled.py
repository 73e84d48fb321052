"""Compiled models after a cut: compiled again, also after more cuts than the compiler takes sizes."""

from __future__ import annotations

import warnings

import pytest
import torch

from conftest import tiny
from lit_prune import PruningPlan, apply_plan, find_group_sets


class Backend:
    """Counts what is compiled, and leaves it as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def without_last_channel(model):
    """Cut one channel of the first MLP."""
    sets = find_group_sets(model)
    first = next(i for i, s in enumerate(sets) if s.kind == "mlp")
    apply_plan(model, PruningPlan.from_kept(sets, [list(range(s.size - (i == first))) for i, s in enumerate(sets)]))


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_model_is_compiled_again_after_more_cuts_than_the_limit(part):
    model, backend = tiny("llama"), Backend()
    torch.compiler.reset()
    for module in [model] if part == "model" else model.model.layers:
        module.compile(backend=backend)
    ids = torch.arange(8)[None]
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for _ in range(4):
            before = backend.graphs
            compiled = model(ids).logits
            assert backend.graphs > before
            with torch.compiler.set_stance("force_eager"):
                torch.testing.assert_close(compiled, model(ids).logits)
            without_last_channel(model)


@pytest.mark.parametrize(("limit", "warns"), [(2, True), (3, False)])
def test_more_sizes_than_the_compiler_takes_are_warned_of(limit, warns):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    sets = find_group_sets(model)
    widths = iter(range(3))
    kept = [list(range(s.size - (next(widths) if s.kind == "mlp" else 0))) for s in sets]
    with torch._dynamo.config.patch(recompile_limit=limit), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        apply_plan(model, PruningPlan.from_kept(sets, kept))
    texts = [str(w.message) for w in found if "compiled each by itself" in str(w.message)]
    assert len(texts) == warns
    if warns:
        assert "3 modules of the class LlamaDecoderLayer" in texts[0] and "'model.layers.0'" in texts[0]
        assert "have 3 different sizes now; torch.compile takes 2" in texts[0]
