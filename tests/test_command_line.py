"""Mistakes on the command lines end in one sentence on stderr and an exit code; faults of the program in a traceback."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from local_assets import chains, write_model, write_text

from lit_prune import PruningPlan, find_group_sets
from lit_prune._files import write_text as write_file
from lit_prune.cli import main
from lit_prune.errors import ArgumentValueError, PruningError
from lit_prune.training import CausalLMModule, TextDataModule
from lit_prune.training.command_line import run
from lit_prune.user_errors import errors_as_sentences, reading

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a model, a text, and files that are not what they are given for."""
    folder = tmp_path_factory.mktemp("given")
    write_model(folder / "model")
    write_text(folder / "text.txt", chains(60))
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text("\n\n \n")
    (folder / "bad.json").write_text("{nope")
    (folder / "numbers.json").write_text('{"text": 1}\n{"text": 2}\n')
    (folder / "other.csv").write_text("a,b\n1,2\n")
    (folder / "bad.parquet").write_text("abc")
    (folder / "notes.log").write_text("w2 w3")
    (folder / "folder").mkdir()
    (folder / "folder.txt").mkdir()
    (folder / "junk").mkdir()
    (folder / "junk" / "config.json").write_text("[]")
    for name in ("pruning", "calibration", "model", "trainer"):
        for value in ("5", "null", "[1]"):
            (folder / f"{name}-{value[0]}.yaml").write_text(f"{name}: {value}\n")
    (folder / "broken.yaml").write_text("a: [\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "typo.yaml").write_text("pruning:\n  pruning_ratoi: 0.2\n")
    torch.save({"state_dict": {}}, folder / "dense.ckpt")
    torch.save([1], folder / "list.ckpt")
    return folder


@pytest.fixture
def given(prepared, monkeypatch) -> Path:
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return prepared


def ends(run, arguments, capsys) -> tuple[int, str]:
    """Exit code and sentence of a command that cannot work."""
    with pytest.raises(SystemExit) as ended:
        run([str(a) for a in arguments])
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1, said
    assert "Traceback" not in said[0]
    return ended.value.code, said[0]


SMALL = ["--calibration.text=text.txt", "--calibration.batches=2", "--calibration.block_size=16"]
TEXTS = {
    "binary.txt": (2, "The text 'binary.txt' cannot be read: UnicodeDecodeError"),
    "empty.txt": (2, "is empty"),
    "blank.txt": (1, "makes 0 sequences of 16 tokens"),
    "bad.json": (2, "The text 'bad.json' cannot be read: ArrowInvalid: JSON parse error"),
    "numbers.json": (2, "expected text in one named 'text'; found Value('int64')"),
    "other.csv": (2, "columns ['a', 'b']; expected text in one named 'text'"),
    "bad.parquet": (2, "The text 'bad.parquet' cannot be read: ArrowInvalid"),
    "notes.log": (2, "Expected files of one format out of"),
    "folder": (1, "doesn't contain any data files"),
    "folder.txt": (1, "No file at 'folder.txt'"),
    "absent.txt": (1, "No file at 'absent.txt'"),
    "[]": (2, "text must be a path or name, or a list of at least one path; found []."),
}
PLAN = {
    "--calibration.batches=0": "batches must be an integer of 1 or more; found 0.",
    "--calibration.batches=-1": "batches must be an integer of 1 or more; found -1.",
    "--calibration.batches=2.5": 'key "calibration.batches": Expected a int. Got value: 2.5',
    "--calibration.batch_size=0": "batch_size must be an integer of 1 or more; found 0.",
    "--calibration.block_size=0": "block_size must be an integer of 2 or more; found 0.",
    "--calibration.held_out=-1": "held_out must be an integer of 0 or more; found -1.",
    "--device=meta": "There is no device 'meta' to compute on",
    "--device=abacus": "There is no device 'abacus'",
    "--device=mps:9": "There is no device 'mps:9'",
    "--pruning.pruning_ratio=2": "pruning_ratio must be a number strictly between 0 and 1; found 2.0.",
    "--pruning.importance=tailor": "importance must name criteria out of taylor,",
    "--pruning.importance={taylor: .inf}": "importance must be the name of a criterion, or a mapping",
    "--pruning.iterations=0": "iterations must be an integer from 1 to 10,000, or None; found 0.",
    "--pruning.limits.protect=['(']": "is no regular expression",
    "--pruning.limits.kinds=mlp": 'key "pruning.limits.kinds"',
    "--pruning.limits.kinds=[]": "kinds must be a list of at least one kind of group, or None; found [].",
    "--pruning.repair=glue": 'key "pruning.repair"',
    "--config=pruning-5.yaml": "pruning must be a mapping of options; found 5 (int).",
    "--config=pruning-n.yaml": "pruning must be a mapping of options; found None (NoneType).",
    "--config=pruning-[.yaml": "pruning must be a mapping of options; found [1] (list).",
    "--config=calibration-5.yaml": "calibration must be a mapping of options; found 5 (int).",
    "--config=broken.yaml": "Problems parsing config",
    "--config=list.yaml": "Unexpected config",
    "--config=typo.yaml": "does not accept option 'pruning_ratoi'",
    "--config=absent.yaml": "File does not exist",
    "--nope=3": "unrecognized arguments: --nope=3",
}


def test_text_that_cannot_be_read(given, capsys):
    for name, (code, words) in TEXTS.items():
        ended, said = ends(main, ["plan", "model", "out", *SMALL, f"--calibration.text={name}"], capsys)
        assert said.startswith("lit-prune: error: ")
        assert words in said
        assert ended == code, said
    assert not (given / "out").exists()


@pytest.mark.parametrize("option", PLAN)
def test_options_that_cannot_be(given, option, capsys):
    code, said = ends(main, ["plan", "model", "out", *SMALL, option], capsys)
    assert code == 2
    assert PLAN[option] in said
    assert not (given / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "COMMAND"),
        (["nothing"], 2, "invalid choice: 'nothing'"),
        (["plan"], 2, "arguments are required"),
        (["plan", "junk", "out"], 2, "The model 'junk' cannot be read"),
        (["plan", "package:a.b", "out"], 1, "'package:a.b' stands for a GGUF file"),
        (["plan", "model", "text.txt/out", *SMALL], 1, "text.txt is not a folder"),
        (
            ["compare", "model", "other", *SMALL, "--speed_tokens=-1"],
            2,
            "speed_tokens must be an integer of 0 or more, or None; found -1.",
        ),
        (["compare", "model", *SMALL], 2, "models must be two or more, each named once; found model."),
        (["compare", "model", "model", *SMALL], 2, "each named once; found model, model."),
        (["compare", "model", "junk", "model", *SMALL], 2, "each named once; found model, junk, model."),
        (["compare", *SMALL], 2, "arguments are required"),
        (["compare", "model", "other", *SMALL, "--output=text.txt/x.json"], 1, "text.txt is not a folder"),
        (["convert", "dense.ckpt", "model", "out"], 1, "dense.ckpt holds no pruning plan"),
        (["convert", "list.ckpt", "model", "out"], 1, "has no state_dict"),
        (["convert", "text.txt", "model", "out"], 1, "is damaged, or holds more than plain data"),
        (["convert", "absent.ckpt", "model", "out"], 1, "No file at absent.ckpt"),
        (["apply", "model", "out", *SMALL, "--plan=bad.json"], 1, "is not a pruning plan"),
        (["apply", "model", "out", *SMALL, "--plan=absent.json"], 1, "absent.json"),
        (["export", "model", "out.gguf", "--dtype=f8"], 2, 'key "dtype"'),
        (["report", "folder"], 1, "plan.json"),
        (["report", "text.txt"], 1, "plan.json"),
    ],
)
def test_commands_that_cannot_work(given, arguments, code, words, capsys):
    ended, said = ends(main, arguments, capsys)
    assert words in said
    assert ended == code


REPORTS = [
    "5",
    "[]",
    '{"dense": 5}',
    '{"dense": {"parameters": "many"}}',
    '{"dense": {"a": null}}',
    '{"dense": {"a": true}}',
]
HEAD = "layer,kind,name,group,importance,cost,score,kept\n"
TABLES = ["", "a,b\n1,2\n", HEAD, f"{HEAD}x,mlp,n,0,1,1,1,true\n", f"{HEAD}0,mlp,n,0,1,1,1,\n", "\0\0"]


def test_reports_of_another_shape(given, tmp_path, capsys):
    from conftest import tiny

    sets = find_group_sets(tiny())
    PruningPlan.from_kept(sets, [list(range(s.size - 1)) for s in sets]).save(tmp_path / "plan.json")
    for content in (*REPORTS, "{nope"):
        (tmp_path / "report.json").write_text(content)
        code, said = ends(main, ["report", tmp_path], capsys)
        assert "metrics by stage and name" in said or "cannot be read: JSONDecodeError" in said
        assert code == 2
    (tmp_path / "report.json").unlink()
    for content in TABLES:
        (tmp_path / "group_table.csv").write_text(content)
        code, said = ends(main, ["report", tmp_path], capsys)
        assert "group_table.csv' cannot be read" in said or "A group table must" in said
        assert code == 2
    (tmp_path / "group_table.csv").unlink()
    (tmp_path / "report.json").write_text(json.dumps({"[/nope]": {"a|b": float("nan")}}))
    main(["report", str(tmp_path)])
    assert "[/nope]" in capsys.readouterr().out


TRAINING = ["--model.model=model", "--data.tokenizer=model", "--data.dataset=text.txt", "--data.block_size=16"]
TRAIN = {
    "--config=pruning-5.yaml": "pruning must be a mapping of options; found 5 (int).",
    "--config=pruning-n.yaml": "pruning must be a mapping of options; found None (NoneType).",
    "--config=trainer-5.yaml": "trainer must be a mapping of options; found 5 (int).",
    "--config=trainer-n.yaml": "trainer must be a mapping of options; found None (NoneType).",
    "--config=model-5.yaml": "model",
    "--config=broken.yaml": "Problems parsing config",
    "--config=typo.yaml": "does not accept option 'pruning.pruning_ratoi'",
    "--pruning.iterations=0": "iterations must be an integer from 1 to 10,000, or None; found 0.",
    "--pruning.iterations=2.5": 'key "pruning.iterations": Does not validate against any of the Union subtypes',
    "--pruning.schedule=[]": "schedule must be a CubicSchedule, or a list of at least one Stage; found [].",
    "--pruning.schedule=[{ratio: 2, epoch: 1}]": "ratio must be a number strictly between 0 and 1; found 2.0.",
    "--pruning.schedule=5": 'key "pruning.schedule"',
    "--pruning.importance=tailor": "importance must name criteria out of",
    "--pruning.protect=['(']": "is no regular expression",
    "--model.learning_rate=0": "learning_rate must be a finite number above 0; found 0.0.",
    "--model.model=junk": "The model 'junk' cannot be read",
    "--data.block_size=0": "block_size must be an integer from 2",
    "--trainer.callbacks={class_path: lit_prune.callbacks.PruningReport, init_args: {speed_tokens: 0}}": "speed_tokens must",
    "--trainer.callbacks={class_path: lit_prune.callbacks.LoRARecovery, init_args: {r: 0}}": "r must be an integer of 1 or more",
}


def train(arguments):
    return run("train.py", CausalLMModule, TextDataModule, ["fit", *arguments])


@pytest.mark.parametrize("option", TRAIN)
def test_options_of_training_that_cannot_be(given, option, capsys):
    code, said = ends(train, [*TRAINING, option], capsys)
    assert said.startswith("train.py: error: ")
    assert TRAIN[option] in said
    assert code == 2


def test_debug_shows_the_traceback(given, capsys):
    with pytest.raises(ArgumentValueError, match="batches must be"):
        main(["plan", "model", "out", "--calibration.batches=0", "--debug"])
    with pytest.raises(ArgumentValueError, match="learning_rate must be"):
        train([*TRAINING, "--model.learning_rate=0", "--debug"])
    for arguments in (["plan", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault", [ValueError("x"), KeyError("x"), AttributeError("x"), ImportError("x"), TypeError("x")]
)
def test_a_fault_of_the_program_keeps_its_traceback(fault):
    with pytest.raises(type(fault)), errors_as_sentences("lit-prune", debug=False):
        raise fault


def test_what_a_reader_raises_becomes_one_error_that_names_the_file():
    with (
        pytest.raises(ArgumentValueError, match=r"^The file 'a' cannot be read: KeyError: 'x'$"),
        reading("The file 'a'"),
    ):
        raise KeyError("x")
    with pytest.raises(PruningError, match="as it was"), reading("The file 'a'"):
        raise PruningError("as it was")
    with pytest.raises(FileNotFoundError), reading("The file 'a'"):
        Path("/absent/file").read_text()


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(given, tmp_path, capsys):
    """The kernel refuses to write more than a few bytes, as it does where no space is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(_):
        with errors_as_sentences("lit-prune", debug=False):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                write_file(tmp_path / "figures.json", "x" * 1000)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    code, said = ends(full, [], capsys)
    assert code == 1
    assert said.startswith("lit-prune: error: File too large")
    assert not list(tmp_path.iterdir())


def test_a_report_in_a_folder_that_cannot_be_written_ends_before_any_work(given, monkeypatch, capsys):
    shutil.copytree(given / "model", given / "no-model", dirs_exist_ok=True)
    (given / "no-model" / "model.safetensors").write_text("damaged")
    # the model would be an error, too, and is not looked at
    code, said = ends(main, ["plan", "no-model", "/proc/absent/out", *SMALL], capsys)
    assert "/proc/absent/out" in said
    assert code == 1
