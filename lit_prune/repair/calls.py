"""A recorded call of a decoder layer, and a copy of the layer to run it on."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_prune.calibration.precision import Precision


@dataclass(frozen=True)
class BlockCall:
    """What a block was called with besides hidden states, and the precision that it was computed in.

    Args:
        args: Further positional arguments.
        kwargs: Arguments by keyword.
        precision: Autocast and default dtype of the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: Precision

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call a block with other hidden states, in the same precision.

        Args:
            block: The block, or a copy that was cut.
            hidden: Hidden states in place of the recorded ones, of their shape.
        """
        with self.precision.entered():
            return block(hidden, *self.args, **self.kwargs)


def copy_to_cut(block: nn.Module, written: Collection[str]) -> nn.Module:
    """Return a copy of a block to be cut: its parameters share their memory with the block's until a cut replaces it.

    Args:
        block: The block.
        written: Names of the parameters that are going to be written into; these are copied.
    """
    named = list(block.named_parameters(remove_duplicate=False))
    own = {id(parameter) for name, parameter in named if name in written}
    memo: dict[int, Any] = {}
    for _, parameter in named:
        data = parameter.detach().clone() if id(parameter) in own else parameter.detach()
        memo.setdefault(id(parameter), nn.Parameter(data, requires_grad=parameter.requires_grad))
    return copy.deepcopy(block, memo)
