"""State-space models, linear attention and gated convolutions, and the hybrids of these with attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.adaptations import Adapted, become, nothing_to_undo
from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.families.experts import ExpertChannels, Experts
from lit_prune.architectures.families.mixers import MAMBA, MAMBA2, SHORT_CONVOLUTION, ZAMBA_MIXER
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.torch_internals import tables
from lit_prune.transformers_internals import mark_initialized

register_architecture(
    Architecture(
        name="mamba",
        models=("transformers.MambaPreTrainedModel", "transformers.FalconMambaPreTrainedModel"),
        components=(MAMBA,),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="mamba2",
        models=("transformers.Mamba2PreTrainedModel",),
        components=(MAMBA2,),
        depth=("config.num_hidden_layers",),
    )
)

# experts stay: the router's correction of their scores is a buffer with an entry for each
register_architecture(
    Architecture(
        name="nemotron-h",
        models=("transformers.NemotronHPreTrainedModel",),
        components=(
            replace(MAMBA2, requires="A_log", optional=True),
            Attention(path="layers.*.mixer", skippable=True, requires="q_proj", optional=True),
            MLP(path="layers.*.mixer", inputs=("up_proj",), requires="up_proj", optional=True),
            MLP(path="layers.*.mixer.shared_experts", inputs=("up_proj",), optional=True),
            ExpertChannels(
                path="layers.*.mixer.experts", inputs={"up_proj": 1}, input_dims={"up_proj": 2}, parts=1, optional=True
            ),
        ),
        depth=("config.layers_block_type",),
    )
)

register_architecture(
    Architecture(
        name="bamba",
        models=("transformers.BambaPreTrainedModel",),
        components=(
            replace(MAMBA2, path="layers.*.mamba", optional=True),
            Attention(path="layers.*.self_attn", skippable=True, optional=True),
            MLP(path="layers.*.feed_forward"),
        ),
    )
)

register_architecture(
    Architecture(
        name="granite-hybrid",
        models=("transformers.GraniteMoeHybridPreTrainedModel",),
        components=(
            replace(MAMBA2, path="layers.*.mamba", optional=True),
            Attention(path="layers.*.self_attn", skippable=True, optional=True),
            MLP(
                path="layers.*.shared_mlp",
                inputs=("input_linear",),
                output="output_linear",
                parts=2,
                attributes={"hidden_size": "channels"},
            ),
            Experts(
                path="layers.*.block_sparse_moe",
                parameters=("experts.gate_up_proj", "experts.down_proj", "router.weight"),
                top_k="router.top_k",
                attributes={"experts.num_experts": "experts", "router.num_experts": "experts"},
                optional=True,
            ),
            ExpertChannels(path="layers.*.block_sparse_moe.experts", optional=True),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)


class WithOwnMultipliers(Adapted):
    """Mixed into the mixer of Falcon-H1 once it lost heads: the model computes its multipliers for those of its config."""

    section_multipliers: tuple[float, ...]

    @property
    def mup_vector(self) -> Tensor:
        """The multiplier of every row of ``in_proj``, shape ``(1, 1, rows)``."""
        module: Any = self
        values, states = module.intermediate_size, module.groups_time_state_size
        sizes = (values, values, states, states, module.num_heads)
        weight = module.in_proj.weight
        vector = torch.cat(
            [weight.new_full((n,), m) for n, m in zip(sizes, self.section_multipliers, strict=True)]
        ).view(1, 1, -1)
        # keeps transformers from filling it with the dense model's
        mark_initialized(vector)
        return vector


def own_multipliers(model: nn.Module) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of Falcon-H1's mixers to fewer heads."""
    config: Any = model.config
    multipliers = tuple(config.ssm_multipliers)

    def apply(module: nn.Module, kept: Tensor) -> Callable[[], None]:
        if isinstance(module, WithOwnMultipliers):
            return nothing_to_undo
        buffer = tables(module)[1].pop("mup_vector")
        module.section_multipliers = multipliers  # type: ignore[assignment]
        back = become(module, WithOwnMultipliers)

        def undo() -> None:
            back()
            del module.section_multipliers
            tables(module)[1]["mup_vector"] = buffer

        return undo

    return apply


# state-space heads and attention side by side in every layer
register_architecture(
    Architecture(
        name="falcon-h1",
        models=("transformers.FalconH1PreTrainedModel",),
        components=(
            replace(MAMBA2, path="layers.*.mamba", adapt=own_multipliers),
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.feed_forward"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

# the transformer layers are one, called at several places with adapters of their own: they stay whole
register_architecture(
    Architecture(
        name="zamba2",
        models=("transformers.Zamba2PreTrainedModel",),
        components=(
            replace(MAMBA2, path="layers.*.mamba"),
            replace(MAMBA2, path="layers.*.mamba_decoder.mamba", optional=True),
        ),
    )
)

# as Zamba2, but each head is a Mamba with projections of its own, its values and gates side by side
register_architecture(
    Architecture(
        name="zamba",
        models=("transformers.ZambaPreTrainedModel",),
        components=(ZAMBA_MIXER, replace(ZAMBA_MIXER, path="layers.*.mamba_decoder.mamba", optional=True)),
    )
)

register_architecture(
    Architecture(
        name="jamba",
        models=("transformers.JambaPreTrainedModel",),
        components=(
            replace(MAMBA, path="layers.*.mamba"),
            Attention(path="layers.*.self_attn", skippable=True, optional=True),
            MLP(path="layers.*.feed_forward", requires="gate_proj"),
            Experts(
                path="layers.*.feed_forward",
                parameters=("experts.gate_up_proj", "experts.down_proj", "router.weight"),
                top_k="top_k",
                attributes={
                    "num_experts": "experts",
                    "experts.num_experts": "experts",
                    "router.num_experts": "experts",
                },
                requires="experts",
            ),
            ExpertChannels(path="layers.*.feed_forward.experts", optional=True),
        ),
    )
)

register_architecture(
    Architecture(
        name="lfm2",
        models=("transformers.Lfm2PreTrainedModel", "transformers.Lfm2MoePreTrainedModel"),
        components=(
            SHORT_CONVOLUTION,
            Attention(path="layers.*.self_attn", output="out_proj", skippable=True, optional=True),
            MLP(path="layers.*.feed_forward", inputs=("w1", "w3"), output="w2", requires="w1", optional=True),
            ExpertChannels(path="layers.*.feed_forward.experts", optional=True),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

# as LFM2, with a gate for each query head
register_architecture(
    Architecture(
        name="lfm3",
        models=("transformers.Lfm3PreTrainedModel",),
        components=(
            SHORT_CONVOLUTION,
            Attention(
                path="layers.*.self_attn", parameters={"g_proj.weight": "query_heads"}, skippable=True, optional=True
            ),
            MLP(path="layers.*.feed_forward", inputs=("w1", "w3"), output="w2"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)
