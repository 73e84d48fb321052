"""The models of benchmarks/any_module.py: how each is built, what it reads, and its loss.

The rows of each source stand in a file of their own (``zoo_torchvision.py``, ``zoo_timm.py``, ...). All are real code with
random weights, of the smallest variants and image sizes that run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Forward = Callable[[Any, Any], Any]
CLASSES = 10
CLASSIFICATION, OTHER = "classification", "other"


def call(model: Any, batch: Any) -> Any:
    """The model's outputs for a batch ``(inputs, labels)``."""
    return model(batch[0])


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """Mean cross-entropy; classes are the last dimension of the outputs."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def spread(outputs: Any, batch: Any) -> Tensor:
    """Sum of the mean squares of every output: a loss for models whose task is not the point."""
    return torch.stack([leaf.square().mean() for leaf in float_leaves(outputs)]).sum()


def float_leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in some outputs."""
    if hasattr(outputs, "to_tuple"):
        outputs = outputs.to_tuple()
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Args:
        source: Package or kind: ``"torchvision"``, ``"timm"``, ``"litgpt"``, ``"torch"``, ``"speech"``, ``"own"``.
        name: Name of the model, unique in its source.
        build: Makes the model; the seed is set before.
        batch: Makes a batch; the seed is set before.
        task: ``"classification"``, ``"segmentation"``, ``"detection"``, ...
        forward: Outputs of model and batch, the same in training and evaluation mode up to dropout and batch statistics.
        loss: Loss of outputs and batch.
    """

    source: str
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    task: str = OTHER
    forward: Forward = call
    loss: Callable[[Any, Any], Tensor] = spread

    @property
    def key(self) -> str:
        """Source and name, unique in the table."""
        return f"{self.source}/{self.name}"

    def make(self) -> tuple[nn.Module, Any]:
        """The model in evaluation mode and two examples, the same at every call."""
        torch.manual_seed(0)
        model = self.build().eval()
        _vary(model)
        torch.manual_seed(1)
        return model, self.batch()


def _vary(model: nn.Module) -> None:
    """Give norms and everything else that begins as a constant random values, so that no error hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point() or value.numel() < 2 or value.min() != value.max():
                continue
            statistic = name.endswith(("running_mean", "running_var"))
            if statistic or isinstance(value, nn.Parameter):
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(value + 0.2 * noise - (0.0 if name.endswith("var") else 0.1))


def images(size: int, count: int = 2, channels: int = 3, classes: int = CLASSES) -> Callable[[], Any]:
    """Makes batches of random images and labels."""
    return lambda: (torch.randn(count, channels, size, size), torch.randint(classes, (count,)))


def rows() -> dict[str, Row]:
    """All rows of the table by key."""
    import zoo_litgpt
    import zoo_own
    import zoo_speech
    import zoo_timm
    import zoo_torch
    import zoo_torchvision

    sources = (zoo_torch, zoo_own, zoo_speech, zoo_litgpt, zoo_torchvision, zoo_timm)
    return {row.key: row for source in sources for row in source.ROWS}
