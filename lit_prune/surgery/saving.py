"""What a model's own ``save_pretrained`` does once the model is cut: it writes files that load again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lit_prune.modeling_pruned import local_name
from lit_prune.plan import get_plan, plan_from_config

_METHOD = "save_pretrained"
# set by the module that writes folders, which is above this one: building what is to be saved takes a cut itself
to_pretrained: Callable[..., PreTrainedModel] | None = None


def save_with_plan(model: nn.Module) -> Callable[[], None]:
    """Let a model's own ``save_pretrained``, and what calls it, write its plan, and return a function that undoes this.

    By itself it would write smaller weights beside the config of the dense model, which nothing can load. The model keeps
    its class, and can be copied and pickled.

    Args:
        model: A model that was just cut; what is not a transformers model is left alone.
    """
    if not isinstance(model, PreTrainedModel) or _METHOD in model.__dict__:
        return lambda: None
    model.__dict__[_METHOD] = _SavePretrained(model)
    return lambda: save_plainly(model)


def save_plainly(model: nn.Module) -> None:
    """Undo :func:`save_with_plan`."""
    model.__dict__.pop(_METHOD, None)


class _SavePretrained:
    """The method of one model; a function that holds the model would go on saving the original where the model is copied."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the class that the model will load as.

        Raises:
            UnsupportedModelError: If the model cannot be saved as a transformers model.
        """
        model = self._model
        if not kwargs.get("is_main_process", True):
            return None
        if not _described(model):
            contained = bool(getattr(model.config, "auto_map", None))
            if to_pretrained is None:
                importlib.import_module("lit_prune.io.huggingface")
            assert to_pretrained is not None
            model = to_pretrained(model, self_contained=contained, state_dict=kwargs.pop("state_dict", None))
        return getattr(type(model), _METHOD)(model, *args, **kwargs)


def _described(model: PreTrainedModel) -> bool:
    """Whether the model's config says already what was cut."""
    noted, plan = plan_from_config(model.config), get_plan(model)
    if noted is None or plan is None:
        return plan is None
    return noted.renamed(lambda name: local_name(model, name)).digest() == plan.digest()
