"""Finds the groups of a model, by the description of its architecture."""

from lit_prune._moved import moved_names

# importing a file registers what it describes
from lit_prune.architectures.arguments import Positions
from lit_prune.architectures.components import MLP, Attention, Component
from lit_prune.architectures.families import (  # noqa: F401
    alibi,
    bart,
    decoders,
    encoders,
    experts,
    fused,
    linear_attention,
    recurrent,
    t5,
    torch_modules,
)
from lit_prune.architectures.families.experts import ExpertChannels, Experts
from lit_prune.architectures.families.torch_modules import MultiheadAttention
from lit_prune.architectures.registry import (
    Architecture,
    architectures,
    find_group_sets,
    find_model,
    register_architecture,
)
from lit_prune.architectures.sequence_mixers import SequenceMixer
from lit_prune.architectures.tracing.traced import Traced

__all__ = [
    "MLP",
    "Architecture",
    "Attention",
    "Component",
    "ExpertChannels",
    "Experts",
    "MultiheadAttention",
    "Positions",
    "SequenceMixer",
    "Traced",
    "architectures",
    "find_group_sets",
    "find_model",
    "register_architecture",
]

__getattr__ = moved_names(__name__)
