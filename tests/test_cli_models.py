"""``lit-prune plan``, ``apply`` and ``compare`` on models of images and on encoders, saved folders without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from local_assets import chains, write_text
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from conftest import unsettled
from lit_prune import PruningPlan, load_pruned
from lit_prune.cli import main
from lit_prune.objectives import IGNORED, masked_tokens

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT |= {"max_position_embeddings": 32, "pad_token_id": 0}
PIXELS = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXELS |= {"intermediate_size": 24}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
CASES = {
    "ViTForImageClassification": ("ViTConfig", {**PIXELS, "num_labels": 3}),
    "ViTModel": ("ViTConfig", PIXELS),
    "ResNetForImageClassification": ("ResNetConfig", RESNET),
    "BertForMaskedLM": ("BertConfig", TEXT),
    "BertForSequenceClassification": ("BertConfig", {**TEXT, "num_labels": 3}),
    "BertForTokenClassification": ("BertConfig", {**TEXT, "num_labels": 4}),
    "BertModel": ("BertConfig", TEXT),
}
MEASURED = {
    "ViTForImageClassification": "agreement",
    "ViTModel": "relative_error",
    "ResNetForImageClassification": "agreement",
    "BertForMaskedLM": "masked_perplexity",
    "BertForSequenceClassification": "agreement",
    "BertForTokenClassification": "agreement",
    "BertModel": "relative_error",
}


def write_encoder_tokenizer(folder: Path) -> None:
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    words = Tokenizer(models.WordLevel({**special, **{f"w{i}": i for i in range(5, 64)}}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def write_images(folder: Path, classes=("",), count: int = 12) -> Path:
    """Images of several sizes, one grey."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (20 + number, 24, 3) if number else (18, 18)
            pixels = generator.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def write_case(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    config_class, fields = CASES[name]
    model = getattr(transformers, name)(getattr(transformers, config_class)(**fields))
    unsettled(model).save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        write_encoder_tokenizer(folder)
    return folder


@pytest.fixture
def inputs(tmp_path) -> dict[str, str]:
    text = write_text(tmp_path / "text.txt", [*chains(20), "", "  ", "w9"])
    return {
        "text": f"--calibration.text={text}",
        "images": f"--calibration.images={write_images(tmp_path / 'images')}",
    }


SMALL = [
    "--calibration.batches=3",
    "--calibration.batch_size=2",
    "--calibration.held_out=4",
    "--calibration.block_size=16",
]


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


@pytest.mark.parametrize("name", CASES)
def test_apply_prunes_saves_and_measures(name, inputs, tmp_path):
    model = write_case(tmp_path / "model", name)
    reads = "images" if "ViT" in name or "ResNet" in name else "text"
    out = tmp_path / "out"
    run("apply", model, out, inputs[reads], *SMALL, "--pruning.pruning_ratio=0.15")
    metrics = json.loads((out / "pruning" / "report.json").read_text())
    assert metrics["pruned"]["parameters"] < 0.9 * metrics["dense"]["parameters"]
    dense, pruned = metrics["dense"][MEASURED[name]], metrics["pruned"][MEASURED[name]]
    # of itself the dense model is a perfect copy
    assert dense == {"agreement": 1.0, "relative_error": 0.0}.get(MEASURED[name], dense)
    assert pruned <= 1 if MEASURED[name] == "agreement" else pruned != dense
    if name.startswith("ResNet"):
        loaded = load_pruned(out, model=getattr(transformers, name).from_pretrained(model))
    else:
        loaded = load_pruned(out)
        assert isinstance(loaded, getattr(transformers, name))
    assert sum(p.numel() for p in loaded.parameters()) == metrics["pruned"]["parameters"]
    assert (out / ("preprocessor_config.json" if reads == "images" else "tokenizer.json")).exists()


def test_labels_of_folders_and_of_columns_are_used(tmp_path, capsys):
    model = write_case(tmp_path / "vit", "ViTForImageClassification")
    same = shutil.copytree(model, tmp_path / "same")
    write_images(tmp_path / "classes", ["0", "1", "LABEL_2"], 6)
    run("compare", model, same, f"--calibration.images={tmp_path / 'classes'}", *SMALL, "--output", tmp_path / "c.json")
    measured = json.loads((tmp_path / "c.json").read_text())[str(model)]
    assert {"loss", "accuracy", "forward_ms", "forward_ms_spread", "peak_memory"} <= measured.keys()
    bert = write_case(tmp_path / "bert", "BertForSequenceClassification")
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(chains(20))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("plan", bert, tmp_path / "plan", f"--calibration.text={tmp_path / 'rows.jsonl'}", *SMALL)
    assert PruningPlan.load(tmp_path / "plan" / "plan.json").entries
    assert "accuracy" in json.loads((tmp_path / "plan" / "report.json").read_text())["dense"]


def test_a_pruned_encoder_is_compared_with_what_the_dense_one_predicts(inputs, tmp_path):
    model = write_case(tmp_path / "model", "BertForSequenceClassification")
    run(
        "apply", model, tmp_path / "out", inputs["text"], *SMALL, "--pruning.pruning_ratio=0.3", "--pruning.repair=null"
    )
    run("compare", model, tmp_path / "out", inputs["text"], *SMALL, "--speed_tokens=0", "--output", tmp_path / "c.json")
    compared = json.loads((tmp_path / "c.json").read_text())
    report = json.loads((tmp_path / "out" / "pruning" / "report.json").read_text())
    assert compared[str(model)]["agreement"] == 1
    assert compared[str(tmp_path / "out")]["agreement"] == report["pruned"]["agreement"]


def test_masked_tokens_are_a_share_of_those_that_are_not_special():
    ids = torch.arange(5, 5 + 40).repeat(3, 1)
    ids[:, 0], ids[:, -1] = 2, 3
    ids[2, 2:] = 0
    batch = masked_tokens({"input_ids": ids}, [0, 2, 3], 4, torch.Generator().manual_seed(0))
    masked = batch["input_ids"] == 4
    assert masked.sum(dim=1).tolist() == [6, 6, 1]
    assert torch.equal(batch["labels"] != IGNORED, masked)
    assert (
        torch.equal(batch["labels"][masked], ids[masked]) and not torch.isin(ids[masked], torch.tensor([0, 2, 3])).any()
    )


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code in (1, 2) and len(said) == 1 and "Traceback" not in said[0]
    return said[0]


def test_inputs_that_do_not_suit_the_model(inputs, tmp_path, capsys):
    vit = write_case(tmp_path / "vit", "ViTForImageClassification")
    bert = write_case(tmp_path / "bert", "BertForMaskedLM")
    out = tmp_path / "out"
    assert "reads images: give --calibration.images" in refused(capsys, "plan", vit, out, inputs["text"], *SMALL)
    assert "give --calibration.text" in refused(capsys, "plan", bert, out, inputs["images"], *SMALL)
    absent = f"--calibration.images={tmp_path / 'absent'}"
    assert "There is no folder" in refused(capsys, "plan", vit, out, absent, *SMALL)
    (tmp_path / "none").mkdir()
    assert "holds no image" in refused(capsys, "plan", vit, out, f"--calibration.images={tmp_path / 'none'}", *SMALL)
    write_images(tmp_path / "bad", count=12)
    for number in range(12):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"no image")
    assert "cannot be read" in refused(capsys, "plan", vit, out, f"--calibration.images={tmp_path / 'bad'}", *SMALL)
    assert "holds 12 images; expected" in refused(
        capsys, "plan", vit, out, inputs["images"], "--calibration.batches=50"
    )
    (vit / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in refused(capsys, "plan", vit, out, inputs["images"], *SMALL)
    long = [*SMALL[:3], "--calibration.block_size=64", f"--calibration.text={tmp_path / 'long.txt'}"]
    write_text(tmp_path / "long.txt", chains(20, words=70))
    assert "has 32 positions" in refused(capsys, "plan", bert, out, *long)
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(f"w{i} w7,many" for i in range(9, 29)))
    classifier = write_case(tmp_path / "classifier", "BertForSequenceClassification")
    said = refused(capsys, "plan", classifier, out, f"--calibration.text={tmp_path / 'labels.csv'}", *SMALL)
    assert "must hold classes of the model" in said
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["BertForQuestionAnswering"]}))
    assert "is a BertForQuestionAnswering; expected a language model" in refused(
        capsys, "plan", bert, out, inputs["text"]
    )
    assert not out.exists()


def test_what_a_traced_model_cannot_hold_is_refused_before_anything_is_measured(inputs, tmp_path, capsys):
    model = write_case(tmp_path / "model", "ResNetForImageClassification")
    passes: dict[str, int] = {}
    for held_out in ("0", "4"):
        options = [*SMALL[:2], f"--calibration.held_out={held_out}", "--self_contained=true"]

        def count(module, *_, held_out=held_out):
            if isinstance(module, transformers.ResNetForImageClassification):
                passes[held_out] = passes.get(held_out, 0) + 1

        with torch.nn.modules.module.register_module_forward_hook(count):
            said = refused(capsys, "apply", model, tmp_path / "out", inputs["images"], *options)
        assert "Leave --self_contained out" in said
    # each held-out image once, for the class that the dense model draws for it
    assert passes["4"] - passes["0"] == 4
