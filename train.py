"""Train and prune from YAML and the command line; `python train.py fit --help` explains every option."""

from lit_prune.training import CausalLMModule, TextDataModule
from lit_prune.training.command_line import PruningCLI as PruningCLI
from lit_prune.training.command_line import run

if __name__ == "__main__":
    run("train.py", CausalLMModule, TextDataModule)
