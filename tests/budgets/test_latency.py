"""Tables of measured times: what they hold, where they are kept, and plans made from them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_quantities import Convolutions

from conftest import tiny
from lit_prune import Budget, BudgetError, PruningConfig, find_group_sets, get_plan, prune, trace
from lit_prune.budgets.flops import flops_model
from lit_prune.budgets.latency import latency_table, measure_table
from lit_prune.budgets.latency_model import LatencyModel
from lit_prune.budgets.latency_table import (
    LatencyTable,
    Times,
    cache_file,
    find_table,
    load_tables,
    save_tables,
    setting_of,
)
from lit_prune.budgets.workloads import Workload
from lit_prune.errors import ArgumentValueError, PruningError


def linear_table(model, group_sets, phase="prefill", length=32, *, share=0.8, multiple=1) -> LatencyTable:
    """A table of another machine, on which sets take ``share`` of 1 second together, and each in proportion to its groups."""
    times = []
    for kind, size in dict.fromkeys((s.kind, s.size) for s in group_sets):
        names = tuple(s.name for s in group_sets if (s.kind, s.size) == (kind, size))
        step = multiple if kind == "mlp" else 1
        times.append(Times(kind, size, names, (0, size), (share / len(group_sets), 0.0), step))
    setting = {**setting_of(Workload(model, 1, length), group_sets, phase), "device": "another machine"}
    return LatencyTable(setting, 1.0, tuple(times))


def loss_of(model):
    return lambda batch: model(input_ids=batch, labels=batch).loss


BATCHES = list(torch.randint(0, 64, (3, 2, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_measuring_leaves_the_model_bit_for_bit(phase):
    model = tiny(attention_dropout=0.5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    next(model.parameters()).grad = gradient = torch.ones_like(next(model.parameters()))
    state = torch.get_rng_state()
    group_sets = find_group_sets(model)
    table = measure_table(Workload(model, 2, 16), group_sets, phase, patience=0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert next(model.parameters()).grad is gradient and not model.training
    assert torch.equal(torch.get_rng_state(), state) and get_plan(model) is None
    assert [s.key for s in find_group_sets(model)] == [s.key for s in group_sets]
    assert table.seconds > 0 and {t.kind for t in table.times} == {"attention", "mlp"}
    for times in table.times:
        assert times.kept[-1] == times.size and times.saved[-1] == 0 and len(times.sets) == 3
        # fewer groups never take longer, whatever was measured
        assert all(a >= b for a, b in zip(times.saved, times.saved[1:], strict=False))


def test_blocks_are_measured_where_they_may_leave():
    model = tiny()
    table = measure_table(Workload(model, 1, 16), find_group_sets(model, blocks=True), "prefill", patience=0)
    (block,) = (t for t in table.times if t.kind == "block")
    # a block of three takes much, and less than all
    assert 0.05 * table.seconds < block.saved[0] < 0.6 * table.seconds


def test_times_are_interpolated_and_extrapolated():
    times = Times("mlp", 100, ("a",), (25, 50, 100), (6.0, 4.0, 0.0))
    assert times.at(np.array([100, 75, 50, 40, 25, 0])) == pytest.approx([0, 2, 4, 4.8, 6, 8])


def test_tables_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_PRUNE_CACHE", str(tmp_path))
    model = tiny()
    group_sets = find_group_sets(model)
    table = linear_table(model, group_sets)
    file = cache_file(setting_of(Workload(model, 1, 32), group_sets, "prefill"))
    file.parent.mkdir(parents=True)
    save_tables(file, [table])
    assert latency_table(Workload(model, 1, 32), group_sets, "prefill") == table
    others = [
        setting_of(Workload(model, 1, 32), group_sets, "decode"),
        setting_of(Workload(model, 2, 32), group_sets, "prefill"),
        setting_of(Workload(tiny(intermediate_size=32), 1, 32), group_sets, "prefill"),
        setting_of(Workload(model.double(), 1, 32), group_sets, "prefill"),
    ]
    model.float().set_attn_implementation("eager")
    others.append(setting_of(Workload(model, 1, 32), group_sets, "prefill"))
    model.set_attn_implementation("sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others.append(setting_of(Workload(model, 1, 32), group_sets, "prefill"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others.append(setting_of(Workload(model, 1, 32), group_sets, "prefill"))
    torch.set_num_threads(threads)
    assert len({file, *map(cache_file, others)}) == 1 + len(others)


def example_of(run):
    return lambda: contextlib.nullcontext(run)


def test_times_of_a_model_without_token_ids_are_of_its_inputs(tmp_path, monkeypatch):
    """Sizes, batches, data types, and what parts of a model are called with where its own forward is not."""
    monkeypatch.setenv("LIT_PRUNE_CACHE", str(tmp_path))
    model = Convolutions().eval()
    trace(model, [torch.randn(2, 3, 12, 12)], lambda batch: model(batch).square().mean())
    group_sets = find_group_sets(model)

    def settings(*shape: int):
        images = torch.randn(*shape)
        runs = (
            lambda: model(images),
            lambda: model(x=images),
            lambda: model.second(model.depthwise(model.first(images))),
        )
        return [setting_of(Workload(model, 1, 32, example_of(run)), group_sets, "prefill") for run in runs]

    def autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(torch.randn(2, 3, 12, 12))

    found = [settings(*shape) for shape in ((2, 3, 12, 12), (2, 3, 96, 96), (4, 3, 12, 12))]
    # the parts of a pass see more than the whole of it
    files = [{cache_file(setting) for setting in same} for same in found]
    assert [len(same) for same in files] == [2, 2, 2] and len(set.union(*files)) == 6
    assert [cache_file(s) for s in settings(2, 3, 12, 12)] == [cache_file(s) for s in found[0]]
    cast = setting_of(Workload(model, 1, 32, example_of(autocast)), group_sets, "prefill")
    assert cast["autocast"] == "bfloat16" and cast["digest"] == found[0][0]["digest"]

    small, large = (LatencyTable(same[0], seconds, ()) for same, seconds in zip(found, (1.0, 2.0), strict=False))
    for table in (small, large):
        cache_file(table.setting).parent.mkdir(parents=True, exist_ok=True)
        save_tables(cache_file(table.setting), [table])
    for table, size in ((small, 12), (large, 96)):
        images = torch.randn(2, 3, size, size)
        workload = Workload(model, 1, 32, example_of(lambda images=images: model(images)))
        assert latency_table(workload, group_sets, "prefill") == table
    path = tmp_path / "times.json"
    save_tables(path, [small])
    assert find_table(str(path), small.setting) == small
    with pytest.raises(ArgumentValueError, match="for a model of these shapes it holds"):
        find_table(str(path), large.setting)


def test_tables_of_other_models_and_settings_are_refused(tmp_path):
    model, path = tiny(), tmp_path / "times.json"
    group_sets = find_group_sets(model)
    save_tables(path, [linear_table(model, group_sets)])
    assert find_table(str(path), setting_of(Workload(model, 1, 32), group_sets, "prefill")) == load_tables(path)[0]
    with pytest.raises(ArgumentValueError, match="'length': 32"):
        find_table(str(path), setting_of(Workload(model, 1, 64), group_sets, "prefill"))
    other = tiny(intermediate_size=32)
    with pytest.raises(ArgumentValueError, match="none of its tables"):
        find_table(str(path), setting_of(Workload(other, 1, 32), find_group_sets(other), "prefill"))
    for broken in ("", "[]", "{}", json.dumps({**json.loads(path.read_text()), "tables": [{}]})):
        path.write_text(broken)
        with pytest.raises(PruningError, match="no file of latency tables"):
            load_tables(path)
    with pytest.raises(FileNotFoundError):
        PruningConfig(budget=Budget(latency=0.8, latency_table=tmp_path / "none", length=32)).goals(model, group_sets)


def test_a_table_serves_the_model_in_other_data_types_with_and_without_blocks(tmp_path):
    """Each of the four is found in a file of its own for all that it has times of, and in a file of all where it fits best."""
    tables, wanted = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype)
        for blocks in (False, True):
            group_sets = find_group_sets(model, blocks=blocks)
            tables[dtype, blocks] = linear_table(model, group_sets)
            wanted[dtype, blocks] = (model, group_sets)
    for (_, blocks), table in tables.items():
        path = tmp_path / "times.json"
        save_tables(path, [table])
        budget = Budget(latency="1.3x", latency_table=path, length=32)
        for (_, needs_blocks), (model, group_sets) in wanted.items():
            if needs_blocks and not blocks:
                with pytest.raises(ArgumentValueError, match=r"no times of .*blocks=True"):
                    PruningConfig(budget=budget).goals(model, group_sets)
            else:
                goals = PruningConfig(budget=budget).goals(model, group_sets)
                assert goals.dense == {"latency.prefill": 1.0}
    path = tmp_path / "all.json"
    save_tables(path, list(tables.values()))
    for (dtype, blocks), (model, group_sets) in wanted.items():
        found = find_table(str(path), setting_of(Workload(model, 1, 32), group_sets, "prefill"))
        assert found.setting["dtype"] == str(dtype).removeprefix("torch.")
        assert found.setting["blocks"] or not blocks


@pytest.mark.parametrize("blocks", [False, True])
def test_one_machine_prunes_for_another(tmp_path, blocks):
    """The times of the other machine are linear, so that the time of the cut model has a closed form."""
    model, path = tiny(), tmp_path / "times.json"
    group_sets = find_group_sets(model, blocks=blocks)
    save_tables(path, [linear_table(model, group_sets, multiple=4)])
    budget = Budget(latency="1.3x", memory=0.9, latency_table=path, length=32)
    config = PruningConfig(budget=budget, limits=_limits(blocks), importance="magnitude")
    table, plan = prune(model, BATCHES, loss_of(model), config)
    gone = {e.key: 1 - len(e.kept) / e.size for e in plan.group_entries}
    each = 0.8 / len(group_sets)
    removed = plan.removed_blocks
    inside = sum(share for (name, _), share in gone.items() if not any(name.startswith(f"{b}.") for b in removed))
    (latency,) = (row for row in plan.info["budgets"] if row["name"] == "latency.prefill")
    assert latency["predicted"] == pytest.approx(1 - each * (inside + len(removed)))
    assert latency["predicted"] <= latency["target"] == pytest.approx(1 / 1.3)
    # the times are of another machine
    assert "measured" not in latency
    assert all(len(e.kept) % 4 == 0 for e in plan.group_entries if e.kind == "mlp")
    assert set(table.trade_offs) == {"latency.prefill", "memory"}


def _limits(blocks):
    from lit_prune import Limits

    return Limits(kinds=("attention", "mlp", "block") if blocks else None, min_fraction=0.2)


def test_savings_of_shared_weights_do_not_add_up():
    """Time in proportion to FLOPs, channels that every layer gives and the next reads: predicted as the FLOPs are."""
    model, images = Convolutions().eval(), torch.randn(2, 3, 12, 12)
    trace(model, [images], lambda batch: model(batch).square().mean())
    group_sets = find_group_sets(model)
    flops = flops_model(Workload(model, 1, 1, lambda: contextlib.nullcontext(lambda: model(images))), group_sets)
    sizes = np.array([s.size for s in group_sets])
    dense, rate = flops.value(sizes), flops.saved(sizes)
    times = tuple(
        Times(s.kind, s.size, (s.name,), (0, s.size), (r * s.size / dense, 0.0))
        for s, r in zip(group_sets, rate, strict=True)
    )
    predicted = LatencyModel(LatencyTable({}, 1.0, times), group_sets, flops)
    for fraction in (0.75, 0.5):
        kept = (sizes * fraction).astype(int)
        assert predicted.value(kept) == pytest.approx(flops.value(kept) / dense, abs=0.01)
        added = 1 - (rate * (sizes - kept)).sum() / dense
        assert added < flops.value(kept) / dense - 0.03


def test_a_budget_that_cannot_be_met_is_refused_before_any_batch_is_read(tmp_path):
    model, path = tiny(), tmp_path / "times.json"
    save_tables(path, [linear_table(model, find_group_sets(model))])
    read = []

    class Batches(list):
        def __iter__(self):
            read.append(True)
            return super().__iter__()

    budget = Budget(latency="4x", memory=0.9, latency_table=path, length=32)
    with pytest.raises(BudgetError, match=r"latency.prefill is .* the floors allow .*What binds is latency.prefill,"):
        prune(model, Batches(BATCHES), loss_of(model), PruningConfig(budget=budget))
    assert not read


def test_the_cache_is_under_the_home_of_the_user(monkeypatch):
    monkeypatch.delenv("LIT_PRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_file({"phase": "prefill"}).is_relative_to(Path("/somewhere/lit_prune/latency"))
