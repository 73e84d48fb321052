"""LightningCLI with the pruning callback, whose errors end in one sentence."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lit_prune.callbacks import StructuredPruning
from lit_prune.extras import require
from lit_prune.user_errors import DEBUG, DEBUG_HELP, check_groups, errors_as_sentences


class PruningCLI(LightningCLI):
    """LightningCLI with the pruning callback's options under ``pruning``; a wrong option raises ``ArgumentError``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: {"exit_on_error": False} for name in LightningCLI.subcommands()}
        kwargs["parser_kwargs"] = {"exit_on_error": False, **options}
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback."""
        parser.add_lightning_class_args(StructuredPruning, "pruning")
        parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and check that every group of options is one.

        Raises:
            ArgumentTypeError: If a configuration gives a number, a text or nothing for a group.
        """
        super().parse_arguments(parser, args)
        check_groups(self.config[self.config.subcommand], "trainer", "model", "data", "pruning")


def run(
    program: str,
    module: type[pl.LightningModule],
    data: type[pl.LightningDataModule],
    arguments: list[str] | None = None,
) -> PruningCLI:
    """Run a command line.

    Args:
        program: Name of the program, for its errors.
        module: Class of the LightningModule.
        data: Class of the LightningDataModule.
        arguments: The arguments; those of the process if ``None``.
    """
    require("jsonargparse", "cli", program)
    with errors_as_sentences(program, debug=DEBUG in (sys.argv if arguments is None else arguments)):
        return PruningCLI(module, data, save_config_kwargs={"overwrite": True}, args=arguments)
