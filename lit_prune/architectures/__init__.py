"""Finds the groups of a model. One file a family, each nothing but descriptions."""

from lit_prune.architectures import llama  # noqa: F401  (importing registers the family)
from lit_prune.architectures.base import (
    MLP,
    Architecture,
    Attention,
    architectures,
    find_group_sets,
    find_model,
    register_architecture,
)

__all__ = [
    "MLP",
    "Architecture",
    "Attention",
    "architectures",
    "find_group_sets",
    "find_model",
    "register_architecture",
]
