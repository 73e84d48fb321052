"""Names of release 0.1 go on working, with a warning that gives the new one."""

import pytest
import torch

import lit_prune
from conftest import tiny
from lit_prune import MLP, Architecture, Attention, PruningPlan, find_group_sets, save_pruned
from lit_prune.callbacks import PruningReport
from lit_prune.groups import Slice
from lit_prune.plan import PlanEntry


def renamed(new):
    return pytest.warns(DeprecationWarning, match=f"is now called {new!r}.*0.3")


def test_methods_and_properties_by_their_old_names():
    part = Slice("w", 0, torch.arange(4).view(2, 2))
    with renamed("sum_by_group"):
        assert part.gather(torch.ones(4)).tolist() == [2, 2]
    group_set = find_group_sets(tiny())[0]
    with renamed("repairable"):
        assert group_set.refittable == group_set.repairable
    first, second = (PruningPlan((PlanEntry("m", "mlp", 0, s, tuple(range(s - 1))),)) for s in (4, 3))
    with renamed("compose"):
        assert first.then(second) == first.compose(second)
    with renamed("entries_after"):
        assert first.afterwards() == first.entries_after()
    with renamed("metrics"):
        assert PruningReport().figures == {}


@pytest.mark.parametrize("cls", [Attention, MLP])
def test_fields_by_their_old_names(cls):
    with renamed("requires"):
        component = cls(path="a.*", having="b")
    assert component == cls(path="a.*", requires="b")
    with renamed("requires"):
        assert component.having == "b"
    with pytest.raises(TypeError, match="both 'requires' and its old name 'having'"):
        cls(path="a.*", having="b", requires="c")


def test_arguments_by_their_old_names(tmp_path):
    parts = (MLP(path="layers.*.mlp"),)
    with renamed("components"):
        assert Architecture("own", ("Own",), blocks=parts) == Architecture("own", ("Own",), components=parts)
    with renamed("unobservable_input"):
        assert Slice("w", 0, torch.zeros(1, 1), opaque=True).unobservable_input
    model = tiny()
    lit_prune.prune(model, [torch.zeros(1, 4, dtype=torch.long)], lambda ids: model(ids, labels=ids).loss,
                    lit_prune.PruningConfig("magnitude", pruning_ratio=0.1, repair=None))  # fmt: skip
    with renamed("metrics"):
        card = (save_pruned(model, tmp_path / "out", figures={"dense": {"loss": 2.5}}) / "README.md").read_text()
    assert "2.5" in card


def test_the_old_class_of_a_component():
    with pytest.warns(DeprecationWarning, match="components.Component"):
        from lit_prune.architectures import Block
    assert Block is lit_prune.architectures.Component
