"""Train and prune from YAML and the command line; `python train.py fit --help` explains every option."""

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_prune.callbacks import StructuredPruning
from lit_prune.training import CausalLMModule, TextDataModule


class PruningCLI(LightningCLI):
    """LightningCLI with the pruning callback's options under ``pruning``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback."""
        parser.add_lightning_class_args(StructuredPruning, "pruning")


if __name__ == "__main__":
    PruningCLI(CausalLMModule, TextDataModule, save_config_kwargs={"overwrite": True})
