"""A model with a smaller hidden size, heads and MLPs uneven beside it, runs in unmodified llama.cpp."""

from __future__ import annotations

import pytest
from hidden_cases import some
from test_gguf_export import SIZES, byte_level, check

from conftest import tiny, uneven_kept
from lit_prune import PruningPlan, apply_plan, find_group_sets
from lit_prune.io.gguf import save_gguf

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")


@pytest.mark.parametrize(("name", "mixed"), [("llama", True), ("qwen2", False)])
def test_hidden_size_in_llama_cpp(name, mixed, tmp_path):
    model = tiny(name, **SIZES)
    sets = find_group_sets(model, hidden=True)
    others = uneven_kept(sets[1:]) if mixed else [range(s.size) for s in sets[1:]]
    apply_plan(model, PruningPlan.from_kept(sets, [some(64, 40), *map(list, others)]))
    assert model.config.hidden_size == 40
    path = save_gguf(model, tmp_path / "m.gguf", byte_level(), dtype="f32", pre_tokenizer="gpt-2")
    check(model, path)
