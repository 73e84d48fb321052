"""Tracing of models that other packages define, against their descriptions and against a masked dense model."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
import transformers
from architecture_cases import CASES
from constructs import Recurrent
from test_constructs import masked, tensors
from torch import nn
from vision_packages import vision_package

from conftest import unsettled
from lit_prune import (
    Architecture,
    Limits,
    PruningConfig,
    PruningPlan,
    Traced,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    find_model,
    prune,
    register_architecture,
    trace,
)
from lit_prune.architectures.tracing import trace_groups
from lit_prune.errors import BudgetError

CASE = {case.name: case for case in CASES}
DESCRIBED = [
    "Llama",
    "Llama, multi-query",
    "Gemma 3",
    "GPT-2",
    "GPT-NeoX / Pythia",
    "Falcon, new decoder",
    "BERT, masked language model",
    "DeBERTa-v2",
    "ModernBERT",
    "ViT, image classification",
    "DINOv2, image classification",
    "BART",
    "Whisper",
    "nn.TransformerEncoder",
    "nn.Transformer",
]


def groups(group_sets):
    """Every group as the positions of the parameters that leave with it."""
    return {
        frozenset((s.parameter, s.dim, tuple(sorted(s.index[g].tolist()))) for s in found.slices)
        for found in group_sets
        for g in range(found.size)
    }


def traced(model, run, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace_groups(model, run, **options)


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_is_found_without_the_description(name):
    case = CASE[name]
    model = case.build()
    inner, batch = find_model(model)[1], case.batch(0)
    found = traced(inner, lambda: model(**batch), root=model)
    described = find_group_sets(model)
    assert groups(described) <= groups(found.group_sets)
    consumers = {(s.parameter, s.dim) for g in described for s in g.consumers}
    assert consumers <= {(s.parameter, s.dim) for g in found.group_sets for s in g.consumers}
    heads = {s.size for s in described if s.kind in ("attention", "query_head")}
    assert heads <= {s.size for s in found.group_sets if s.kind == "attention"}


def small_vision(package, name, options):
    if package == "timm":
        return vision_package("timm").create_model(name, num_classes=7, **options)
    models = vision_package("torchvision.models")
    return getattr(models, name)(num_classes=7, **options)


WIDTHS = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
VISION = [
    ("timm", "vit_tiny_patch16_224", WIDTHS, 0.55),
    ("timm", "deit_tiny_distilled_patch16_224", WIDTHS, 0.55),
    ("timm", "vit_small_patch14_reg4_dinov2", {**WIDTHS, "img_size": 28}, 0.6),
    ("timm", "eva02_tiny_patch14_224", {**WIDTHS, "img_size": 28}, 0.6),
    (
        "timm",
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        0.8,
    ),
    ("timm", "convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 0.6),
    ("timm", "mixer_s32_224", {"img_size": 64}, 0.8),
    ("timm", "resnet10t", {}, 0.99),
    ("timm", "resnext26ts", {}, 0.99),
    pytest.param("timm", "efficientnet_lite0", {}, 0.99, marks=pytest.mark.slow),
    ("timm", "mobilenetv3_small_050", {}, 0.99),
    pytest.param("timm", "ghostnet_050", {}, 0.99, marks=pytest.mark.slow),
    ("timm", "densenet121", {"growth_rate": 8, "block_config": (2, 2, 2)}, 0.99),
    ("torchvision", "resnet18", {}, 0.99),
    ("torchvision", "squeezenet1_1", {}, 0.99),
    pytest.param("torchvision", "regnet_y_400mf", {}, 0.99, marks=pytest.mark.slow),
    ("torchvision", "shufflenet_v2_x0_5", {}, 0.99),
    pytest.param("torchvision", "mnasnet0_5", {}, 0.99, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("package", "name", "options", "share"), VISION)
def test_vision_models_are_cut_as_they_are_masked(package, name, options, share):
    torch.manual_seed(0)
    model = small_vision(package, name, options).eval()
    for parameter in model.parameters():
        if not parameter.any():
            # heads and residual branches that start at zero would hide everything
            torch.nn.init.uniform_(parameter, -0.2, 0.2)
    size = options.get("img_size", 32)
    images = torch.randn(1, 3, size, size)

    class Described(type(model)):
        pass

    model.__class__ = Described
    register_architecture(Architecture(f"{package} {name}", (Described,), (Traced(lambda: (images,)),)))
    found = traced(model, lambda: model(images))
    assert found.prunable >= share
    group_sets = find_group_sets(model)
    assert [s.size for s in group_sets] == [s.size for s in found.group_sets]
    kept = [list(range(0, s.size, 2)) for s in group_sets]
    (expected,) = tensors(masked(model, group_sets, kept)(images))
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    (result,) = tensors(model(images))
    scale = expected.abs().max()
    torch.testing.assert_close(result / scale, expected / scale, atol=1e-4, rtol=1e-4)
    model.train()(images.expand(4, -1, -1, -1)).sum().backward()


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM"])
def test_models_of_speech_have_heads_channels_and_features(family):
    torch.manual_seed(0)
    layers = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    features = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = getattr(transformers, f"{family}Config")(**layers, **features, **positions)
    model, sound = getattr(transformers, f"{family}Model")(config), torch.randn(1, 400)
    found = traced(model, lambda: model(sound))
    sizes = {("channel", 16), ("mlp", 32)} if family == "WavLM" else {("channel", 16), ("mlp", 32), ("attention", 4)}
    assert sizes <= {(s.kind, s.size) for s in found.group_sets}


def test_a_model_of_litgpt_has_heads_and_channels():
    litgpt = vision_package("litgpt.model")
    config = litgpt.Config(
        name="pythia", block_size=16, vocab_size=32, padded_vocab_size=32, n_layer=2, n_head=4, n_embd=32
    )
    torch.manual_seed(0)
    model = litgpt.GPT(config).eval()
    ids = torch.randint(0, 32, (1, 8))
    found = traced(model, lambda: model(ids))
    assert {("mlp", 128)} <= {(s.kind, s.size) for s in found.group_sets}


def test_nothing_of_the_model_changes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 3)
    )
    model[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    identities = [id(p) for p in (*model.parameters(), *model.buffers())]
    modes = [m.training for m in model.modules()]
    images, state = torch.randn(2, 3, 8, 8), torch.get_rng_state()
    traced(model, lambda: model(images).sum() + torch.rand(()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(p) for p in (*model.parameters(), *model.buffers())] == identities
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (model[0].out_channels, model[1].num_features, model[5].in_features) == (8, 8, 288)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_what_is_protected_stays_whole():
    model, images = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)), torch.randn(1, 3, 4, 4)
    found = traced(model, lambda: model(images), protect=["0"])
    assert [s.name for s in found.group_sets] == ["1"]
    assert found.prunable == pytest.approx((6 * 8 + 6 + 2 * 6) / sum(p.numel() for p in model.parameters()))
    with pytest.raises(UnsupportedModelError, match=r"0\.0% of the parameters of Sequential"):
        traced(model, lambda: model(images), protect=["[01]"])
    with pytest.raises(ValueError, match=r"protect names 'hed'.*fits no module"):
        traced(model, lambda: model(images), protect=["hed"])
    with pytest.raises(ValueError, match="is no regular expression"):
        traced(model, lambda: model(images), protect=["("])
    with pytest.raises(TypeError, match="must be a list of regular expressions"):
        trace_groups(model, lambda: model(images), protect="0")


@pytest.mark.parametrize(
    ("pattern", "stay"),
    [("first", {"first"}), ("^first$", {"first"}), ("con.", {"first", "second"}), ("ir", {"first", "second", "third"})],
)
def test_one_notation_protects_in_tracing_and_in_limits(pattern, stay):
    def built():
        torch.manual_seed(0)
        layers = {
            "first": nn.Linear(3, 8),
            "second": nn.Linear(8, 8),
            "third": nn.Linear(8, 8),
            "last": nn.Linear(8, 2),
        }
        return nn.Sequential(OrderedDict(layers)).eval()

    batches, cut = [torch.randn(6, 3)], []
    for traced_first in (True, False):
        model = built()

        def loss(x, model=model):
            return model(x).square().mean()

        limits = Limits() if traced_first else Limits(protect=[pattern])
        config = PruningConfig(pruning_ratio=0.15, repair=None, limits=limits, iterations=1)
        try:
            if traced_first:
                trace(model, batches, loss, protect=[pattern])
            for _ in range(2):
                prune(model, batches, loss, config)
        except (UnsupportedModelError, BudgetError):
            # nothing may go: tracing refuses the model, and limits a ratio that cannot be reached
            assert stay == {"first", "second", "third"}
            continue
        cut.append({name for name, layer in model.named_children() if layer.out_features < 8} - {"last"})
    assert cut in ([], [{"first", "second", "third"} - stay] * 2)


def test_the_loss_of_a_step_is_all_that_has_to_be_returned():
    torch.manual_seed(0)
    model = unsettled(Recurrent(nn.LSTM, num_layers=2))
    ids, labels = torch.randint(0, 11, (2, 5)), torch.tensor([0, 2])
    found = traced(model, lambda: nn.functional.cross_entropy(model(ids), labels))
    assert [s.size for s in found.group_sets] == [6, 8]
    assert found.prunable > 0.95
