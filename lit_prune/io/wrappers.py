"""What models are wrapped in while they train, and what is saved of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lit_prune.errors import UnsupportedModelError
from lit_prune.torch_internals import uncompiled

_COMPILED, _PARALLEL = "_orig_mod.", "module."


def unwrapped(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    """The model within ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``, and its weights by its own names.

    Raises:
        UnsupportedModelError: If it carries adapters of peft, which are no weights of a pruned model.
    """
    while True:
        if (inner := uncompiled(model)) is not model:
            model, prefix = inner, _COMPILED
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model, prefix = model.module, _PARALLEL
        else:
            break
        state_dict = state_dict and {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a model with adapters, which are saved by its own save_pretrained. Merge them first:"
            " lit_prune.save_pruned(model.merge_and_unload(), directory)."
        )
    return model, state_dict
