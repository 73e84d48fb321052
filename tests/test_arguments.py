"""Every argument is checked by its type and range where it is given, and all errors have one form."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lit_prune import Limits, PruningConfig, prune
from lit_prune.arguments import COUNT, FLAG, PATH, RATIO, plain, shown
from lit_prune.calibration_input import Calibration
from lit_prune.callbacks import (
    CubicSchedule,
    Distillation,
    LearningRateRewarmup,
    LoRARecovery,
    PruningReport,
    Stage,
    StructuredPruning,
)
from lit_prune.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, PruningError
from lit_prune.training import CausalLMModule, TextDataModule
from lit_prune.training.classification import LabelledTextDataModule, TextClassifierModule

NAN, INF = float("nan"), float("inf")
STAGE = Stage(0.1, epoch=1)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


# what no argument of a kind may be, and the kind's words
INTEGERS = [
    True,
    2.5,
    2.0,
    "2",
    None,
    [2],
    NAN,
    1j,
    np.bool_(True),
    np.float64(2.0),
    torch.tensor([2, 2]),
    Unprintable(),
]
NUMBERS = [
    True,
    "0.2",
    [0.2],
    NAN,
    INF,
    -INF,
    1j,
    torch.tensor([0.2, 0.2]),
    np.bool_(False),
    torch.empty(1, device="meta"),
]
FLAGS = ["yes", "no", 0, 1, None, 0.0, [], torch.tensor(1), np.int64(1)]
TEXTS = [5, "", ["a"], b"a", True]
PATHS = [5, "", "a\0b", b"a", ["a"], True]
LISTS = ["mlp", 5, {"mlp": 1}, [None], [1.5], [True], b"x", (x for x in [1])]


def cases():
    config = [
        ("importance", [None, 5, {}, [], "tailor", {"taylor": INF}, {"taylor": NAN}, {"taylor": None}, {"taylor": 0}]),
        (
            "importance",
            [{"taylor": -1.0}, {"taylor": "1"}, {"taylor": True}, {5: 1.0}, {"tailor": 1.0}, {"taylor": 1e300}],
        ),
        ("pruning_ratio", [*NUMBERS, None, 0, 1, -0.1, 2]),
        ("ratio_of", [None, 5, "most", ["all"]]),
        ("normalize", [5, "max", ["mean"], True]),
        ("statistics", [None, "lazy", 5]),
        ("gradient_dtype", [None, "float16", torch.float32]),
        ("offload_gradients", FLAGS),
        ("offload_hidden_states", [flag for flag in FLAGS if flag is not None]),
        ("repair", ["glue", 5, True, ["bias"]]),
        ("seed", [*INTEGERS, "a", 2**64]),
        ("compensation", FLAGS),
        ("iterations", [*(n for n in INTEGERS if n is not None), 0, -1, 10**30]),
    ]
    limits = [
        ("min_groups", [*INTEGERS, -1, 1.5, 10**30]),
        ("min_fraction", [*NUMBERS, None, -0.1, 1.1]),
        ("protect", [*LISTS, None, ["("], ["*"], [10**30]]),
        ("kinds", [*LISTS, [], [5], [""]]),
        ("uniform", FLAGS),
    ]
    for make, table in (
        (
            PruningConfig,
            [*config, ("limits", [None, {}, 5, Limits]), ("reference", [5, (1,), (1, 2, 3), (1, -1), "ab"])],
        ),
        (Limits, [*limits, ("multiple_of", [5, 2.5, "mlp", {"mlp": 2.5}, {"mlp": 0}, {5: 2}, {"mlp": True}, ["mlp"]])]),
        (StructuredPruning, [*config, *limits]),
        (
            StructuredPruning,
            [
                ("epoch", [1.5, "1", True, -1, NAN, [1]]),
                ("step", [1.5, "1", True, -1, INF, [1]]),
                ("schedule", ["cubic", 5, [], [5], [STAGE, None], {"a": STAGE}, STAGE, [Stage(0.2, epoch=1), STAGE]]),
                ("calibration_batches", [*INTEGERS, 0, -1]),
                ("calibration_dataloader", [5, iter([1]), (x for x in [1]), True]),
                ("mlp_multiple_of", [2.5, 0, "8", True, -8, [8]]),
                ("model_path", TEXTS),
                ("dry_run", FLAGS),
                ("validate", FLAGS),
                ("output_dir", PATHS),
            ],
        ),
        (
            lambda **options: Stage(**{"ratio": 0.1, **options}),
            [("ratio", [*NUMBERS, None, 0, 1]), ("epoch", [1.5, "1", -1, True])],
        ),
        (
            lambda **options: CubicSchedule(**{"start": 0, "end": 9, "stages": 3, **options}),
            [
                ("start", [*INTEGERS, -1]),
                ("end", [*INTEGERS, -1]),
                ("stages", [*INTEGERS, 1, 10**9]),
                ("unit", ["hour", None, 5]),
            ],
        ),
        (LearningRateRewarmup, [("steps", [*INTEGERS, 0, -1]), ("start_factor", [*NUMBERS, None, -0.1, 1.1])]),
        (
            Distillation,
            [
                ("weight", [*NUMBERS, None, 0, 1.1]),
                ("temperature", [*NUMBERS, None, 0, -1]),
                ("hidden_weight", [*NUMBERS, None, -1]),
                ("teacher", TEXTS),
                ("directory", PATHS),
                ("dtype", ["float8", "foo", 5, "int64", ["float32"]]),
            ],
        ),
        (
            LoRARecovery,
            [
                ("r", [*INTEGERS, 0, -1]),
                ("alpha", [*NUMBERS, None, 0, -1]),
                ("dropout", [*NUMBERS, None, -0.1, 1]),
                ("target_modules", ["q_proj", 5, [], [5], [""]]),
                ("merge", FLAGS),
                ("seed", [*INTEGERS, 2**64]),
            ],
        ),
        (
            PruningReport,
            [
                ("output_dir", PATHS),
                *((name, FLAGS) for name in ("save_model", "self_contained", "measure_speed", "log_model")),
                ("tokenizer", TEXTS),
                ("speed_tokens", [*INTEGERS, 0, -1]),
                ("dense_artifact", TEXTS),
            ],
        ),
        (
            Calibration,
            [
                ("text", [None, 5, "", [], [5], {"a": 1}]),
                ("batches", [*INTEGERS, 0, -1]),
                ("batch_size", [*INTEGERS, 0]),
                ("block_size", [*INTEGERS, 0, 1]),
                ("held_out", [*INTEGERS, -1]),
                ("seed", INTEGERS),
            ],
        ),
        (
            lambda **options: CausalLMModule(**{"model": "no-such-folder", **options}),
            [
                ("model", [5, "", None]),
                ("dtype", ["float8", None, torch.float32]),
                ("learning_rate", [*NUMBERS, None, 0]),
                ("weight_decay", [*NUMBERS, None, -1]),
                ("warmup_steps", [*INTEGERS, -1]),
                ("schedule", ["linear", None]),
                ("min_lr_factor", [*NUMBERS, None, 1.5]),
                ("betas", [0.9, (0.9,), (0.9, 1.0), "ab", (0.9, None), (0.9, 0.9, 0.9)]),
                *((n, FLAGS) for n in ("random_weights", "gradient_checkpointing", "trust_remote_code", "shard")),
            ],
        ),
        (
            lambda **options: TextDataModule(**{"tokenizer": "unused", **options}),
            [
                ("tokenizer", [None, 5, ""]),
                ("dataset", [None, 5, [], [5]]),
                ("val_fraction", [*NUMBERS, None, 0, 1]),
                ("block_size", [*INTEGERS, 1]),
                ("batch_size", [*INTEGERS, 0]),
                ("val_batch_size", [2.5, 0, "2"]),
                ("max_train_blocks", [2.5, 0, "2"]),
                ("num_workers", [*INTEGERS, -1]),
                ("seed", [*INTEGERS, -1, 2**32]),
            ],
        ),
        (
            lambda **options: LabelledTextDataModule(**{"tokenizer": "unused", "dataset": "unused", **options}),
            [("max_length", [*INTEGERS, 0]), ("batch_size", [*INTEGERS, 0]), ("label_column", [None, 5, ""])],
        ),
        (lambda **options: TextClassifierModule("no-such-folder", **options), [("num_labels", [*INTEGERS, 0, 1])]),
    ):
        for name, values in table:
            yield make, name, values


@pytest.mark.parametrize(("make", "name", "values"), list(cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_argument_is_an_error_that_names_it_and_what_was_expected_and_found(make, name, values):
    for value in values:
        try:
            make(**{name: value})
        except (ArgumentTypeError, ArgumentValueError) as error:
            message = str(error)
        else:
            pytest.fail(f"{name}={shown(value)} is accepted")
        assert message.startswith(("The stages of a schedule", f"{name} must ")), message
        assert "; found " in message
        assert "pydantic" not in message
        assert "\n" not in message
        assert len(message) < 600


def test_the_error_is_of_pythons_own_class_and_of_ours():
    with pytest.raises(
        TypeError, match=r"^iterations must be an integer from 1 to 10,000, or None; found 2\.5 \(float\)\.$"
    ) as raised:
        StructuredPruning(iterations=2.5)
    assert isinstance(raised.value, (PruningError, ArgumentError))
    with pytest.raises(
        ValueError, match=r"^iterations must be an integer from 1 to 10,000, or None; found 0\.$"
    ) as raised:
        PruningConfig(iterations=0)
    assert isinstance(raised.value, ArgumentError)
    with pytest.raises(
        ValueError, match=r"protect must be .*; found \['\('\] \('\(' is no regular expression: missing \)"
    ):
        StructuredPruning(protect=["("])
    with pytest.raises(
        ValueError, match=r"importance must name criteria out of taylor, .* or be 'auto'; found 'tailor'"
    ):
        StructuredPruning("tailor")


@pytest.mark.parametrize(
    "number", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3), torch.tensor(3, dtype=torch.int8)]
)
def test_scalars_of_numpy_and_torch_are_integers(number):
    config = PruningConfig(iterations=number, seed=number, limits=Limits(min_groups=number, protect=[number, "x"]))
    assert type(config.iterations) is type(config.seed) is type(config.limits.min_groups) is int
    assert (config.iterations, config.limits.protect) == (3, (3, "x"))
    assert StructuredPruning(calibration_batches=number, epoch=number, mlp_multiple_of=number).stages == (
        Stage(0.2, 3),
    )


@pytest.mark.parametrize(
    "number", [np.float64(0.25), np.float32(0.25), torch.tensor(0.25), torch.tensor(0.25).bfloat16()]
)
def test_scalars_of_numpy_and_torch_are_numbers(number):
    config = PruningConfig({"taylor": number}, pruning_ratio=number, limits=Limits(min_fraction=number))
    assert type(config.pruning_ratio) is type(config.limits.min_fraction) is type(config.importance["taylor"]) is float
    assert config.pruning_ratio == config.importance["taylor"] == 0.25
    assert LoRARecovery(alpha=4, dropout=number).alpha == 4.0


def test_flags_texts_and_sequences_are_taken_as_they_are_meant():
    assert PruningConfig(compensation=np.bool_(False)).compensation is False
    assert Limits(protect=np.array([0, -1])).protect == (0, -1)
    assert Limits(protect=range(2), kinds=("mlp",)).protect == (0, 1)
    assert StructuredPruning(output_dir="out").output_dir == StructuredPruning(output_dir=Path("out")).output_dir
    loader = DataLoader([1])
    assert StructuredPruning(calibration_dataloader=loader).calibration_dataloader is loader
    assert StructuredPruning(schedule=[STAGE]).stages == StructuredPruning(schedule=(STAGE,)).stages == (STAGE,)


def test_a_list_that_holds_itself_is_refused():
    loop: list = []
    loop.append(loop)
    for rule in (COUNT, RATIO, FLAG, PATH):
        with pytest.raises(ArgumentTypeError, match=r"^x must be"):
            rule.check("x", loop)
    with pytest.raises(ArgumentTypeError, match="protect"):
        Limits(protect=loop)


def test_what_is_not_a_number_is_not_copied():
    value = object()
    assert plain(value) is value
    assert plain({"a": [np.int64(1)]}) == {"a": [1]}


def test_a_configuration_is_still_a_frozen_dataclass():
    config = PruningConfig({"taylor": 1, "wanda": 2.0}, limits=Limits(protect=[0]))
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert replace(config, iterations=3).iterations == 3
    with pytest.raises(ArgumentTypeError, match="iterations"):
        replace(config, iterations=2.5)
    with pytest.raises(AttributeError):
        config.seed = 1
    assert [f.name for f in fields(config)][:2] == ["importance", "pruning_ratio"]


def test_defaults_stand_in_one_place():
    options = inspect.signature(StructuredPruning).parameters
    for owner in (PruningConfig, Limits):
        shared = [f.name for f in fields(owner) if f.name in options]
        assert len(shared) >= 5
        assert all(options[name].default == getattr(owner, name) for name in shared)


def test_batches_that_can_be_read_only_once_are_refused_before_any_is_read():
    read = []

    def batches():
        read.append(1)
        yield torch.zeros(1, 4, dtype=torch.long)

    with pytest.raises(ArgumentValueError, match=r"batches must be an iterable .* read only once"):
        prune(torch.nn.Linear(2, 2), batches(), lambda b: b, PruningConfig())
    assert not read


@pytest.mark.parametrize(
    ("quality", "meant"), [("fast", (1, False, 0)), ("best", (None, True, 3)), (None, (None, True, 0))], ids=str
)
def test_a_quality_stands_for_three_options_of_configuration_and_callback(quality, meant):
    for config in (PruningConfig(quality=quality), StructuredPruning(quality=quality).config):
        assert (config.iterations, config.compensation, config.polish_epochs) == meant
        sizes = replace(config, pruning_ratio=0.3)
        assert (sizes.iterations, sizes.compensation, sizes.polish_epochs) == meant


@pytest.mark.parametrize(
    "given", [{"iterations": 3}, {"polish_epochs": 1}, {"iterations": 3, "polish_epochs": 4}], ids=str
)
def test_a_quality_and_what_it_stands_for_are_not_given_both(given):
    name, value = next(iter(given.items()))
    for make in (PruningConfig, StructuredPruning):
        with pytest.raises(ArgumentValueError, match=rf"quality='fast' .* found both and {name}={value}"):
            make(quality="fast", **given)
    with pytest.raises(ArgumentValueError, match="quality must be"):
        PruningConfig(quality="great")
