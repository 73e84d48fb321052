"""Which modules of a model are being called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Keep a list of the names of the modules that are being called, the outermost first; those that fail leave it, too.

    Hooks that were put on a module before find it without this module when the call begins, and with it when it ends.
    """
    running: list[str] = []
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: _leave(running), always_call=True).remove)
        yield running


def _leave(running: list[str]) -> None:
    # what a hook returns takes the place of the output
    running.pop()
