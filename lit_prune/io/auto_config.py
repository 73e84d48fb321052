"""What ``AutoConfig.from_pretrained`` gives for a folder whose ``per_layer_config`` says what is left in each layer.

Such a folder has the dense model's own ``model_type``, so that a transformers that builds layers from ``per_layer_config`` needs
nothing else. Until it does, its own classes refuse the config, and ours have to take their place.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import AutoConfig

from lit_prune.modeling_pruned import PrunedConfig, is_complete
from lit_prune.transformers_internals import without_layer_warnings

# of the Auto classes alone; the model is built by what was cut there
_OF_AUTO_CLASSES = ("trust_remote_code", "code_revision")


def install() -> None:
    """Let ``AutoConfig.from_pretrained``, and with it every Auto class, give our config class for such folders alone."""
    stock = AutoConfig.from_pretrained.__func__  # type: ignore[attr-defined]
    if getattr(stock, "knows_pruned_layers", False):
        return

    @wraps(stock)
    def from_pretrained(cls: type, path: Any, *args: Any, **kwargs: Any) -> Any:
        with without_layer_warnings():
            found = stock(cls, path, *args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if is_complete(getattr(config, "pruning", None)) and not isinstance(config, PrunedConfig):
            rest = {name: value for name, value in kwargs.items() if name not in _OF_AUTO_CLASSES}
            return PrunedConfig.from_pretrained(path, *args, **rest)
        return found

    from_pretrained.knows_pruned_layers = True  # type: ignore[attr-defined]
    AutoConfig.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
