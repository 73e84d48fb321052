"""What a model's own ``save_pretrained`` does once the model is cut: it writes files that load again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lit_prune.errors import UnsupportedModelError
from lit_prune.modeling_pruned import local_name
from lit_prune.plan import DEPTH_ATTRIBUTE, PLAN_ATTRIBUTE, get_plan, plan_from_config, set_plan

_METHOD = "save_pretrained"
# set by the module that writes folders, which is above this one: building what is to be saved takes a cut itself
to_pretrained: Callable[..., PreTrainedModel] | None = None
# likewise: writes the model card of a model whose config has a plan
write_card: Callable[[PreTrainedModel, Path], None] | None = None


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


@contextmanager
def plan_of_inner_model(model: nn.Module) -> Iterator[bool]:
    """Note on a transformers model, for a while, what was cut from a transformers model in it.

    Pruning ``classifier.model`` by itself leaves its plan there, and ``classifier.save_pretrained`` is asked of another object.

    Args:
        model: The model that is to be saved.

    Yields:
        Whether there was one, and the model itself had no plan.

    Raises:
        UnsupportedModelError: If more than one model in it was pruned, which no config can say.
    """
    inner = [
        (name, module)
        for name, module in model.named_modules()
        if name
        and isinstance(module, PreTrainedModel)
        and PLAN_ATTRIBUTE in vars(module)
        and get_plan(module) is not None
    ]
    if not isinstance(model, PreTrainedModel) or not inner or get_plan(model) is not None:
        yield False
        return
    if len(inner) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several models that were pruned, each by itself: {[name for name, _ in inner]}. Its"
            " config cannot say so; save each with lit_prune.save_pruned."
        )
    (name, pruned), plan = inner[0], get_plan(inner[0][1])
    assert plan is not None
    set_plan(model, plan.renamed(lambda part: f"{name}.{part}"))
    depth = getattr(pruned, DEPTH_ATTRIBUTE, None)
    if depth is not None:
        setattr(model, DEPTH_ATTRIBUTE, depth)
    try:
        yield True
    finally:
        for attribute in (PLAN_ATTRIBUTE, DEPTH_ATTRIBUTE):
            vars(model).pop(attribute, None)


def install() -> None:
    """Let ``save_pretrained`` of a transformers model around one that was pruned write files that load again, too.

    Beside a model whose config has a plan it writes a model card, where there is none.
    """
    stock = PreTrainedModel.save_pretrained
    if getattr(stock, "knows_inner_plans", False):
        return

    @wraps(stock)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with plan_of_inner_model(self) as found:
            save = _SavePretrained(self) if found else partial(stock, self)
            result = save(*args, **kwargs)
        folder = Path(args[0] if args else kwargs["save_directory"])
        described = isinstance(getattr(self.config, "pruning", None), Mapping)
        if described and kwargs.get("is_main_process", True) and not (folder / "README.md").exists():
            if write_card is None:
                importlib.import_module("lit_prune.io.huggingface")
            assert write_card is not None
            write_card(self, folder)
        return result

    save_pretrained.knows_inner_plans = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


install()


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
