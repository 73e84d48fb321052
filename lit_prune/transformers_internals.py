"""What this package uses of transformers and accelerate that they do not document; ``tests/test_internals.py`` checks each.

``modeling_pruned.py`` has its own two, ``_from_config`` and ``_model_mapping``: it is copied beside weights and imports
nothing of this package. Every function was checked with the versions of transformers in :data:`CHECKED`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils

CHECKED = ("5.15.0", "5.23.0")

# the fields of a config that say how attention and how a module of experts are computed
ATTENTION_FIELD, EXPERTS_FIELD = "_attn_implementation", "_experts_implementation"


def build(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """Return a model of a class, with the data type and attention that its config asks for, as ``AutoModel.from_config``."""
    return kind._from_config(config)


@contextmanager
def without_layer_warnings() -> Iterator[None]:
    """Drop the warnings that a config class asks itself for a field in which layers differ, as Llama's does to check itself."""
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "per-layer attribute" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def layers_that_count_tokens(config: Any) -> list[bool]:
    """Return for every layer of a model of mixed kinds whether its part of the cache says how many tokens there are so far.

    The length of a cache is that of such a layer, and cannot be asked for where there is none.

    Args:
        config: The model's config.

    Returns:
        A list with an entry for each layer; empty if all layers count, or none does.
    """
    if not isinstance(config, PreTrainedConfig):
        return []
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    known = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    counts = [issubclass(known.get(kind, object), cache_utils.CacheLayerMixin) for kind in kinds]
    return counts if len(set(counts)) == 2 else []


def has_choice_of_experts(module: nn.Module) -> bool:
    """Return whether a module of experts takes from its config how it runs them."""
    return hasattr(getattr(module, "config", None), EXPERTS_FIELD)


def implementations_of(model: nn.Module) -> list[str]:
    """Return the names of the implementations of attention and experts that a model's configs ask for, sorted."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    found = {getattr(config, field, None) for config in configs for field in (ATTENTION_FIELD, EXPERTS_FIELD)}
    return sorted(name for name in found if isinstance(name, str))


def frames_of(module: nn.Module) -> Callable[[Any], Any] | None:
    """Return a speech model's function from numbers of samples to numbers of frames, ``None`` if it has none."""
    return getattr(module, "_get_feat_extract_output_lengths", None)


def embedding_scale(module: nn.Module) -> float | None:
    """Return the number that an embedding of the Gemma family multiplies its vectors with, ``None`` if it has none."""
    return getattr(module, "scalar_embed_scale", None)


def mark_initialized(tensor: Tensor) -> None:
    """Keep transformers from filling a tensor when it loads a model, as it does for what no file holds."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def accelerate_hook(module: nn.Module) -> Any:
    """Return the hook by which accelerate offloads a module, ``None`` if it has none."""
    return getattr(module, "_hf_hook", None)
