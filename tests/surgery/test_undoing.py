"""A cut that is interrupted anywhere leaves model and optimizer as they were."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lit_prune
from conftest import tiny
from lit_prune import PruningPlan, find_group_sets, get_plan
from lit_prune.surgery import apply
from lit_prune.surgery.apply import cut
from lit_prune.surgery.undoing import module_state, undo_all

ROOT = str(Path(lit_prune.__file__).parent)


class Interrupt(BaseException):
    pass


def trace_from_first_change(monkeypatch, reached):
    """Call a function with the place of every line of lit_prune that a cut runs once it is past its checks."""

    def local(frame, event, argument):
        if event == "line":
            reached((frame.f_code.co_filename, frame.f_lineno))
        return local

    def begin(model):
        frame = sys._getframe(1)
        frame.f_trace = local
        sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(ROOT) else None)
        return module_state(model)

    monkeypatch.setattr(apply, "module_state", begin)


def described(value, seen):
    """What is compared: objects by identity and by what they hold, tensors by every bit."""
    if isinstance(value, torch.Tensor):
        gradient = None if value.grad is None else (id(value.grad), value.grad.numpy().tobytes())
        return id(value), tuple(value.shape), value.requires_grad, value.detach().numpy().tobytes(), gradient
    if isinstance(value, (str, int, float, bool, type(None), type, torch.dtype)):
        return value
    if id(value) in seen:
        return id(value)
    seen[id(value)] = value
    own = isinstance(value, (torch.nn.Module, torch.optim.Optimizer)) or "transformers" in type(value).__module__
    if isinstance(value, dict) or own:
        mapping = value if isinstance(value, dict) else vars(value)
        pairs = {k if isinstance(k, (str, int)) else id(k): described(item, seen) for k, item in mapping.items()}
        return id(value), type(value), pairs
    if isinstance(value, (list, tuple, set)):
        return [described(item, seen) for item in value]
    return id(value)


def heads_and_channels(model):
    group_sets = find_group_sets(model)
    # the first layer loses all its heads
    kept = [[] if s.layer == 0 and s.kind == "attention" else range(s.size - 1) for s in group_sets]
    return PruningPlan.from_kept(group_sets, kept), "model.layers.1.mlp.down_proj.weight"


def a_layer(model):
    group_sets = find_group_sets(model, blocks=True)
    kept = [[] if s.kind == "block" and s.layer == 0 else range(s.size) for s in group_sets]
    return PruningPlan.from_kept(group_sets, kept), None


def a_bias(model):
    plan, _ = heads_and_channels(model)
    return replace(plan, biases=("model.layers.1.mlp.down_proj",)), None


@pytest.mark.parametrize(("first", "planned"), enumerate([heads_and_channels, a_layer, a_bias]))
def test_an_interrupt_at_any_line_of_a_cut(first, planned, monkeypatch):
    def build():
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = tiny("llama", "eager", num_hidden_layers=2, vocab_size=16, **sizes)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        plan, repaired = planned(model)
        weights = {} if repaired is None else {repaired: torch.ones(16, 7)}
        return model, optimizer, lambda: cut(model, plan, [optimizer], weights)

    lines: dict[tuple[str, int], None] = {}
    for _ in range(2):
        # what is made once in a process (classes) is made in the first run
        lines.clear()
        model, _, act = build()
        trace_from_first_change(monkeypatch, lines.setdefault)
        try:
            act()
        finally:
            sys.settrace(None)
    assert get_plan(model) is not None and len(lines) > 80
    model, optimizer, act = build()
    before = described([model, optimizer], {})
    # a third each, as most lines are run by all three
    for wanted in list(lines)[first::3]:

        def interrupt(place, wanted=wanted):
            if place == wanted:
                sys.settrace(None)
                raise Interrupt(place)

        trace_from_first_change(monkeypatch, interrupt)
        try:
            with pytest.raises(Interrupt):
                act()
        finally:
            sys.settrace(None)
        assert described([model, optimizer], {}) == before, wanted
    monkeypatch.undo()
    act()
    assert described([model, optimizer], {}) != before


def test_a_step_that_fails_does_not_keep_the_others_from_being_undone():
    done = []

    def fails():
        raise OSError("first")

    with pytest.raises(OSError, match="first"):
        undo_all([lambda: done.append("a"), fails, lambda: done.append("b")])
    assert done == ["b", "a"]


def test_an_interrupt_does_not_end_the_undoing():
    done, interrupts = [], [KeyboardInterrupt()]

    def interrupted():
        if interrupts:
            raise interrupts.pop()
        done.append("b")

    with pytest.raises(KeyboardInterrupt):
        undo_all([lambda: done.append("a"), interrupted, lambda: done.append("c")])
    assert done == ["c", "b", "a"]
