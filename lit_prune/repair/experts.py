"""What the experts of a mixture are refitted from: the channels of each, seen where they meet its output projection.

The weights of all experts of a layer are one tensor, and no module of its own reads the channels. But every function
that multiplies with a part of that tensor can be watched, and the part's place in memory tells whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.architectures.config_view import override_config
from lit_prune.calibration.gram import add_product
from lit_prune.calibration.precision import accumulation_dtype, transposed_product
from lit_prune.repair.calls import BlockCall
from lit_prune.transformers_internals import EXPERTS_FIELD, has_choice_of_experts

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm")


class StopForward(Exception):
    """Ends a forward once everything that was wanted of it is known."""


@torch.no_grad()
def expert_equations(
    block: nn.Module,
    path: str,
    output: str,
    output_dim: int,
    kept: Tensor,
    inputs: Iterable[Tensor],
    calls: Sequence[BlockCall],
    masks: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """The normal equations of every expert's output projection, on the channels that stay.

    Args:
        block: A copy of the block of the model, with everything cut but the channels of these experts; from then on its
            experts run one after the other.
        path: Path of the module of the experts within it.
        output: Name of its parameter that reads the channels, shape ``(experts, ...)`` with three dimensions.
        output_dim: The dimension of it that the channels lie along.
        kept: The channels that stay.
        inputs: Hidden states that the block is called with, each ``(batch, tokens, hidden)``.
        calls: Further arguments of each call.
        masks: For each call the tokens that count, ``(batch, tokens)``; all of them if ``None``.

    Returns:
        For every expert the Gram matrix of the channels that stay over the tokens that went to it, ``(experts, kept,
        kept)``; and the products of what it gave, with all its channels, with those channels, ``(experts, hidden, kept)``;
        and the number of those tokens, ``(experts,)``.
    """
    experts = block.get_submodule(path)
    if has_choice_of_experts(experts):
        # one expert after the other, not all of them in one kernel
        override_config(experts, EXPERTS_FIELD, "eager")
    seen = _Seen(experts.get_parameter(output), output_dim, kept)
    mask: Tensor | None = None

    def real(value: Any) -> Any:
        return value[mask] if isinstance(value, Tensor) and mask is not None and len(value) == len(mask) else value

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(real(a) for a in args), {name: real(a) for name, a in kwargs.items()}

    def after(*_: Any) -> None:
        raise StopForward

    handles = [experts.register_forward_pre_hook(before, with_kwargs=True), experts.register_forward_hook(after)]
    try:
        for x, call, tokens in zip(inputs, calls, masks, strict=True):
            mask = None if tokens is None else tokens.flatten()
            try:
                with seen:
                    call.run(block, x)
            except StopForward:
                pass
    finally:
        for handle in handles:
            handle.remove()
    return seen.gram, seen.cross, seen.tokens


class _Seen(TorchFunctionMode):
    """Watches the products with a parameter of shape ``(experts, ...)``, and adds up the equations of each expert."""

    def __init__(self, parameter: Tensor, dim: int, kept: Tensor) -> None:
        super().__init__()
        self._parameter, self._dim, self._kept = parameter, dim, kept.to(parameter.device)
        experts, outputs = len(parameter), parameter.shape[3 - dim]
        precision = accumulation_dtype(parameter.dtype)
        self.gram = parameter.new_zeros(experts, len(kept), len(kept), dtype=precision)
        self.cross = parameter.new_zeros(experts, outputs, len(kept), dtype=precision)
        self.tokens = parameter.new_zeros(experts, dtype=torch.float32)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in _PRODUCTS and len(args) > 1 and self._is_part(args[1]):
            x, weight = args[0], args[1]
            if weight.dim() == 3:
                for expert in range(len(weight)):
                    self._add(expert, x[expert])
            else:
                first = self._parameter.storage_offset()
                self._add((weight.storage_offset() - first) // self._parameter.stride(0), x)
        return result

    def _is_part(self, tensor: Any) -> bool:
        whole = self._parameter
        if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return False
        # other parameters may lie in the same memory
        return 0 <= tensor.storage_offset() - whole.storage_offset() < whole.numel()

    def _add(self, expert: int, channels: Tensor) -> None:
        weight = self._parameter[expert] if self._dim == 1 else self._parameter[expert].T
        x = channels.reshape(-1, channels.shape[-1]).to(self.gram.dtype)
        stays = x[:, self._kept]
        self.tokens[expert] += len(x)
        add_product(self.gram[expert], stays, stays)
        # as the weights are linear, their product with the inputs' products is that with the outputs
        add_product(self.cross[expert], weight.to(self.gram.dtype), transposed_product(x, stays))
