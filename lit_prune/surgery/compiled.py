"""What torch.compile made of a model before a cut, and what it will make of it afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn

from lit_prune.torch_internals import compiled_modules, is_dynamo_loaded, recompile_limit


def forget_compiled(model: nn.Module) -> None:
    """Let torch.compile forget what it compiled, and warn if it will give up on the widths of a model.

    It compiles a forward once for each size of its parameters, and runs it uncompiled from a limit on. What was compiled for
    sizes that are gone would count. Everything that the process has compiled is compiled again when it runs.

    Args:
        model: A model after a cut.
    """
    if not is_dynamo_loaded():
        return
    torch.compiler.reset()
    limit = recompile_limit()
    for kind, names, sizes in _by_forward(model):
        if sizes > limit:
            warnings.warn(
                f"{len(names)} modules of the class {kind} are compiled each by itself ({names[0]!r}, ...) and have {sizes}"
                f" different sizes now; torch.compile takes {limit} and runs the others uncompiled. Compile the whole model"
                f" instead, set torch._dynamo.config.recompile_limit to {sizes} or more, or prune with"
                " Limits(uniform=True).",
                stacklevel=2,
            )


def _by_forward(model: nn.Module) -> Iterator[tuple[str, list[str], int]]:
    """Modules that are compiled each by itself, by class, and how many different sizes they have."""
    found: dict[type, dict[str, tuple[torch.Size, ...]]] = {}
    for name, module in compiled_modules(model):
        found.setdefault(type(module), {})[name] = tuple(p.shape for p in module.parameters())
    for kind, shapes in found.items():
        yield kind.__name__, list(shapes), len(set(shapes.values()))
