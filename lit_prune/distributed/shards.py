"""Parameters that FSDP2 shards over processes: scoring local shards, cutting one parameter at a time.

A sharded parameter is a ``DTensor`` split along one dimension over a mesh of one dimension. Nothing here gathers more
than one parameter at a time, and gradients are never gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lit_prune.errors import UnsupportedStrategyError
from lit_prune.groups import BLOCK, GroupSet, Slice, is_inside
from lit_prune.torch_internals import (
    copy_without_hooks,
    forget_fsdp_unit,
    fsdp_parameters,
    is_fsdp_unit,
    is_offloaded,
    manage_anew,
    tables,
)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a shard of a larger one."""
    return isinstance(tensor, DTensor)


def sharded_dim(tensor: DTensor) -> int:
    """The dimension that a sharded tensor is split along."""
    return tensor.placements[0].dim  # type: ignore[attr-defined]


def any_sharded(tensors: Iterable[Tensor]) -> DTensor | None:
    """The first sharded one of some tensors."""
    return next((t for t in tensors if isinstance(t, DTensor)), None)


def check_layout(model: nn.Module, group_sets: Iterable[GroupSet]) -> None:
    """Refuse a model whose groups are sharded in a way that cannot be cut.

    Raises:
        UnsupportedStrategyError: If their parameters are sharded over more than one dimension of a mesh (tensor
            parallelism, or replicated groups of shards), or not through ``fully_shard`` on a module within the model; if they
            are kept in CPU memory; or if whole blocks may leave that are not units of their own.
    """
    group_sets = list(group_sets)
    managed = list(_managed(model))
    units = {id(p.sharded_param): name for name, p in managed}
    if (offloaded := next((name for name, p in managed if is_offloaded(p)), None)) is not None:
        raise UnsupportedStrategyError(
            f"FSDP2 keeps the parameters of {offloaded or 'the model'!r} in CPU memory (CPUOffloadPolicy): it copies gradients"
            " there while the backward pass goes on, where calibration would read them too early, and they cannot be"
            " gathered to be cut. Call fully_shard without offload_policy; it can be given again to a model that is built from"
            " the pruned checkpoint."
        )
    for name in {part.parameter: None for group_set in group_sets for part in group_set.slices}:
        parameter = model.get_parameter(name)
        if not isinstance(parameter, DTensor):
            continue
        if parameter.device_mesh.ndim != 1 or not isinstance(parameter.placements[0], Shard):
            raise UnsupportedStrategyError(
                f"{name!r} has the placements {parameter.placements} on a mesh of shape"
                f" {tuple(parameter.device_mesh.shape)}; expected shards along one mesh dimension. Use fully_shard with"
                " ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)."
            )
        if id(parameter) not in units:
            raise UnsupportedStrategyError(
                f"{name!r} is sharded, but not by torch.distributed.fsdp.fully_shard on a module within the model; expected"
                " that, in configure_model, on every block."
            )
    for block in (s for s in group_sets if s.kind == BLOCK):
        for part in block.slices:
            unit = units.get(id(model.get_parameter(part.parameter)), block.name)
            if not is_inside(unit, block.name):
                raise UnsupportedStrategyError(
                    f"{part.parameter!r} is sharded as a part of {unit or 'the whole model'!r}, which holds more than the block"
                    f" {block.name!r} that may be removed. Use fully_shard, in configure_model, on every block, or prune other"
                    " kinds."
                )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors that this process holds: of its own parts of those that are sharded."""
    return sum(local(tensor).nbytes for tensor in tensors)


def full(tensor: Tensor) -> Tensor:
    """The whole of one tensor; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_range(tensor: DTensor) -> tuple[int, int, int]:
    """The dimension that a tensor is split along, and where this process's part of it starts and ends."""
    dim, size = sharded_dim(tensor), tensor.device_mesh.size()
    length = tensor.shape[dim]
    # as torch.chunk splits: every part but the last ones has the same length
    chunk = (length + size - 1) // size
    rank = tensor.device_mesh.get_local_rank()
    return dim, min(chunk * rank, length), min(chunk * (rank + 1), length)


def sum_by_group(part: Slice, line: Tensor, parameter: Tensor) -> Tensor:
    """What this process's part of a parameter adds to every group of a slice.

    Args:
        part: The slice.
        line: One number for every position of the local part along the slice's dimension.
        parameter: The parameter.

    Returns:
        Tensor of shape ``(groups,)``.
    """
    if isinstance(parameter, DTensor):
        dim, start, _ = local_range(parameter)
        if dim == part.dim:
            return part.sum_by_group(line, start, parameter.shape[dim])
    return part.sum_by_group(line)


def local_part(values: Tensor, parameter: Tensor) -> Tensor:
    """The part of values, broadcastable against the whole parameter, that belongs to the local part."""
    if isinstance(parameter, DTensor) and values.dim() == parameter.dim():
        dim, start, stop = local_range(parameter)
        if values.shape[dim] > 1:
            return values.narrow(dim, start, stop - start)
    return values


def once(values: Tensor, like: DTensor) -> Tensor:
    """Values that every process holds whole, made ready for :func:`sum_over_shards`."""
    return values if like.device_mesh.get_local_rank() == 0 else torch.zeros_like(values)


def sum_over_shards(values: Tensor, like: DTensor) -> Tensor:
    """The sum of what the parts of a sharded parameter add, over the processes that hold them."""
    total = values.to(like.to_local().device, copy=True)
    dist.all_reduce(total, group=like.device_mesh.get_group())
    return total.to(values.device)


def shard_like(whole: Tensor, like: DTensor) -> DTensor:
    """Keep this process's part of a tensor that all processes hold, split as another tensor is."""
    dim, rank, size = sharded_dim(like), like.device_mesh.get_local_rank(), like.device_mesh.size()
    chunks = list(whole.chunk(size, dim=dim))
    part = chunks[rank] if rank < len(chunks) else whole.narrow(dim, 0, 0)
    return DTensor.from_local(
        part.contiguous().clone(), like.device_mesh, like.placements, shape=whole.shape, stride=whole.stride()
    )


def _managed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """FSDP2's own record of every parameter that it shards, with the name of the module that it shards it as a part of."""
    for name, module in model.named_modules():
        yield from ((name, record) for record in fsdp_parameters(module))


def release(block: nn.Module) -> Callable[[], None]:
    """Let FSDP2 forget a block that leaves its model, whose parameters it manages from within; return what undoes this."""
    undos = [forget_fsdp_unit(module) for module in block.modules()]

    def undo() -> None:
        for put_back in reversed(undos):
            put_back()

    return undo


def reshard(model: nn.Module) -> None:
    """Let every module hold its shards: after a forward without a backward the outermost one holds whole parameters."""
    for module in model.modules():
        if is_fsdp_unit(module):
            module.reshard()


def replace(root: nn.Module, old: DTensor, whole: Tensor) -> nn.Parameter:
    """Let FSDP2 manage a new, whole value of other sizes in the place of a sharded parameter.

    Args:
        root: A module that holds the parameter, and every module that FSDP2 manages it from.
        old: The parameter.
        whole: The new value, the same on all processes.

    Returns:
        The new sharded parameter, which is in its place already.
    """
    record = next(p for _, p in _managed(root) if p.sharded_param is old)
    return manage_anew(record, old, nn.Parameter(whole.contiguous(), requires_grad=old.requires_grad))


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that is sharded nowhere, with whole parameters and without hooks; a collective.

    The module itself, uncopied, if nothing in it is sharded.
    """
    if any_sharded(module.parameters()) is None:
        return module
    return _plain(module, {})


def _plain(module: nn.Module, done: dict[int, Any]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    copy = done[id(module)] = copy_without_hooks(module)
    parameters, _, modules = tables(copy)
    for name, parameter in parameters.items():
        if parameter is not None:
            whole = full(parameter.detach()).clone()
            parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    for name, inner in modules.items():
        modules[name] = None if inner is None else _plain(inner, done)
    return copy
