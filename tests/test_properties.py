"""Whatever is given as an argument or as a plan: it works, or ends in an error of ours before any batch is run."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import tiny
from lit_prune import Limits, PlanError, PruningConfig, PruningError, PruningPlan, apply_plan, find_group_sets
from lit_prune.callbacks import (
    CubicSchedule,
    Distillation,
    LearningRateRewarmup,
    LoRARecovery,
    PruningReport,
    Stage,
    StructuredPruning,
)
from lit_prune.pipeline import prune

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 12),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from([10**30, -(2**63), 2**63, 5e-324, 1e308]),
)
SCALARS = NUMBERS.map(np.asarray).filter(lambda a: a.dtype != object) | st.floats(-2, 2, width=32).map(torch.tensor)
WORDS = st.sampled_from(
    [
        "taylor",
        "auto",
        "default",
        "mean",
        "all",
        "prunable",
        "bias",
        "mlp",
        "block",
        "attention",
        "(",
        "epoch",
        "\0",
        "float32",
    ]
)
TEXTS = st.text(max_size=5) | WORDS
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
OBJECTS = st.sampled_from(
    [object(), b"x", 1j, {1}, Stage(0.1, epoch=1), Limits(), torch.empty(2, device="meta"), int, lambda: 1]
)
JUNK = (
    JSON | SCALARS | OBJECTS | st.lists(SCALARS | OBJECTS, max_size=2) | st.builds(tuple, st.lists(PLAIN, max_size=2))
)

TAKEN = {
    PruningConfig: {},
    Limits: {},
    Stage: {"ratio": 0.1, "epoch": 1},
    CubicSchedule: {"start": 0, "end": 5, "stages": 3},
    StructuredPruning: {},
    PruningReport: {},
    LearningRateRewarmup: {},
    Distillation: {},
    LoRARecovery: {},
}


@contextlib.contextmanager
def refusals() -> Iterator[list[Exception]]:
    """Collect the error if it is one of ours, in a sentence; anything else passes and fails the test."""
    refused: list[Exception] = []
    try:
        yield refused
    except PruningError as error:
        refused.append(error)
    assert all(len(str(error)) > 10 and "\n" not in str(error) for error in refused)


@pytest.mark.parametrize("make", list(TAKEN), ids=lambda c: c.__name__)
@BOUNDED
@given(data=st.data())
def test_any_arguments_are_taken_or_refused(make, data):
    names = [n for n in inspect.signature(make).parameters if n != "self"]
    given_names = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    options = {**TAKEN[make], **{name: data.draw(JUNK, label=name) for name in given_names}}
    with refusals():
        for value in vars(make(**options)).values():
            assert not isinstance(value, (np.generic, torch.Tensor))


@BOUNDED
@given(data=st.data())
def test_any_configuration_that_is_taken_prunes_or_is_refused_before_a_batch_is_run(data):
    numbers = st.floats(0, 1, exclude_min=True, exclude_max=True) | st.sampled_from([5e-324, 0.999999])
    limits = {
        "min_groups": st.integers(0, 2**31 - 1),
        "min_fraction": st.floats(0, 1),
        "protect": st.lists(st.integers(-4, 4) | st.sampled_from(["mlp", "layers.1", "", ".*", "x"]), max_size=2),
        "multiple_of": st.none()
        | st.dictionaries(st.sampled_from(["mlp", "attention", "x"]), st.integers(1, 2**31 - 1)),
        "kinds": st.none() | st.lists(st.sampled_from(["mlp", "attention", "block", "x"]), min_size=1),
        "uniform": st.booleans(),
    }
    options = {
        "pruning_ratio": numbers,
        "ratio_of": st.sampled_from(["all", "prunable"]),
        "normalize": st.sampled_from(["default", "mean", "kind", "standard", None]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "iterations": st.integers(1, 3),
        "reference": st.none() | st.tuples(st.integers(0, 10**5), st.integers(0, 10**5)),
    }
    chosen = {
        name: data.draw(s)
        for name, s in data.draw(
            st.fixed_dictionaries({}, optional={k: st.just(v) for k, v in options.items()})
        ).items()
    }
    kept = {
        name: data.draw(s)
        for name, s in data.draw(st.fixed_dictionaries({}, optional={k: st.just(v) for k, v in limits.items()})).items()
    }
    config = PruningConfig("random", repair=None, limits=Limits(**kept), **chosen)
    model, run = tiny(), []

    def loss(batch):
        run.append(batch)
        return model(input_ids=batch, labels=batch).loss

    before = sum(p.numel() for p in model.parameters())
    with refusals() as refused:
        _, plan = prune(model, [torch.zeros(1, 4, dtype=torch.long)], loss, config)
    if refused:
        assert not run
        assert sum(p.numel() for p in model.parameters()) == before
        return
    assert plan.info["parameters_after"] == sum(p.numel() for p in model.parameters()) < before


def good_plan() -> dict:
    """A plan that takes something of every group set, and the last block."""
    sets = find_group_sets(tiny(), blocks=True)
    kept = [[] if s.key == ("model.layers.2", "block") else list(range(s.size - (s.kind != "block"))) for s in sets]
    return PruningPlan.from_kept(sets, kept, {"importance": "random"}).to_dict()


GOOD = json.dumps(good_plan())


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, content in inner:
        yield from places(content, (*path, key))


PLACES = list(places(json.loads(GOOD)))


def mutated(data):
    """The good plan with a few of its values replaced, removed or doubled."""
    plan = json.loads(GOOD)
    for path in data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        if not path:
            plan = data.draw(JSON)
            continue
        owner = plan
        try:
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue
        how = data.draw(st.sampled_from(["replace", "remove", "double"]))
        if isinstance(owner, str):
            continue
        if how == "remove":
            del owner[path[-1]]
        elif how == "double" and isinstance(owner, list):
            owner.append(owner[path[-1]])
        else:
            owner[path[-1]] = data.draw(JSON)
    return plan


def check_plan(plan_of):
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with refusals() as refused:
        plan = plan_of()
        apply_plan(model, plan)
    if refused:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    # what was cut still runs
    model(torch.zeros(1, 4, dtype=torch.long))


@BOUNDED
@given(data=st.data())
def test_any_plan_is_applied_or_refused(data):
    content = mutated(data)
    check_plan(lambda: PruningPlan.from_dict(content))


@BOUNDED
@given(data=st.data())
def test_any_plan_file_is_applied_or_refused(tmp_path, data):
    content = data.draw(
        st.binary(max_size=30)
        | JSON.map(lambda j: json.dumps(j).encode())
        | st.builds(lambda n: GOOD.encode()[:n], st.integers(0, len(GOOD)))
        | st.integers(1, 10**5).map(lambda n: b"[" * n)
        | st.just(None).map(lambda _: json.dumps(mutated(data)).encode())
    )
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    check_plan(lambda: PruningPlan.load(file))


def test_what_is_no_file_is_no_plan(tmp_path):
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "absent" / "plan.json"):
        with pytest.raises((PlanError, OSError)):
            PruningPlan.load(path)
