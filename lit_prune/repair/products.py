"""What layers with a forward of their own multiply with their weight: the functional call that their forward makes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lit_prune.architectures.features import is_convolution
from lit_prune.architectures.plain_modules import has_own_forward
from lit_prune.torch_internals import version_of

_CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    functional.linear: _CONVOLVED[:3],
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _CONVOLVED),
    **dict.fromkeys(
        (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d), _TRANSPOSED
    ),
}


@dataclass(frozen=True)
class Product:
    """A functional call with a layer's weight.

    Args:
        module: The layer with the stride, padding and dilation of the call.
        inputs: What the weight was multiplied with.
        output: What the call gave.
        version: How often that had been changed in place by then.
    """

    module: nn.Module
    inputs: Tensor
    output: Tensor
    version: int


class Products(TorchFunctionMode):
    """Notes, while it is entered, the last functional call with the weight of each of some layers.

    Args:
        layers: Layers by path; only those with a forward of their own are looked at.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._own = {name: module for name, module in layers.items() if has_own_forward(module)}
        self._by_weight = {id(module.weight): module for module in self._own.values()}
        self._last: dict[int, Product] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _ARGUMENTS:
            given = {**dict(zip(_ARGUMENTS[func], args, strict=False)), **kwargs}
            module = self._by_weight.get(id(given["weight"]))
            if module is not None:
                self._last[id(module)] = _product(module, given, result)
        return result

    def watched(self) -> contextlib.AbstractContextManager[Any]:
        """The context to run the layers in; none if all are plain ones."""
        return self if self._own else contextlib.nullcontext()

    def of_call(
        self, name: str, module: nn.Module, given: Sequence[Any], output: Any
    ) -> tuple[nn.Module, Sequence[Any], bool]:
        """What a layer computed its output by.

        Args:
            name: Its path.
            module: The layer.
            given: What it was called with.
            output: What it gave.

        Returns:
            The layer as it was used, what it multiplied with its weight, and whether the product is what it gave; layer and
            arguments as they are where that is not so, and for plain layers.
        """
        if name not in self._own:
            return module, given, True
        product = self._last.pop(id(module), None)
        if product is None or output is not product.output or version_of(output) != product.version:
            return module, given, False
        return product.module, (product.inputs,), True


def _product(module: Any, given: Mapping[str, Any], result: Tensor) -> Product:
    inputs = given["input"]
    if is_convolution(module):
        module = copy.copy(module)
        module.kernel_size, module.padding_mode = tuple(module.weight.shape[2:]), "zeros"
        module.groups = given.get("groups", 1)
        for name in ("stride", "dilation", "output_padding"):
            setattr(module, name, _sizes(given.get(name, int(name != "output_padding")), module))
        padding = given.get("padding", 0)
        if padding == "same":
            reaches = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
            inputs = functional.pad(inputs, [n for r in reversed(reaches) for n in (r // 2, r - r // 2)])
        module.padding = _sizes(0 if isinstance(padding, str) else padding, module)
    return Product(module, inputs, result, version_of(result))


def _sizes(value: Any, module: Any) -> tuple[int, ...]:
    """A number, or one for each dimension of space, as one for each."""
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * len(module.kernel_size) if len(value) == 1 else value
