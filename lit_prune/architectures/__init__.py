"""Finds the groups of a model. Every file but the machinery (base, adapt, traced) is nothing but descriptions."""

# importing a file registers what it describes
from lit_prune.architectures.arguments import Positions
from lit_prune.architectures.components import MLP, Attention, Block
from lit_prune.architectures.families import alibi, bart, decoders, encoders, experts, fused, litgpt, t5, torch_modules  # noqa: F401
from lit_prune.architectures.families.experts import ExpertChannels, Experts
from lit_prune.architectures.families.torch_modules import MultiheadAttention
from lit_prune.architectures.latent_attention import LatentAttention
from lit_prune.architectures.registry import (
    Architecture,
    architectures,
    find_group_sets,
    find_model,
    register_architecture,
)
from lit_prune.architectures.tracing.traced import Traced

__all__ = [
    "MLP",
    "Architecture",
    "Attention",
    "Block",
    "ExpertChannels",
    "Experts",
    "LatentAttention",
    "MultiheadAttention",
    "Positions",
    "Traced",
    "architectures",
    "find_group_sets",
    "find_model",
    "register_architecture",
]
