"""FLOPs of a forward pass, by the parameter that is multiplied, so that those of a cut model are known before the cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, shape_wrapper

from lit_prune.budgets.running import running_modules
from lit_prune.budgets.sizes import SizeModel, SizeSum, block_around, innermost_sets
from lit_prune.budgets.workloads import Workload
from lit_prune.groups import BLOCK, GroupSet, Slice, is_inside
from lit_prune.torch_internals import GROUPED_PRODUCTS, DispatchMode, packet_of

# up to here a model is run as it is; beyond, attention as matrix products would take too much memory
_LONGEST = 1024


def _grouped_products(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of the products of rows with one matrix each, out of several: of tokens with their experts."""
    del out_shape
    return 2 * math.prod(a) * b[-1]


# what torch's registry lacks
_MORE = {GROUPED_PRODUCTS: _grouped_products}


def count_flops(workload: Workload) -> int:
    """FLOPs of one forward pass, by the formulas of :class:`torch.utils.flop_counter.FlopCounterMode`.

    That class itself watches gradients of what modules are called with, and fails for a module that is called with a parameter.
    Attention is run as matrix products, as torch has no formula of the fused kernels for CPUs. Long sequences are not run: the
    count is a polynomial in the length, of degree 2, through those of three short ones.
    """
    return round(sum(_by_product(workload).values()))


def flops_model(workload: Workload, group_sets: Sequence[GroupSet]) -> SizeSum:
    """FLOPs of a forward pass as a function of how many groups stay in every set.

    A product with a parameter takes operations in proportion to the parameter's size, whatever the operator: each row of a
    linear layer's weight is multiplied once a position, each element of a kernel once a place. Products without one, the
    scores of attention, are in proportion to the groups of the set whose module computes them; where it has none, they leave with
    the block around it. A token goes to as many experts as before, so that experts that leave save nothing but their rows of
    the router, unless every expert is given every token.

    Args:
        workload: The model and what it is run on; it runs once, or three times in place of a long sequence.
        group_sets: The group sets of the model.
    """
    model = workload.model
    parameters = dict(model.named_parameters())
    flops = _by_product(workload)
    tokens = workload.batch * workload.length if workload.tokens else math.inf

    def counts(group_set: GroupSet, part: Slice) -> bool:
        parameter = model.get_parameter(part.parameter)
        stacked = parameter.dim() == 3 and part.dim == 0 and part.input_dim is None and not group_set.consumers
        # as many as if every expert were given every token
        return not stacked or flops.get(f"{part.parameter}:", 0) >= 2 * parameter.numel() * tokens

    sizes = SizeModel(model, group_sets, counts)
    weight = np.array([flops.pop(f"{name}:", 0) / max(parameters[name].numel(), 1) for name in sizes.names])
    per_group, constant = np.zeros(len(group_sets)), 0.0
    for name, number in flops.items():
        nearest = _nearest(name, group_sets)
        if nearest is None:
            nearest = block_around(name, group_sets)
        if nearest is None:
            constant += number
        else:
            per_group[nearest] += number / group_sets[nearest].size
    return SizeSum(sizes, weight, per_group, constant)


def _by_product(workload: Workload) -> dict[str, float]:
    """FLOPs of one forward pass by what is multiplied, see :class:`_Products`."""

    def count(length: int) -> dict[str, int]:
        products = _Products(workload.model)
        with sdpa_kernel(SDPBackend.MATH), products.counting():
            workload.forward(length)
        return products.flops

    return _at_length(count, workload)


def _at_length(count: Callable[[int], dict[str, int]], workload: Workload) -> dict[str, float]:
    """What ``count`` gives for the length of the workload, by Lagrange's formula from three shorter ones if that is long."""
    length = workload.length
    if length <= _LONGEST or not workload.tokens:
        return {name: float(number) for name, number in count(length).items()}
    points = [length % 64 + 64 * k for k in (2, 3, 4)]
    counts = [count(point) for point in points]
    total: dict[str, Fraction] = {}
    for point, found in zip(points, counts, strict=True):
        others = [other for other in points if other != point]
        share = math.prod((Fraction(length - other, point - other) for other in others), start=Fraction(1))
        for name, number in found.items():
            total[name] = total.get(name, Fraction(0)) + share * number
    return {name: float(number) for name, number in total.items()}


def _nearest(module: str, group_sets: Sequence[GroupSet]) -> int | None:
    """The set that the module's own products are of: that of the innermost module around it, or inside it."""
    if around := innermost_sets(module, group_sets):
        return around[-1]
    inside = [i for i, s in enumerate(group_sets) if s.kind != BLOCK and module and is_inside(s.name, module)]
    return inside[0] if len(inside) == 1 else None


class _Products(DispatchMode):
    """Counts FLOPs by the parameter that is multiplied ("NAME:"), and where there is none, by the module that multiplies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: dict[str, int] = {}
        self._names = {_memory(p): name for name, p in model.named_parameters()}
        self._model = model
        self._inside: list[str] = []

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs meanwhile. The mode itself is entered again for every composite operator."""
        with running_modules(self._model) as self._inside, self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = packet_of(func)
        formula = shape_wrapper(_MORE[packet]) if packet in _MORE else flop_registry.get(packet)
        if formula is None and packet is not torch.ops.prim.device:
            # what torch.utils.flop_counter does: products inside composite operators count
            with self:
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if formula is not None:
            name = self._owner(args)
            self.flops[name] = self.flops.get(name, 0) + formula(*args, **kwargs, out_val=result)
        return result

    def _owner(self, operands: Sequence[Any]) -> str:
        memories = [_memory(operand) for operand in operands if isinstance(operand, Tensor)]
        if known := [self._names[memory] for memory in memories if memory in self._names]:
            # a bias may be an operand, too
            return f"{max(known, key=lambda name: self._model.get_parameter(name).numel())}:"
        innermost = self._inside[-1] if self._inside else ""
        # a copy of the weight in another precision
        return f"{innermost}.weight:" if _multiplies_own_weight(self._model, innermost) else innermost


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _multiplies_own_weight(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return not any(True for _ in module.children()) and isinstance(getattr(module, "weight", None), nn.Parameter)
