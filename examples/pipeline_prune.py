"""First of two commands: train and prune, and log the plan and the pruned model to Weights & Biases as artifacts.

    WANDB_MODE=offline python examples/pipeline_prune.py
    WANDB_MODE=offline python examples/pipeline_finetune.py

Each artifact has a digest of its content. handover.json names the model's, so that the second command takes this model and
no other.
"""

import json
from pathlib import Path

import lightning as L
import wandb
from digits import DigitClassifier, loaders, vit
from lightning.pytorch.loggers import WandbLogger

from lit_prune.callbacks import PruningReport, StructuredPruning

FOLDER = Path("outputs/pipeline")

if __name__ == "__main__":
    L.seed_everything(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(project="lit_prune-pipeline", job_type="prune", save_dir=FOLDER)
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[
            StructuredPruning(pruning_ratio=0.4, epoch=5, calibration_batches=4),
            PruningReport(FOLDER, log_model=True),
        ],
    )
    trainer.fit(DigitClassifier(vit()), *loaders())
    model = wandb.Artifact(f"pruned-model-{logger.experiment.id}", type="model")
    model.add_dir(str(FOLDER / "model"))
    handover = {"artifact": model.name, "digest": model.digest, "folder": str(FOLDER / "model")}
    (FOLDER / "handover.json").write_text(json.dumps(handover, indent=1))
    wandb.finish()
