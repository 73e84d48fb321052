"""Which description a model gets: by its class, by a qualified name, or by a bare name that other classes share."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from architecture_cases import CASES, random_ids
from torch import nn

from conftest import tiny, unsettled
from lit_prune import (
    MLP,
    Architecture,
    Attention,
    UnsupportedModelError,
    find_group_sets,
    find_model,
    register_architecture,
    verify_architecture,
)
from lit_prune.architectures import architectures
from lit_prune.architectures.registry import _REGISTRY

CASE = {case.name: case for case in CASES}
MLPS = (MLP("h.*", ("up",), "down"),)


class Channels(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.names = up, down
        self.add_module(up, nn.Linear(8, 12))
        self.add_module(down, nn.Linear(12, 8))

    def forward(self, x):
        up, down = (self.get_submodule(name) for name in self.names)
        return x + down(up(x).relu())


def model_class(name, blocks="h", up="up", down="down", module="somewhere.models", bases=(nn.Module,)):
    """A class of that name, as a package of that name would define it; its instances hold two blocks."""

    def init(self):
        nn.Module.__init__(self)
        self.add_module(blocks, nn.ModuleList([Channels(up, down), Channels(up, down)]))

    def forward(self, x):
        for block in self.get_submodule(blocks):
            x = block(x)
        return x

    return type(name, bases, {"__init__": init, "forward": forward, "__module__": module})


# classes that only have the name


class Transformer(nn.Module):
    """As in sentence-transformers: a model of transformers, and what tokenizes for it."""

    def __init__(self, model):
        super().__init__()
        self.auto_model = model

    def forward(self, features):
        return self.auto_model(**features)


@pytest.mark.parametrize("name", ["BERT, masked language model", "Llama", "T5"])
def test_a_class_called_transformer_does_not_hide_the_model_in_it(name):
    inner = CASE[name].build()
    sentences = nn.Sequential(Transformer(inner), nn.Linear(2, 2))
    assert find_model(sentences) == ("0.auto_model", inner)
    assert len(find_group_sets(sentences)) == len(find_group_sets(inner))


@pytest.mark.parametrize("name", ["Transformer", "TransformerEncoder", "LlamaPreTrainedModel", "GPT2PreTrainedModel"])
def test_a_users_class_of_a_known_name_is_not_taken_for_it_and_the_error_says_so(name):
    own = model_class(name, blocks="layers")
    with pytest.raises(
        UnsupportedModelError, match=rf"has the name of [\w.]+\.{name}, but is somewhere\.models\.{name}"
    ):
        find_group_sets(own())
    register_architecture(Architecture("mine", (own,), (MLP("layers.*", ("up",), "down"),)))
    assert [s.name for s in find_group_sets(own())] == ["layers.0", "layers.1"]


def test_torchs_own_and_what_derives_from_it_are_known_by_class():
    class Mine(nn.TransformerEncoder):
        pass

    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = unsettled(Mine(layer, 2, enable_nested_tensor=False))
    assert {s.kind for s in find_group_sets(model)} == {"attention", "mlp"}


def test_a_conv1d_of_ones_own_is_not_taken_for_that_of_transformers():
    class Conv1D(nn.Module):
        def __init__(self, rows, columns):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(rows, columns)), None

    model = CASE["GPT-2"].build()
    model.transformer.h[0].mlp.c_fc = Conv1D(32, 24)
    with pytest.raises(UnsupportedModelError, match=r"c_fc is a Conv1D; expected nn\.Linear or transformers' Conv1D"):
        find_group_sets(model)


# ways to say which class


def test_a_class_is_named_as_an_object_or_by_where_it_is_defined_or_exported(monkeypatch):
    package = types.ModuleType("somewhere")
    monkeypatch.setitem(sys.modules, "somewhere", package)
    own, other = model_class("Own"), model_class("Own", module="elsewhere.models")
    package.Own = own
    for reference in (own, "somewhere.models.Own", "somewhere.Own"):
        _REGISTRY[:] = [a for a in _REGISTRY if a.name != "own"]
        register_architecture(Architecture("own", (reference,), MLPS))
        assert len(find_group_sets(nn.ModuleList([own()]))) == 2
        with pytest.raises(UnsupportedModelError, match=r"has the name of somewhere\.[\w.]*Own, but is elsewhere"):
            find_group_sets(other())
    register_architecture(Architecture("bare", ("Own",), MLPS))
    assert len(find_group_sets(other())) == 2
    derived = type("Derived", (own,), {})
    assert len(find_group_sets(derived())) == 2


def test_naming_a_class_imports_nothing():
    register_architecture(Architecture("absent", ("a_package_that_is_absent.models.Own",), MLPS))
    with pytest.raises(UnsupportedModelError, match=r"Described are .*a_package_that_is_absent\.models\.Own"):
        find_group_sets(model_class("Own")())
    assert "a_package_that_is_absent" not in sys.modules


@pytest.mark.parametrize("models", ["Own", (1,), ("Own", None), (Channels("up", "down"),)])
def test_anything_else_is_an_error(models):
    with pytest.raises(TypeError, match="expected a tuple of classes or names"):
        register_architecture(Architecture("own", models, MLPS))


# several descriptions


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("reference", ["bare", "class", "name"])
def test_two_classes_of_one_name_keep_their_own_descriptions(order, reference):
    """As timm's VisionTransformer and torchvision's; their parts are in places of the same name but for the last."""
    layouts = [("blocks", "up", "down", "timm.models"), ("blocks", "fc_in", "fc_out", "torchvision.models")]
    classes = [model_class("VisionTransformer", *layout) for layout in layouts]
    for i in order:
        _, up, down, module = layouts[i]
        models = {"bare": "VisionTransformer", "class": classes[i], "name": f"{module}.VisionTransformer"}
        register_architecture(Architecture(f"vit of {module}", (models[reference],), (MLP("blocks.*", (up,), down),)))
    for cls, (_, up, down, _) in zip(classes, layouts, strict=True):
        model = cls()
        assert {p.module.rpartition(".")[2] for s in find_group_sets(model) for p in s.slices} == {up, down}
        assert verify_architecture(model, lambda m: m(torch.ones(2, 8))) == ["blocks.0", "blocks.1"]


def test_a_bare_name_does_not_take_a_class_that_is_described_by_itself():
    mine, other = model_class("Encoder"), model_class("Encoder", up="fc_in", down="fc_out", module="other")
    register_architecture(Architecture("other", (other,), (MLP("h.*", ("fc_in",), "fc_out"),)))
    register_architecture(Architecture("mine", ("Encoder",), MLPS))
    assert len(find_group_sets(mine())) == len(find_group_sets(other())) == 2


def test_one_name_for_two_descriptions_of_different_classes_keeps_both():
    own = model_class("MyViT")
    register_architecture(Architecture("vit", (own,), MLPS))
    assert sum(a.name == "vit" for a in architectures()) == 2
    assert len(find_group_sets(own())) == 2
    name = next(n for n in CASE if n.startswith("ViT"))
    assert find_group_sets(CASE[name].build())


def test_a_description_is_replaced_by_a_later_one_of_the_same_class():
    own, before = model_class("Own"), len(architectures())
    register_architecture(Architecture("own", (own,), (MLP("h.*", ("wrong",), "down"),)))
    register_architecture(Architecture("own", (own,), MLPS))
    assert len(architectures()) == before + 1
    assert len(find_group_sets(own())) == 2


@pytest.mark.parametrize("reference", ["LlamaPreTrainedModel", "transformers.LlamaPreTrainedModel"])
def test_a_later_description_of_a_known_class_wins(reference):
    register_architecture(Architecture("channels alone", (reference,), (MLP("layers.*.mlp"),)))
    assert {s.kind for s in find_group_sets(tiny("llama"))} == {"mlp"}


def test_what_fits_no_description_of_its_name_is_an_error_that_names_the_part():
    attention = Attention("blocks.*.attn", "wq", "wk", "wv", "wo")
    register_architecture(Architecture("my-gpt-2", ("GPT",), (attention,)))
    with pytest.raises(UnsupportedModelError, match=r"architecture 'my-gpt-2', but no module is at 'blocks\.\*\.attn'"):
        find_group_sets(model_class("GPT")())
    # but not where another model is inside
    holder = model_class("GPT")()
    holder.inner = tiny("llama")
    assert find_model(holder)[0] == "inner"
    assert find_group_sets(holder)[0].name.startswith("model.layers")
    assert torch.isfinite(holder.inner(random_ids(0)).logits).all()
