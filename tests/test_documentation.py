"""Every snippet of README.md and docs/ runs as it stands, with the result that is stated beside it."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from any_models import ConvNet, images
from litgpt_package import named, write_folder
from own_models import MyGPT
from test_pruning import corpus
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import lit_prune
from conftest import tiny
from lit_prune import cli
from lit_prune.callbacks import PruningReport, StructuredPruning
from lit_prune.cli.running import parser_of
from lit_prune.training import CausalLMModule, TextDataModule, classification
from lit_prune.training.command_line import run

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:python|lit-prune|make|pip|pytest) [^`]*)`(?!`)")


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    found = [(m.start(), m[2], m[3]) for m in FENCED.finditer(text)]
    found += [(m.start(), "bash", " ".join(m[1].split())) for m in INLINE.finditer(FENCED.sub(_blank, text))]
    return [Snippet(page, text.count("\n", 0, at) + 1, language, body) for at, language, body in sorted(found)]


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


EVERY = [snippet for page in PAGES for snippet in snippets(page)]


class Texts(L.LightningModule):
    """A user's module with a language model somewhere in it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.net = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Data(L.LightningDataModule):
    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def text_rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in corpus(8, 0)]


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


class Pictures(Texts):
    """A user's module with a network of their own in it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def image_rows() -> list[dict[str, torch.Tensor]]:
    pixels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": p, "labels": torch.tensor(i % 3)} for i, p in enumerate(pixels)]


def reader(page: Path) -> dict[str, Any]:
    """What a reader of the page has before a snippet: a model, data, a module."""
    model, module = tiny(), Texts(tiny())
    vision = "vision" in page.stem
    return {
        "L": L,
        "torch": torch,
        "lit_prune": lit_prune,
        "StructuredPruning": StructuredPruning,
        "model": model,
        "batches": list(DataLoader(text_rows(), batch_size=2)),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "module": module,
        "my_module": module,
        "my_classifier": Texts(vit()),
        "datamodule": Data(text_rows()),
        "my_datamodule": Data(image_rows() if vision else text_rows()),
        "MyNet": ConvNet,
        "net": ConvNet(),
        "images": [images(8, seed) for seed in range(3)],
        "my_loss": torch.nn.functional.cross_entropy,
        "my_network": Pictures(ConvNet()),
        "my_images": Data(list(zip(*images(16), strict=True))),
        "tiny_random_model": MyGPT(64),
        "MyGPT": MyGPT,
        "tokens": torch.arange(12)[None],
        "wikipedia": 16 * text_rows(),
        "python_docs": 16 * text_rows(),
    }


def write_checkpoint(folder: Path) -> L.Trainer:
    """Write last.ckpt of a run that pruned and was logged, and give a Trainer that can go on from it."""

    def trainer(**options: Any) -> L.Trainer:
        callbacks = [StructuredPruning(epoch=1), PruningReport(save_model=False)]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return L.Trainer(default_root_dir=folder, callbacks=callbacks, accelerator="cpu", **quiet, **options)

    first = trainer(max_epochs=2)
    first.fit(Texts(tiny()), Data(text_rows()))
    first.callbacks[1].load_state_dict({"metrics": {}, "timeline": [], "wandb_run": "a-run"})
    first.save_checkpoint(folder / "last.ckpt")
    return trainer(max_epochs=3)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_ratio(snippet: Snippet, names: dict[str, Any]) -> None:
    """What is asked for is removed, as near as the smallest group lets it be."""
    asked = re.search(r"pruning_ratio=([\d.]+)", snippet.text)
    ratio = float(asked[1]) if asked else names["config"].pruning_ratio if "config" in names else None
    pruned = names["my_classifier" if "my_classifier" in snippet.text else "my_module"].net
    if ".prune(" in snippet.text or "apply_plan(" in snippet.text:
        pruned = names["model"]
    elif "trainer.fit(my_" not in snippet.text:
        return
    dense = vit() if "my_classifier" in snippet.text else tiny()
    if "litgpt" in snippet.page.stem:
        dense = named("Llama-3.2-1B")
    if "MyNet()" in snippet.text or "my_network" in snippet.text:
        pruned = names["net"] if "MyNet()" in snippet.text else names["my_network"].net
        dense = ConvNet()
    removed = 1 - parameters(pruned) / parameters(dense)
    assert ratio is not None
    assert ratio - 0.03 < removed <= ratio


def check_long_form(snippet: Snippet, names: dict[str, Any]) -> None:
    """The long form of pruning does what the short one does."""
    if "make_plan(" in snippet.text and "apply_plan(" in snippet.text:
        short = tiny()
        _, plan = lit_prune.prune(short, names["batches"], lambda batch: short(**batch).loss, names["config"])
        assert lit_prune.get_plan(names["model"]) == plan
        assert lit_prune.PruningPlan.load("plan.json") == plan
        for name, parameter in short.named_parameters():
            torch.testing.assert_close(names["model"].get_parameter(name), parameter)


def check_files(snippet: Snippet, names: dict[str, Any]) -> None:
    """What is written can be read."""
    del names
    if "to_csv(" in snippet.text:
        assert len(lit_prune.GroupTable.read("group_table.csv")) > 0


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(s.language == "python" for s in snippets(p))], ids=lambda p: p.stem
)
def test_python_runs_with_the_stated_result(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    written: dict[str, Any] = {}
    if "litgpt" in page.stem:
        write_folder(tmp_path / "checkpoints" / "meta-llama" / "Llama-3.2-1B")
    elif "last.ckpt" in page.read_text(encoding="utf-8"):
        written["trainer"] = write_checkpoint(tmp_path)
    for snippet in snippets(page):
        if snippet.language == "python":
            # the model of the reader in place of "model = ...", anew for each snippet; the rest is of the ones before
            names = {**reader(page), **written}
            before = dict(names)
            code = re.sub(r"^(\w+) = \.\.\.", r"\1 = \1", snippet.text, flags=re.MULTILINE)
            exec(compile("\n" * snippet.line + code, str(page), "exec"), names)
            for check in (check_ratio, check_long_form, check_files):
                check(snippet, names)
            written |= {n: v for n, v in names.items() if before.get(n) is not v and n != "__builtins__"}


def commands(snippet: Snippet) -> list[list[str]]:
    lines = snippet.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.replace("COMMAND", "plan"), comments=True))]


def parsed(function: Any, arguments: list[str]) -> None:
    """The command line takes the arguments; nothing is run."""
    with pytest.raises(SystemExit) as ended:
        function(arguments)
    assert not ended.value.code


def _train(arguments: list[str]) -> None:
    run("train.py", CausalLMModule, TextDataModule, arguments)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if program == "lit-prune":
        if len(arguments) == 1 and not arguments[0].startswith("-"):
            arguments.append("--help")
        if "--help" in arguments:
            parsed(cli.main, arguments)
        elif arguments[0] == "evaluate":
            assert not arguments[1].startswith("-")
        else:
            parser_of(arguments[0]).parse_args(arguments[1:])
    elif program == "python" and arguments[0] == "train.py":
        shown = [] if "--help" in arguments or len(arguments) == 1 else ["--print_config"]
        parsed(_train, [*(arguments[1:] or ["--help"]), *shown])
    elif program == "python" and arguments[:2] == ["-m", "lit_prune.training.classification"]:
        parsed(classification.main, [*arguments[2:], "--print_config"])
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    elif program == "python":
        script = ROOT / arguments[0]
        source = "".join(p.read_text(encoding="utf-8") for p in (script, *script.parent.glob("*.py")))
        assert all(f'"{option}"' in source for option in arguments if option.startswith("--"))
    elif program == "lm-eval":
        assert "--model_args" in arguments and any("pretrained=" in word for word in arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
        assert arguments[0] == "install"
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    else:
        pytest.fail(f"there is no check of {program!r}")


@pytest.mark.parametrize("snippet", [s for s in EVERY if s.language in ("bash", "sh", "console")], ids=str)
def test_commands_are_taken(snippet, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["pytest"])
    for words in commands(snippet):
        check_command(words)
    capsys.readouterr()


@pytest.mark.parametrize("snippet", [s for s in EVERY if s.language in ("yaml", "yml")], ids=str)
def test_configurations_are_taken(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pytest"])
    file = tmp_path / "config.yaml"
    file.write_text(snippet.text)
    assert isinstance(yaml.safe_load(snippet.text), dict)
    needed = ["--model.model=model", "--data.tokenizer=model"]
    parsed(_train, ["fit", *needed, f"--config={file}", "--print_config"])
    capsys.readouterr()


def test_there_is_no_snippet_without_a_test():
    languages = {snippet.language for snippet in EVERY}
    assert languages <= {"python", "bash", "sh", "console", "yaml", "yml"}
    assert sum(s.language == "python" for s in EVERY) >= 4


def test_a_snippet_that_prunes_too_much_would_be_found(tmp_path, monkeypatch):
    """The long form as it was, which gives every iteration the whole ratio, fails the check."""
    monkeypatch.chdir(tmp_path)
    names = reader(ROOT / "README.md")
    names["config"] = lit_prune.PruningConfig(importance="magnitude", pruning_ratio=0.2, repair=None)
    wrong = "\n".join(
        [
            "for _ in range(2):",
            "    sets = lit_prune.find_group_sets(model)",
            "    table, plan = lit_prune.make_plan(model, sets, None, config)",
            "    lit_prune.apply_plan(model, plan)",
        ]
    )
    exec(wrong, names)
    with pytest.raises(AssertionError):
        check_ratio(Snippet(ROOT / "README.md", 1, "python", wrong), copy.copy(names))
