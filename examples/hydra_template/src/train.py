"""Hydra builds data, model, callbacks and trainer from ``_target_``; pruning is one more file of the group ``callbacks``.

python examples/hydra_template/src/train.py callbacks.pruning.pruning_ratio=0.6
"""

import sys
from pathlib import Path

import hydra
import lightning as L
from omegaconf import DictConfig

# the root of the project, as the template's rootutils sets it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig) -> None:
    """Train, with what the configuration names."""
    L.seed_everything(cfg.seed)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = [hydra.utils.instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=datamodule)


if __name__ == "__main__":
    main()
