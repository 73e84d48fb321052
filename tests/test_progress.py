"""One bar over all phases of a pruning: it never goes back, ends at its total, and is the same for every caller."""

from __future__ import annotations

import contextlib
import re

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from test_pruning import fit, pruning

from conftest import tiny
from lit_prune import PruningConfig, find_group_sets
from lit_prune.costs import Costs
from lit_prune.phases import expected_work
from lit_prune.pipeline import prune, prune_with
from lit_prune.progress import Progress, Work


class Recorder:
    """What a terminal is told."""

    def __init__(self, total: int, description: str) -> None:
        self.total, self.at, self.said, self.closed = total, [0], [description], False

    def update(self, n: int) -> None:
        self.at.append(self.at[-1] + n)

    def set_description(self, desc: str) -> None:
        self.said.append(desc)

    def close(self) -> None:
        self.closed = True


def recorded(work):
    bars: list[Recorder] = []

    def show(total, description):
        bars.append(Recorder(total, description))
        return bars[-1]

    return Progress(work, show), bars


def sampled(model, batches, loss, config):
    """The bar of a pruning."""
    progress, bars = recorded(lambda n: expected_work(model, find_group_sets(model), config, n))
    with progress:
        progress.known(len(batches))
        prune_with(
            model,
            lambda _: contextlib.nullcontext((progress.batches(batches), loss)),
            config,
            progress=progress.layers,
            costs=Costs(progress.phase),
        )
    (bar,) = bars
    return bar


@pytest.mark.parametrize(
    "options", [{}, {"importance": "wanda", "repair": "bias"}, {"importance": "auto", "iterations": 1}]
)
def test_the_bar_ends_at_its_total_and_moves_within_every_phase(options, batches, loss_of):
    model = tiny()
    config = PruningConfig(**options)
    bar = sampled(model, batches * 4, loss_of(model), config)
    assert bar.closed and bar.at[-1] == bar.total and bar.at == sorted(bar.at)
    # in small steps: the largest is the end of a phase that needed less than was expected
    assert max(b - a for a, b in zip(bar.at, bar.at[1:], strict=False)) <= bar.total / 4
    phases = [s.removeprefix("Pruning: ") for s in bar.said[1:]]
    names = ["calibration", *["compensation"] * config.compensates, *["planning"] * (config.importance == "auto")]
    names += ["repair"] * (config.repair == "least_squares")
    iterations = config.iterations or 1
    expected = [f"{n} {i + 1}/{iterations}" if iterations > 1 else n for i in range(iterations) for n in names]
    assert phases == ["check", *expected]


def test_phases_that_are_skipped_or_unknown_and_batches_in_excess():
    progress, bars = recorded(lambda n: [Work("a", n, n), Work("b", n, n, 2), Work("c", 1, 1)])
    with progress:
        with progress.phase("a"):
            # the number of batches is known within the first phase
            progress.known(3)
            for _ in progress.batches(range(10)):
                pass
            assert bars[0].at[-1] == 3
        with progress.phase("other"):
            progress.batch_done()
        with progress.phase("c"):
            pass
        progress.known(100)
    assert len(bars) == 1 and bars[0].total == 9 and bars[0].at[-1] == 9
    assert bars[0].said == ["Pruning", "Pruning: a", "Pruning: c"]


def test_an_error_takes_the_bar_away_where_it_stands():
    progress, bars = recorded(lambda n: [Work("a", n, n)])
    with pytest.raises(KeyError), progress, progress.phase("a"):
        progress.known(4)
        progress.batch_done()
        raise KeyError
    assert bars[0].closed and bars[0].at[-1] == 1


def test_the_function_shows_nothing_where_there_is_no_terminal(batches, loss_of, capsys):
    model = tiny()
    prune(model, batches, loss_of(model), PruningConfig(iterations=1, repair=None), progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("own", [TQDMProgressBar, RichProgressBar])
def test_one_bar_inside_a_fit(own, tmp_path, capsys):
    displays = []

    class Kept(own):
        def teardown(self, *args, **kwargs):
            displays.append(getattr(self, "progress", None))
            super().teardown(*args, **kwargs)

    fit(tmp_path, pruning(epoch=0), Kept(), max_epochs=1, enable_progress_bar=True)
    captured = capsys.readouterr()
    if own is TQDMProgressBar:
        shown = [part for part in re.split(r"[\r\n]", captured.err) if part.startswith("Pruning")]
        assert shown and all("%|" in part for part in shown)
        reached = [int(part.partition("%")[0].rpartition(" ")[2]) for part in shown]
        assert reached == sorted(reached)
        assert "Calibration:" not in captured.err and "Blocks:" not in captured.err
    else:
        (task,) = [t for t in displays[0].tasks if t.description.startswith("Pruning")]
        assert task.completed == task.total and not task.visible
        assert "it/s]" not in captured.err


def test_nothing_is_shown_where_the_trainer_shows_nothing(tmp_path, capsys):
    fit(tmp_path, pruning(epoch=0), max_epochs=1, enable_progress_bar=False)
    assert "Pruning" not in capsys.readouterr().err
