"""The command ``lit-prune``, as a user with a folder and a text file runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from local_assets import chains, write_model, write_text
from test_pruning import fit, pruning
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import GroupTable, Limits, PruningConfig, PruningPlan, find_group_sets, get_plan, load_pruned, prune
from lit_prune.cli import comparing, main
from lit_prune.io.sources import load_tokenizer
from lit_prune.io.text import load_texts, pack
from lit_prune.session import Session


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path) -> list[object]:
    file = write_text(tmp_path / "text.txt", chains(60))
    return [f"--calibration.text={file}", "--calibration.batches=4", "--calibration.block_size=16"]


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


def test_the_command_is_installed_and_explains_itself(capsys):
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "lit-prune"]
    assert script.value == "lit_prune.cli:main"
    with pytest.raises(SystemExit):
        run("--help")
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("plan", "apply", "convert", "export", "report", "compare"))
    for name, words in (("apply", "Fraction of parameters"), ("export", "llama.cpp"), ("convert", "checkpoint file")):
        with pytest.raises(SystemExit):
            run(name, "--help")
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "apply", "convert", "export", "report", "compare"])
def test_help_is_plain_text_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert f"Example: lit-prune {command}" in " ".join(shown.split())
    assert "`" not in shown
    assert ("Criteria: taylor, taylor_2nd" in " ".join(shown.split())) == (command in ("plan", "apply"))


def test_lightning_is_not_needed_for_the_help():
    code = "import sys; from lit_prune.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('lightning' in sys.modules)"], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("False\n"), done.stderr


def test_a_plan_is_what_the_engine_makes_and_nothing_is_cut(model, text, tmp_path, capsys):
    run("plan", model, tmp_path / "out", *text, "--pruning.importance=taylor_2nd", "--pruning.pruning_ratio=0.15")
    made = PruningPlan.load(tmp_path / "out" / "plan.json")
    dense = AutoModelForCausalLM.from_pretrained(model)
    group_sets = find_group_sets(dense)
    made.validate(group_sets)
    blocks = pack(load_texts(str(tmp_path / "text.txt"))["train"], load_tokenizer(str(model)), "text", 16)[:][
        "input_ids"
    ]
    usable = blocks[: len(blocks) - 32]
    batches = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))[:4]].split(1)
    config = PruningConfig("taylor_2nd", pruning_ratio=0.15)
    table, expected = prune(dense, batches, lambda b: dense(input_ids=b, labels=b).loss, config)
    assert made == expected
    assert GroupTable.read(tmp_path / "out" / "group_table.csv").removed_cost == table.removed_cost
    assert {"report.html", "kept.png", "importance.png", "scores.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert f"{made.info['parameters_after']:,}" in capsys.readouterr().out


def test_one_shot_a_given_plan_report_and_compare(model, text, tmp_path, capsys):
    out = tmp_path / "pruned"
    run("apply", model, out, *text, "--pruning.pruning_ratio=0.2", "--pruning.iterations=1")
    pruned = load_pruned(out)
    assert AutoTokenizer.from_pretrained(out)("w5 w7")["input_ids"] == [5, 7]
    metrics = json.loads((out / "pruning" / "report.json").read_text())
    assert metrics["pruned"]["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert 0.18 < 1 - metrics["pruned"]["parameters"] / metrics["dense"]["parameters"] <= 0.2
    assert metrics["pruned"]["perplexity"] != metrics["dense"]["perplexity"]
    assert f"{metrics['pruned']['perplexity']:.4g}" in (out / "README.md").read_text()
    plan = out / "pruning" / "plan.json"
    assert PruningPlan.load(plan) == get_plan(pruned)
    again = tmp_path / "again"
    run("apply", model, again, *text, "--plan", plan, "--self_contained=true")
    assert get_plan(load_pruned(again)).digest() == get_plan(pruned).digest()
    tokens = torch.arange(2, 14)[None]
    torch.testing.assert_close(load_pruned(again)(tokens).logits, pruned(tokens).logits)
    assert (again / "modeling_pruned.py").exists()
    (out / "pruning" / "report.html").unlink()
    run("report", out / "pruning")
    assert "data:image/png;base64" in (out / "pruning" / "report.html").read_text()
    capsys.readouterr()
    run("compare", model, out, *text, "--speed_tokens=16", "--output", tmp_path / "compared.json")
    compared = json.loads((tmp_path / "compared.json").read_text())
    for name, stage in ((model, "dense"), (out, "pruned")):
        assert compared[str(name)]["perplexity"] == pytest.approx(metrics[stage]["perplexity"])
        assert compared[str(name)]["tokens_per_second"] > 0
    assert "perplexity" in capsys.readouterr().out


# of 32 positions 16 are for what is generated
@pytest.mark.parametrize(
    ("positions", "options", "prompt", "said"),
    [
        ((32, 64), [], 16, ""),
        ((64, 32), ["--speed_tokens=16"], 16, ""),
        (
            (64, 32),
            ["--speed_tokens=17"],
            None,
            "take 33 positions, and second has 32. Set --speed_tokens to 16 or less",
        ),
        ((16, 32), [], None, "first has 16. Set --speed_tokens to 0, which measures no speed"),
        ((16, 32), ["--speed_tokens=0"], None, ""),
    ],
)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_speed_is_measured_within_the_positions(
    model_type, positions, options, prompt, said, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder, most in zip(("first", "second"), positions, strict=True):
        write_model(tmp_path / folder, model_type, max_position_embeddings=most)
    prompts, measured = [], []
    costs, metrics = comparing.generation_costs, Session.metrics

    def counted(models, ids, **others):
        prompts.append(ids.shape[1])
        return costs(models, ids, **others, repeats=1)

    monkeypatch.setattr(comparing, "generation_costs", counted)
    monkeypatch.setattr(Session, "metrics", lambda session: measured.append(session) or metrics(session))
    arguments = ["compare", "first", "second", *text, "--calibration.block_size=8", *options]
    if said:
        assert said in " ".join(refused(capsys, *arguments).split()) and not measured
    else:
        run(*arguments)
        assert len(measured) == 2
    assert prompts == ([] if prompt is None else [prompt])


def test_whole_blocks_leave_by_a_plan_and_by_another(model, text, tmp_path):
    options = ["--pruning.limits.kinds=[block]", "--pruning.ratio_of=prunable", "--pruning.pruning_ratio=0.5"]
    run("plan", model, tmp_path / "plan", *text, *options)
    made = PruningPlan.load(tmp_path / "plan" / "plan.json")
    assert len(made.removed_blocks) == 1 and len(made.entries) == 1
    run("apply", model, tmp_path / "out", *text, "--plan", tmp_path / "plan" / "plan.json")
    assert get_plan(load_pruned(tmp_path / "out")) == made
    run("apply", model, tmp_path / "same", *text, *options)
    tokens = torch.arange(2, 14)[None]
    # what loads is a stock model
    expected, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / f)(tokens).logits for f in ("out", "same"))
    assert torch.equal(expected, stock)


def test_a_checkpoint_is_converted(model, tmp_path):
    trainer, module = fit(tmp_path, pruning(epoch=0, repair=None), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run("convert", tmp_path / "last.ckpt", model, tmp_path / "out")
    ids = torch.arange(2, 14)[None]
    assert torch.equal(load_pruned(tmp_path / "out")(ids).logits, module.inner["lm"].eval()(ids).logits)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def refused(capsys, *arguments: object) -> str:
    """What a command that cannot work says."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code in (1, 2)
    return capsys.readouterr().err


def test_mistakes_end_with_a_sentence(model, text, tmp_path, capsys):
    out = tmp_path / "out"
    said = refused(capsys, "plan", model, out, text[0], "--calibration.block_size=4000")
    assert re.search(r"lit-prune: error: .* makes .* sequences of 4000 tokens", said)
    assert "was not pruned by lit_prune" in refused(capsys, "export", model, tmp_path / "out.gguf")
    assert "lit-prune: error: No file at" in refused(capsys, "convert", tmp_path / "absent.ckpt", model, out)
    said = refused(capsys, "plan", model, out, *text, "--pruning.importance=tailor")
    assert "importance must name criteria out of taylor" in said
    assert "There is no folder 'absent/model'" in refused(capsys, "plan", "absent/model", out, *text)
    assert "There is no device 'abacus'" in refused(capsys, "plan", model, out, *text, "--device=abacus")
    said = refused(capsys, "convert", tmp_path / "text.txt", model, out)
    assert "text.txt is damaged, or holds more than plain data" in said
    # refused before any work
    said = refused(capsys, "apply", model, tmp_path / "text.txt", "--calibration.text=absent.txt")
    assert "text.txt exists and holds no saved model" in said
    other = write_model(tmp_path / "other", intermediate_size=20)
    run("plan", other, tmp_path / "plan", *text, "--calibration.held_out=0")
    said = refused(capsys, "apply", model, out, *text, "--plan", tmp_path / "plan" / "plan.json")
    assert "the plan was made for 20" in said


def test_a_plan_of_turned_states_is_refused_before_anything_is_measured(model, text, tmp_path, capsys):
    dense = AutoModelForCausalLM.from_pretrained(model)
    limits = Limits(kinds=("hidden",), multiple_of={"hidden": 4})
    config = PruningConfig("magnitude", 0.4, limits=limits, rotate_hidden=True, iterations=1)
    tokens = [torch.arange(2, 14)[None]]
    _, plan = prune(dense, tokens, lambda b: dense(input_ids=b, labels=b).loss, config)
    plan.save(tmp_path / "plan.json")
    passes = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: passes.append(module) if isinstance(module, type(dense)) else None
    )
    with handle:
        said = refused(capsys, "apply", model, tmp_path / "out", *text, "--plan", tmp_path / "plan.json")
    assert "turned" in said
    # the one batch that shows whether the model runs
    assert len(passes) == 1 and not (tmp_path / "out").exists()
