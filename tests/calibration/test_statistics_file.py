"""Statistics written to a file make the same plans in another process, and are refused for another model."""

from __future__ import annotations

import struct

import pytest
import torch

from conftest import tiny
from lit_prune import (
    PruningConfig,
    Statistics,
    calibrate,
    find_group_sets,
    make_plan,
    plan_ratios,
    register_criterion,
    unexplained_shares,
)
from lit_prune.errors import ArgumentError, BudgetError, CalibrationError, PlanError, PruningError

CRITERIA = ["fisher", "taylor_2nd", "taylor", "wanda", "flap", "output_wanda", "auto", "magnitude"]


def collected(model, batches, loss_of, config):
    sets = find_group_sets(model)
    statistics = calibrate(model, sets, batches, loss_of(model), config)
    if config.compensates:
        statistics.unexplained = unexplained_shares(model, sets, batches, loss_of(model))
    return sets, statistics


@pytest.mark.parametrize("importance", CRITERIA)
def test_the_same_plan_from_the_file(importance, batches, loss_of, tmp_path):
    config = PruningConfig(importance, iterations=1)
    model = tiny()
    sets, statistics = collected(model, batches, loss_of, config)
    statistics.save(tmp_path / "s.safetensors", model, sets)
    again = tiny()
    loaded = Statistics.load(tmp_path / "s.safetensors", again, find_group_sets(again), config.terms)
    assert (loaded.batches, loaded.skipped, loaded.loss) == (statistics.batches, 0, statistics.loss)
    measure = (lambda plan: float(plan.info["parameters_after"])) if importance == "auto" else None
    expected, plan = make_plan(model, sets, statistics, config, measure=measure)
    table, same = make_plan(again, find_group_sets(again), loaded, config, measure=measure)
    assert same.digest() == plan.digest() and (table.importance == expected.importance).all()
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_criterion_of_the_users_own_is_found_by_its_code(batches, loss_of, tmp_path):
    register_criterion("own", lambda w, g: (w * g).abs() * 2, "gradient")
    register_criterion("other", lambda w, g: (w * g).abs() * 3, "absolute_gradient")
    model = tiny()
    config = PruningConfig("other", repair=None)
    sets, statistics = collected(model, batches, loss_of, config)
    statistics.save(tmp_path / "s", model, sets)
    loaded = Statistics.load(tmp_path / "s", model, sets, config.terms)
    assert loaded.reduced.keys() == statistics.reduced.keys() and loaded.reduced
    with pytest.raises(CalibrationError, match="which the importance needs"):
        Statistics.load(tmp_path / "s", model, sets, PruningConfig("own").terms)
    with pytest.raises(CalibrationError, match="mask_gradient"):
        Statistics.load(tmp_path / "s", model, sets, PruningConfig("fisher").terms)
    with pytest.raises(CalibrationError, match="activation_mean_abs"):
        Statistics.load(tmp_path / "s", model, sets, PruningConfig("wanda").terms)


def test_another_model_and_other_weights_are_refused(batches, loss_of, tmp_path):
    config = PruningConfig("fisher", compensation=False)
    model = tiny()
    sets, statistics = collected(model, batches, loss_of, config)
    file = tmp_path / "s.safetensors"
    statistics.save(file, model, sets)
    for other, words in (
        (tiny(num_hidden_layers=2), "of 6 group sets; the model has 4"),
        (tiny(intermediate_size=20), "of 24 groups 'mlp'.*the model has 20"),
        (tiny(hidden_size=64, head_dim=4), r"of shape \[\d+, 32\]; the model's has"),
    ):
        with pytest.raises(PlanError, match=words):
            Statistics.load(file, other, find_group_sets(other), config.terms)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(PlanError, match=r"up_proj.weight' had other values"):
        Statistics.load(file, model, sets, config.terms)


def test_the_same_weights_in_bfloat16_are_taken(batches, loss_of, tmp_path):
    config = PruningConfig("fisher", compensation=False)
    model = tiny()
    sets, statistics = collected(model, batches, loss_of, config)
    statistics.save(tmp_path / "s", model, sets)
    Statistics.load(tmp_path / "s", tiny().bfloat16(), sets, config.terms)


def test_files_that_hold_no_statistics(batches, loss_of, tmp_path):
    from safetensors.torch import save_file

    model, terms = tiny(), PruningConfig("fisher").terms
    sets, statistics = collected(model, batches, loss_of, PruningConfig("fisher"))
    statistics.save(tmp_path / "good", model, sets)
    content = (tmp_path / "good").read_bytes()
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("nothing of the kind")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(content[: len(content) - 7])
    # the name of a list that the header holds is another one, of the same length
    (tmp_path / "renamed").write_bytes(content.replace(b"unexplained", b"unexplaimed"))
    length = struct.unpack("<Q", content[:8])[0]
    (tmp_path / "header").write_bytes(struct.pack("<Q", length + 2**40) + content[8:])
    for name, words in {
        "other": "holds no statistics of lit_prune",
        "text": "is damaged",
        "empty": "is damaged",
        "short": "is damaged",
        "renamed": "is damaged",
        "header": "is damaged",
    }.items():
        with pytest.raises(PruningError, match=words):
            Statistics.load(tmp_path / name, model, sets, terms)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Statistics.load(tmp_path / "absent", model, sets, terms)
    with pytest.raises(ArgumentError, match="path must be"):
        statistics.save("", model, sets)


def test_several_ratios_are_nested_and_are_what_a_single_cut_would_be(batches, loss_of):
    model = tiny()
    config = PruningConfig("fisher", pruning_ratio=0.9)
    sets, statistics = collected(model, batches, loss_of, config)
    asked: list[int] = []

    def measure(plan):
        asked.append(plan.info["parameters_after"])
        return float(len(asked))

    made = plan_ratios(model, sets, statistics, config, [0.3, 0.1, 0.2, 0.1], measure=measure)
    assert [m.ratio for m in made] == [0.1, 0.2, 0.3] and [m.loss for m in made] == [1.0, 2.0, 3.0]
    assert asked == [m.parameters for m in made] == sorted(asked, reverse=True)
    assert 0 < made[0].importance_removed < made[1].importance_removed < made[2].importance_removed < 1
    for each in made:
        single = PruningConfig("fisher", pruning_ratio=each.ratio, iterations=1)
        assert each.plan.digest() == make_plan(model, sets, statistics, single)[1].digest()
    with pytest.raises(ArgumentError, match="ratios must be"):
        plan_ratios(model, sets, statistics, config, [0.1, 2])
    with pytest.raises(ArgumentError, match="ratios must be"):
        plan_ratios(model, sets, statistics, config, [])
    asked.clear()
    with pytest.raises(BudgetError):
        plan_ratios(model, sets, statistics, config, [0.1, 0.99], measure=measure)
    assert not asked
