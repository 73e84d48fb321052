"""A transformers model around one that was pruned by itself saves what loads again, or says why not."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    LlamaForTokenClassification,
    VisionTextDualEncoderModel,
)

from conftest import SMALL, tiny, uneven_kept, unsettled
from lit_prune import (
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    get_plan,
    load_pruned,
    save_pruned,
)

pytestmark = pytest.mark.core


def classifier():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SMALL, "num_labels": 3})
    return unsettled(LlamaForTokenClassification(config))


def cut(model, blocks=False):
    group_sets = find_group_sets(model, blocks=blocks)
    kept = uneven_kept([s for s in group_sets if s.kind != "block"])
    kept += [[] if s.layer == 1 else [0] for s in group_sets if s.kind == "block"]
    in_order = [s for s in group_sets if s.kind != "block"] + [s for s in group_sets if s.kind == "block"]
    apply_plan(model, PruningPlan.from_kept(in_order, kept))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("save", ["save_pretrained", "save_pruned"])
def test_a_task_head_saves_the_whole_model(tmp_path, tokens, inner, blocks, save):
    model = classifier()
    cut(model.model if inner else model, blocks)
    expected = model(tokens).logits
    if save == "save_pretrained":
        model.save_pretrained(tmp_path / "model")
    else:
        save_pruned(model, tmp_path / "model")
    for load in (load_pruned, AutoModelForTokenClassification.from_pretrained):
        loaded = load(tmp_path / "model")
        assert torch.equal(loaded(tokens).logits, expected)
        assert isinstance(loaded, LlamaForTokenClassification)
    assert (get_plan(model) is None) == inner, "the model is as it was before it was saved"


def test_a_model_around_one_that_is_dense_is_saved_as_always(tmp_path, tokens):
    model = classifier()
    model.save_pretrained(tmp_path / "model")
    loaded = LlamaForTokenClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_two_pruned_models_in_one_are_refused(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = AutoConfig.for_model("vit", **small, image_size=8, patch_size=4)
    text = AutoConfig.for_model("bert", **small, vocab_size=32)
    config = AutoConfig.for_model(
        "vision-text-dual-encoder", vision_config=vision.to_dict(), text_config=text.to_dict()
    )
    model = VisionTextDualEncoderModel(config)
    cut(model.vision_model)
    cut(model.text_model)
    with pytest.raises(UnsupportedModelError, match=r"several models that were pruned.*lit_prune.save_pruned"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_save_pruned_of_the_base_model_alone(tmp_path, tokens):
    model = tiny()
    cut(model.model)
    save_pruned(model.model, tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(tokens)[0], model.model(tokens)[0])
