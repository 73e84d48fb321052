"""Finds the groups of a model, and has what a description of a new kind of component is made of (docs/architectures.md)."""

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
    litgpt,
    recurrent,
    t5,
    torch_modules,
)
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
from lit_prune.architectures.sequence_mixers import SequenceMixer
from lit_prune.architectures.slices import (
    INTERLEAVED,
    STACKED,
    consumed,
    group_set_of,
    parameter_of,
    part_of,
    part_rows,
    produced,
    reader_adaptations,
)
from lit_prune.architectures.stream import Stream
from lit_prune.architectures.tracing.traced import Traced
from lit_prune.groups import Adaptation, Attribute, GroupSet, Slice

__all__ = [
    "INTERLEAVED",
    "MLP",
    "STACKED",
    "Adaptation",
    "Architecture",
    "Attention",
    "Attribute",
    "Component",
    "ExpertChannels",
    "Experts",
    "GroupSet",
    "LatentAttention",
    "MultiheadAttention",
    "Positions",
    "SequenceMixer",
    "Slice",
    "Stream",
    "Traced",
    "architectures",
    "consumed",
    "find_group_sets",
    "find_model",
    "group_set_of",
    "parameter_of",
    "part_of",
    "part_rows",
    "produced",
    "reader_adaptations",
    "register_architecture",
]

__getattr__ = moved_names(__name__)
