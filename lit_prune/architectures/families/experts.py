"""Mixtures of experts, the weights of all experts of a layer fused into one tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lit_prune._renamed import renamed_fields
from lit_prune.architectures.adaptations import nothing_to_undo
from lit_prune.architectures.components import MLP, Attention, Component
from lit_prune.architectures.config_view import override_config
from lit_prune.architectures.families.mixers import FUSED_GATED_DELTA_NET, GATED_DELTA_NET
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.architectures.slices import INTERLEAVED, STACKED, group_set_of, parameter_of, part_of, part_rows
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, GroupSet
from lit_prune.transformers_internals import EXPERTS_FIELD, has_choice_of_experts

ALIGNMENT = 8


def expert_by_expert(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of experts to widths that grouped kernels refuse.

    Grouped matrix products want rows of 16 bytes or multiples of them: of 8 channels, whichever floating-point type.
    """
    if len(kept) % ALIGNMENT == 0 or not has_choice_of_experts(module):
        return nothing_to_undo
    return override_config(module, EXPERTS_FIELD, "eager")


@renamed_fields(having="requires")
@dataclass(frozen=True)
class ExpertChannels(Component):
    """Description of the channels inside experts. One group is the channel of the same index in every expert of a
    layer.

    Experts whose width after the cut is not a multiple of 8 run one after the other, because the grouped kernels of
    transformers refuse such widths; see ``Limits.multiple_of``.

    Args:
        path: Path of the module that holds the experts' parameters, see :class:`Component`.
        inputs: Names of the parameters whose outputs are channels, each with the dimension that the channels lie along.
        input_dims: The dimension of each of ``inputs`` that the features are read along; those not named have none.
        output: Name of the parameter that reads the channels.
        output_dim: Its dimension that they lie along.
        parts: See :class:`MLP`.
        layout: See :class:`MLP`.
        attributes: Attributes of the module that count ``"channels"``.
        kind: What the group table calls these groups.
        requires: See :class:`Component`.
        optional: See :class:`Component`.
    """

    path: str
    inputs: Mapping[str, int] = field(default_factory=lambda: {"gate_up_proj": 1})
    input_dims: Mapping[str, int] = field(default_factory=lambda: {"gate_up_proj": 2})
    output: str = "down_proj"
    output_dim: int = 2
    parts: int = 2
    layout: str = STACKED
    attributes: Mapping[str, str] = field(
        default_factory=lambda: {"intermediate_dim": "channels", "intermediate_size": "channels"}
    )
    kind: str = "mlp"
    requires: str | None = None
    optional: bool = False

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the channels of the experts ``name``.

        Raises:
            UnsupportedModelError: If a parameter is missing or its shape does not fit the others.
        """
        output = parameter_of(model, f"{name}.{self.output}")
        width = output.shape[self.output_dim]
        rows = part_rows(width, self.parts, self.layout)
        slices = (
            *(
                part_of(model, f"{name}.{source}", dim, rows, self.input_dims.get(source), unobservable_input=True)
                for source, dim in self.inputs.items()
            ),
            part_of(
                model,
                f"{name}.{self.output}",
                self.output_dim,
                torch.arange(width).view(width, 1),
                self.output_dim,
                unobservable_input=True,
            ),
        )
        found = group_set_of(model, name, layer, self.kind, slices, self.attributes, {"channels": 1})
        return replace(found, minimum=1, adaptations=(Adaptation(name, expert_by_expert),))


@renamed_fields(having="requires")
@dataclass(frozen=True)
class Experts(Component):
    """Description of whole experts. One group is an expert with its row of the router; after the cut the router chooses
    among the kept experts.

    Args:
        path: Path of the module that holds experts and router, see :class:`Component`.
        parameters: Names of the parameters with an entry for each expert along their first dimension.
        top_k: Attribute that says how many experts a token goes to; as many have to stay.
        attributes: Attributes that count ``"experts"``.
        kind: What the group table calls these groups.
        requires: See :class:`Component`.
        optional: See :class:`Component`.
    """

    path: str
    parameters: tuple[str, ...] = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    top_k: str = "gate.top_k"
    attributes: Mapping[str, str] = field(
        default_factory=lambda: {"experts.num_experts": "experts", "gate.num_experts": "experts"}
    )
    kind: str = "expert"
    requires: str | None = None
    optional: bool = False

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the experts of the module ``name``.

        Raises:
            UnsupportedModelError: If a parameter is missing, or they disagree on the number of experts.
        """
        owner, _, last = f"{name}.{self.top_k}".rpartition(".")
        top_k = getattr(model.get_submodule(owner), last, None)
        if not isinstance(top_k, int):
            raise UnsupportedModelError(
                f"{owner} ({type(model.get_submodule(owner)).__name__}) was expected to say by an integer attribute"
                f" {last!r} how many experts a token goes to; found {top_k!r}."
            )
        first = parameter_of(model, f"{name}.{self.parameters[0]}")
        index = torch.arange(len(first)).view(len(first), 1)
        slices = tuple(part_of(model, f"{name}.{p}", 0, index) for p in self.parameters)
        found = group_set_of(model, name, layer, self.kind, slices, self.attributes, {"experts": 1})
        # the auxiliary loss concatenates the routers of all layers, which has to have one width
        balanced = bool(getattr(getattr(model, "config", None), "output_router_logits", False))
        return replace(found, minimum=len(first) if balanced else top_k)


register_architecture(
    Architecture(
        name="mixtral",
        models=("transformers.MixtralPreTrainedModel", "transformers.Qwen3MoePreTrainedModel"),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", requires="gate_proj"),
            Experts(path="layers.*.mlp", requires="experts"),
            ExpertChannels(path="layers.*.mlp.experts", optional=True),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="qwen2-moe",
        models=("transformers.Qwen2MoePreTrainedModel",),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", requires="gate_proj"),
            MLP(path="layers.*.mlp.shared_expert", optional=True),
            Experts(path="layers.*.mlp", requires="experts"),
            ExpertChannels(path="layers.*.mlp.experts", optional=True),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

# as Qwen3.5 and Qwen2-MoE
for _name, _models, _linear_attention in (
    ("qwen3-next", ("transformers.Qwen3NextPreTrainedModel",), FUSED_GATED_DELTA_NET),
    ("qwen3.5-moe", ("transformers.Qwen3_5MoePreTrainedModel",), GATED_DELTA_NET),
):
    register_architecture(
        Architecture(
            name=_name,
            models=_models,
            components=(
                Attention(path="layers.*.self_attn", query_parts=2, skippable=True, optional=True),
                _linear_attention,
                MLP(path="layers.*.mlp", requires="gate_proj"),
                MLP(path="layers.*.mlp.shared_expert", optional=True),
                Experts(path="layers.*.mlp", requires="experts"),
                ExpertChannels(path="layers.*.mlp.experts", optional=True),
            ),
        )
    )

# the norms of queries and keys are over all heads, as in OLMo 2
register_architecture(
    Architecture(
        name="olmoe",
        models=("transformers.OlmoePreTrainedModel",),
        components=(
            Attention(
                path="layers.*.self_attn",
                parameters={"q_norm.weight": "query_features", "k_norm.weight": "key_value_features"},
                skippable=True,
            ),
            Experts(path="layers.*.mlp"),
            ExpertChannels(path="layers.*.mlp.experts"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="granite-moe",
        models=("transformers.GraniteMoePreTrainedModel",),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            Experts(
                path="layers.*.block_sparse_moe",
                parameters=("experts.gate_up_proj", "experts.down_proj", "router.weight"),
                top_k="router.top_k",
                attributes={"experts.num_experts": "experts", "router.num_experts": "experts"},
            ),
            ExpertChannels(path="layers.*.block_sparse_moe.experts"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

# every other layer of some sizes has one MLP in place of experts
register_architecture(
    Architecture(
        name="llama4",
        models=("transformers.Llama4ForCausalLM", "transformers.Llama4TextModel"),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.feed_forward", requires="gate_proj"),
            MLP(path="layers.*.feed_forward.shared_expert", optional=True),
            Experts(
                path="layers.*.feed_forward",
                parameters=("experts.gate_up_proj", "experts.down_proj", "router.weight"),
                top_k="router.top_k",
                attributes={
                    "num_experts": "experts",
                    "experts.num_experts": "experts",
                    "router.num_experts": "experts",
                },
                requires="experts",
            ),
            ExpertChannels(
                path="layers.*.feed_forward.experts",
                inputs={"gate_up_proj": 2},
                input_dims={"gate_up_proj": 1},
                output_dim=1,
                attributes={"intermediate_size": "channels", "expert_dim": "channels"},
                optional=True,
            ),
        ),
        depth=("config.num_hidden_layers", "config.layer_types", "config.no_rope_layers"),
    )
)

register_architecture(
    Architecture(
        name="gpt-oss",
        models=("transformers.GptOssPreTrainedModel",),
        components=(
            Attention(path="layers.*.self_attn", parameters={"sinks": "query_heads"}, skippable=True),
            Experts(
                path="layers.*.mlp",
                parameters=(
                    "experts.gate_up_proj",
                    "experts.gate_up_proj_bias",
                    "experts.down_proj",
                    "experts.down_proj_bias",
                    "router.weight",
                    "router.bias",
                ),
                top_k="router.top_k",
                attributes={"experts.num_experts": "experts", "router.num_experts": "experts"},
            ),
            ExpertChannels(
                path="layers.*.mlp.experts",
                inputs={"gate_up_proj": 2, "gate_up_proj_bias": 1},
                input_dims={"gate_up_proj": 1},
                output_dim=1,
                layout=INTERLEAVED,
            ),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)
