"""Second of two commands: take the model artifact of the first one, train it further, and log where it came from.

    WANDB_MODE=offline python examples/pipeline_finetune.py

With a connection the artifact is fetched from the server, which records it as an input of this run. Offline the client
refuses ``use_artifact``: the content is read where the first run left it, and compared with the artifact's digest. The run's
config names the artifact in both cases.
"""

import json
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import wandb
from digits import DigitClassifier, loaders
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

import lit_prune

FOLDER = Path("outputs/pipeline")


def consume(run: wandb.Run) -> Path:
    """The folder with the content of the artifact that the first command made."""
    handover = json.loads((FOLDER / "handover.json").read_text())
    run.config["consumed"] = {name: handover[name] for name in ("artifact", "digest")}
    if not run.offline:
        return Path(run.use_artifact(f"{handover['artifact']}:latest").download())
    artifact = wandb.Artifact(handover["artifact"], type="model")
    artifact.add_dir(handover["folder"])
    if artifact.digest != handover["digest"]:
        raise SystemExit(f"{handover['folder']} has changed since {handover['artifact']} was logged. Prune again.")
    return Path(handover["folder"])


if __name__ == "__main__":
    L.seed_everything(0)
    logger = WandbLogger(project="lit_prune-pipeline", job_type="finetune", save_dir=FOLDER)
    model = lit_prune.load_pruned(consume(logger.experiment))
    module, (train, held_out) = DigitClassifier(model, lr=1e-3), loaders()
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False
    )
    measured = [trainer.validate(module, held_out, verbose=False)[0]]
    trainer.fit(module, train, held_out)
    measured.append({name: float(trainer.callback_metrics[name]) for name in measured[0]})
    table = Table("", "pruned", "fine-tuned", title="pipeline")
    for name in measured[0]:
        table.add_row(name, *(f"{values[name]:.4f}" for values in measured))
    Console().print(table)
    figure, axis = plt.subplots()
    axis.bar(["pruned", "fine-tuned"], [values["val_accuracy"] for values in measured], color=["#c8553d", "#2a6f97"])
    axis.set_ylabel("accuracy on held-out digits")
    figure.savefig(FOLDER / "finetuned.png")
    logger.experiment.log({"accuracy": wandb.Image(figure)})
    lit_prune.save_pruned(model, FOLDER / "finetuned")
    wandb.finish()
