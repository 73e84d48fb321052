"""What this package uses of torch that torch does not document, in one place; ``tests/test_internals.py`` checks each.

Every function was checked with the versions in :data:`CHECKED`. Add a version once ``tests/test_internals.py`` passes with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

__all__ = ["CHECKED", "DispatchMode", "tree_leaves", "tree_map"]

CHECKED = ("2.13.0",)

# attributes of a module that hold its own parameters, buffers and submodules
TABLES = ("_parameters", "_buffers", "_modules")

# a class whose __torch_dispatch__ sees every operation; documented in a note of torch alone
DispatchMode = TorchDispatchMode

# the classes that torch's layers of one sort, of 1 to 3 dimensions, derive from
AnyConvolution = _ConvNd
AnyTransposedConvolution = _ConvTransposeNd
AnyBatchNorm = _BatchNorm
AnyRunningNorm = _NormBase

# multiplies rows with one matrix each, out of several
GROUPED_PRODUCTS = torch.ops.aten._grouped_mm

# the attribute of what torch.compile makes of a module that holds the module
COMPILED_FROM = "_orig_mod"


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def set_version(tensor: Tensor, version: int) -> None:
    """Let autograd take a tensor for written into ``version`` times, as ``torch.autograd`` does for collectives."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that this one is a view of, ``None`` if it is no view."""
    return tensor._base


def hook_tables(tensor: Tensor) -> Iterator[dict[int, Callable[..., Any]]]:
    """Return the tables of hooks of a parameter: those called with its gradient, and those called once it is accumulated."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if hooks := getattr(tensor, name, None):
            yield hooks


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Return whether something was registered by ``register_hook`` on a tensor."""
    return bool(tensor._backward_hooks)


def forward_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that run after a module's forward."""
    return list(module._forward_hooks.values())


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that run before a module's forward, which is where ``torch.nn.utils`` keeps its reparametrizations."""
    return list(module._forward_pre_hooks.values())


def pruned_name(hook: BasePruningMethod) -> str:
    """Return the name of the parameter that a method of ``torch.nn.utils.prune`` masks."""
    return hook._tensor_name


def written_arguments(operation: Any) -> list[tuple[int, str]]:
    """Return position and name of the arguments that an operation of the dispatcher writes into."""
    arguments = enumerate(operation._schema.arguments)
    return [(n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def packet_of(operation: Any) -> Any:
    """Return the operation of which this is one overload, as torch's registry of FLOP formulas lists it."""
    return operation._overloadpacket


def overload_name(operation: Any) -> str:
    """Return the name by which an operation of the dispatcher differs from others of its kind, ``"dtype"`` for instance."""
    return operation._overloadname


def decompose(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operation of the dispatcher gives, by simpler operations; ``NotImplemented`` if torch knows of none."""
    result = operation.decompose(*args, **kwargs)
    if result is NotImplemented and operation in decomposition_table:
        result = decomposition_table[operation](*args, **kwargs)
    return result


def new_iterator(loader: DataLoader) -> Iterator[Any]:
    """Return a new iterator of a dataloader, also where ``persistent_workers`` would give the one that there is."""
    return loader._get_iterator()


def reset_plateau(scheduler: ReduceLROnPlateau) -> None:
    """Let a scheduler forget its best value and how long it has waited."""
    scheduler._reset()


def mark_as_stepped(optimizer: Optimizer) -> None:
    """Keep schedulers from warning that they are stepped before their optimizer, whose step something took the place of."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def is_dynamo_loaded() -> bool:
    """Return whether something may be compiled. Asking ``torch.compiler`` loads the compiler, which takes seconds."""
    return "torch._dynamo" in sys.modules


def compiled_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules within a model whose forward is compiled by itself, by ``compile()`` or ``torch.compile``, by path."""
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield name, module
        elif isinstance(inner := module._modules.get(COMPILED_FROM), nn.Module):
            yield name, inner


def recompile_limit() -> int:
    """Return for how many sizes torch.compile compiles one forward; loads the compiler."""
    import torch._dynamo

    return torch._dynamo.config.recompile_limit


def convolve(kind: type, module: nn.Module, x: Tensor) -> Tensor:
    """Return what a convolution of torch gives, past what a subclass makes of it; it knows of padding modes."""
    return kind._conv_forward(module, x, module.weight, module.bias)  # type: ignore[attr-defined]


def has_own_code(module: nn.Module, kind: type) -> bool:
    """Return whether a layer's class computes by other code than the class of torch that it is derived from."""
    return any(getattr(type(module), n, None) is not getattr(kind, n, None) for n in ("forward", "_conv_forward"))


def padding_of(convolution: nn.Module) -> list[int]:
    """Return the padding that torch has worked out for a convolution, ``"same"`` for instance, as ``functional.pad`` takes it."""
    return convolution._reversed_padding_repeated_twice  # type: ignore[return-value]


def keep_from_fused_path(attention: nn.Module) -> Callable[[], None]:
    """Keep ``nn.TransformerEncoderLayer`` off its fused path, which reads the weights past the attention; return the undo."""
    attention._qkv_same_embed_dim = False  # type: ignore[assignment]

    def undo() -> None:
        attention._qkv_same_embed_dim = True  # type: ignore[assignment]

    return undo


def forget_size(optimizer: torch.optim.LBFGS) -> Callable[[], None]:
    """Let LBFGS count its parameters' elements anew; return the undo."""
    before = optimizer._numel_cache
    optimizer._numel_cache = None

    def undo() -> None:
        optimizer._numel_cache = before

    return undo


def leaf_of(node: Any) -> Tensor | None:
    """Return the tensor into which a node of an autograd graph accumulates, ``None`` for other nodes."""
    return getattr(node, "variable", None)


def move_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put other tensors in the place of buffers, whether they are saved or not."""
    module._buffers.update(buffers)


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module, with tables of its own, without hooks and without what FSDP2 made of it."""
    kind: Any = type(module)
    if is_fsdp_unit(module):
        # fully_shard gives a module a class of its own, made of FSDPModule and the class it had
        kind = kind.__bases__[-1]
    copy = kind.__new__(kind)
    for name, value in vars(module).items():
        # where fully_shard keeps its own state
        if not name.startswith("__composable_api"):
            hooks = "hooks" in name and isinstance(value, Mapping)
            copy.__dict__[name] = type(value)() if hooks else dict(value) if name in TABLES else value
    return copy


def tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a module's own parameters, buffers and submodules by name, with those that are ``None``."""
    return module._parameters, module._buffers, module._modules


def is_fsdp_unit(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether ``fully_shard`` was called on a module."""
    return isinstance(module, FSDPModule)


def fsdp_parameters(module: nn.Module) -> Iterator[Any]:
    """Return FSDP2's records of the parameters that it shards as a part of this module."""
    if not is_fsdp_unit(module):
        return
    state = module._get_fsdp_state()
    # torch before 2.10 has one group
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            yield from group.fsdp_params


def is_offloaded(record: Any) -> bool:
    """Return whether FSDP2 keeps a parameter in CPU memory, by its record from :func:`fsdp_parameters`."""
    return record.offload_to_cpu


def forget_fsdp_unit(module: nn.Module) -> Callable[[], None]:
    """Let the outermost module of FSDP2 forget one that leaves; return the undo."""
    if not is_fsdp_unit(module):
        return lambda: None
    state: Any = module._get_fsdp_state()
    states = state._state_ctx.all_states
    before = list(states)
    states[:] = [s for s in states if s is not state]

    def undo() -> None:
        states[:] = before

    return undo


def manage_anew(record: Any, old: DTensor, whole: nn.Parameter) -> nn.Parameter:
    """Let FSDP2 manage another, whole parameter in the place of one, by its own set-up of one parameter, once more.

    Args:
        record: FSDP2's record of the parameter, from :func:`fsdp_parameters`.
        old: The sharded parameter.
        whole: The new one, the same on all processes.

    Returns:
        The new sharded parameter, which is in its place already.
    """
    placement = record.fsdp_placement
    # sizes, padding, the shard, and its place in the modules
    record._init_sharded_param(whole, record.device, lambda _: placement, record.mesh_info)
    if record.post_forward_mesh_info:
        record._init_sharded_post_forward_param_metadata(whole)
    record._init_extensions()
    record.all_gather_outputs = []
    record.unsharded_accumulated_grad = None
    if hasattr(record, "_unsharded_param"):
        del record._unsharded_param
    record.__dict__.pop("_sharded_post_forward_param_data", None)
    if hooks := getattr(old, "_post_accumulate_grad_hooks", None):
        # the only hooks of a sharded parameter that FSDP2 calls
        record.sharded_param._post_accumulate_grad_hooks = hooks
    return record.sharded_param


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` made a module of; any other as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
