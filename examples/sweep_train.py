"""One point of the sweep: train, prune by the given ratio and criterion, recover, and log to Weights & Biases.

WANDB_MODE=offline python examples/sweep_train.py --pruning_ratio=0.3 --importance=fisher
"""

import argparse
import json
from pathlib import Path

import lightning as L
import wandb
from digits import DigitClassifier, loaders, vit
from lightning.pytorch.loggers import WandbLogger

from lit_prune.callbacks import PruningReport, StructuredPruning

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pruning_ratio", type=float, default=0.3)
    parser.add_argument("--importance", default="fisher")
    point = vars(parser.parse_args())
    L.seed_everything(0)
    folder = Path("outputs/sweep") / f"{point['importance']}-{point['pruning_ratio']}"
    folder.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(project="lit_prune-sweep", config=point, save_dir=folder)
    report = PruningReport(folder, save_model=False)
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[StructuredPruning(**point, epoch=5, calibration_batches=4), report],
    )
    trainer.fit(DigitClassifier(vit()), *loaders())
    (folder / "point.json").write_text(json.dumps({**point, **report.metrics["recovered"]}))
    wandb.finish()
