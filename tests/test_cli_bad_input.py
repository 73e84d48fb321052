"""A table of bad models, files and options: each ends in one sentence, with an exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from local_assets import chains, write_model, write_text

from lit_prune.cli import main

SMALL = [
    "--calibration.text=text.txt",
    "--calibration.batches=2",
    "--calibration.block_size=16",
    "--calibration.held_out=2",
]


def config_of(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def cut_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


# what is done to a good model, and words of the sentence
MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), ""),
    "empty config": (lambda f: (f / "config.json").write_text(""), ""),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{nope"), ""),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ""),
    "config that is binary": (lambda f: (f / "config.json").write_bytes(bytes(range(256))), ""),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), ""),
    "unknown model type": (lambda f: config_of(f, model_type="nope"), "nope"),
    "architectures that are text": (lambda f: config_of(f, architectures="LlamaForCausalLM"), ""),
    "a model of another sort": (lambda f: config_of(f, architectures=["T5ForConditionalGeneration"]), "T5For"),
    "sizes that do not fit the weights": (lambda f: config_of(f, hidden_size=64), ""),
    "a negative size": (lambda f: config_of(f, intermediate_size=-5), ""),
    "a size that is text": (lambda f: config_of(f, hidden_size="big"), ""),
    "no heads": (lambda f: config_of(f, num_attention_heads=0), ""),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ""),
    "empty weights": (lambda f: cut_weights(f, 0), ""),
    "weights cut off in the header": (lambda f: cut_weights(f, 40), ""),
    "weights cut off in the data": (lambda f: cut_weights(f, 9000), ""),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("nope" * 100), ""),
    "an index of absent files": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "absent"}}'),
        ),
        "",
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ""),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    "a tokenizer of more tokens": (lambda f: None, "embeddings of 32 tokens"),
    "pruned by a plan that is text": (lambda f: config_of(f, model_type="lit_prune", pruning="all"), ""),
    "pruned by no plan": (lambda f: config_of(f, model_type="lit_prune", base_model_type="llama"), ""),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_model(folder / "model")
    write_model(folder / "small", vocab_size=32)
    write_text(folder / "text.txt", chains(60))
    return folder


@pytest.fixture
def given(good, tmp_path, monkeypatch) -> Path:
    shutil.copytree(good / "model", tmp_path / "model")
    shutil.copy(good / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def ends(arguments, capsys) -> tuple[int, str]:
    """Exit code and sentence of a command that cannot work."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("lit-prune: error: ")]
    assert len(said) == 1 and "Traceback" not in shown, shown
    return ended.value.code, said[0]


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_read(case, good, given, capsys):
    spoil, words = MODELS[case]
    if "more tokens" in case:
        shutil.rmtree(given / "model")
        shutil.copytree(good / "small", given / "model")
        shutil.copy(good / "model" / "tokenizer.json", given / "model" / "tokenizer.json")
    spoil(given / "model")
    code, said = ends(["plan", "model", "out", *SMALL], capsys)
    assert words in said and code in (1, 2)
    assert not (given / "out").exists()


PLANS = ["", "{", "[]", "{}", '{"format": 3}', "\0\1\2"]


def test_files_that_are_not_what_they_are_given_for(given, capsys):
    for number, content in enumerate(PLANS):
        (given / f"plan{number}.json").write_text(content)
        code, _ = ends(["apply", "model", "out", *SMALL, f"--plan=plan{number}.json"], capsys)
        assert code == 1
    for arguments, expected in (
        (["apply", "model", "out", *SMALL, "--plan=model"], 1),
        (["plan", "text.txt", "out", *SMALL], 1),
        (["plan", "package:json", "out", *SMALL], 1),
        (["plan", "package:absent.module", "out", *SMALL], 1),
        (["plan", "package:", "out", *SMALL], 1),
        (["plan", "absent.gguf", "out", *SMALL], 1),
        (["plan", "", "out", *SMALL], None),
        (["plan", "model", "text.txt", *SMALL], 1),
        (["plan", "model", "/proc/1/out", *SMALL], 1),
        (["plan", "model", "out", *SMALL, "--pruning.pruning_ratio=nan"], 2),
        (["plan", "model", "out", *SMALL, "--pruning.importance={wanda: 0}"], 2),
        (["plan", "model", "out", *SMALL, "--pruning.limits.min_fraction=7"], 2),
        (["plan", "model", "out", *SMALL, "--pruning.limits.protect=[nothing_of_the_kind]"], None),
        (["plan", "model", "out", *SMALL, "--dtype=int8"], 2),
        (["plan", "model", "out", *SMALL, "--device=cuda:77"], 2),
        (["plan", "model", "out", *SMALL, "--ratios"], 2),
        (["plan", "model", "out", *SMALL, "--statistics=text.txt"], 1),
        (["compare", "model", "absent", *SMALL], 1),
        (["export", "model", "out", "--vocabulary=absent.gguf"], 1),
        (["evaluate"], 2),
        (["--config", "absent"], 2),
    ):
        code, said = ends(arguments, capsys)
        assert code == expected or (expected is None and code in (1, 2)), said
    (given / "text.gguf").write_text("no such format")
    assert ends(["plan", "text.gguf", "out", *SMALL], capsys)[0] in (1, 2)
    assert not (given / "out").exists()


def test_debug_before_or_after_the_command_shows_the_traceback(given):
    for arguments in (["--debug", "plan", "absent", "out"], ["plan", "absent", "out", "--debug"]):
        with pytest.raises(FileNotFoundError, match="There is no folder 'absent'"):
            main(arguments)
