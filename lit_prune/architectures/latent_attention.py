"""Describes multi-head latent attention: heads whose keys and values are expanded from a low-rank state that all share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lit_prune.architectures.adaptations import without_heads
from lit_prune.architectures.components import Component
from lit_prune.architectures.slices import consumed, group_set_of, produced, projection
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, GroupSet


@dataclass(frozen=True)
class LatentAttention(Component):
    """Where multi-head latent attention sits in a model and how its projections are laid out.

    One group is a head: its rows of the projections that expand the latent queries, and the latent keys and values, and its
    columns of the output projection. The latent states and their norms are common to all heads and stay.

    Args:
        path: Path of the attention module, see :class:`Component`.
        query: Name of the projection that gives the queries of each head.
        key_value: Name of the projection that gives, head by head, the keys (without rotary positions) and the values.
        output: Name of the output projection, which reads the values.
        head_dims: A function of the attention module that gives the features of one head in the outputs of ``query``, in
            those of ``key_value``, and in the inputs of ``output``.
        attributes: Attributes of the module that count heads, each mapped to ``"query_heads"`` or ``"key_value_heads"``,
            which are as many; see :class:`~lit_prune.architectures.components.Attention`.
        kind: What the group table calls these groups.
        skippable: See :class:`~lit_prune.architectures.components.Attention`.
        weights: See :class:`~lit_prune.architectures.components.Attention`.
        adapt: See :class:`~lit_prune.architectures.components.Attention`.
        requires: See :class:`Component`.
        optional: See :class:`Component`.

    Reference: DeepSeek-AI, DeepSeek-V2, 2024, section 2.1.
    """

    path: str
    head_dims: Callable[[nn.Module], tuple[int, int, int]]
    query: str = "q_b_proj"
    key_value: str = "kv_b_proj"
    output: str = "o_proj"
    attributes: Mapping[str, str] = field(default_factory=dict)
    kind: str = "attention"
    skippable: bool = False
    weights: bool = True
    adapt: Callable[[nn.Module, Tensor], Callable[[], None]] | None = None
    requires: str | None = None
    optional: bool = False

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the heads of the attention module ``name``.

        Raises:
            UnsupportedModelError: If a projection is missing, of an unknown type, or its shape does not fit the heads.
        """
        del pruned
        widths = self.head_dims(model.get_submodule(name))
        features = (
            projection(model, name, self.query).out_features,
            projection(model, name, self.key_value).out_features,
            projection(model, name, self.output).in_features,
        )
        heads = {total // width for total, width in zip(features, widths, strict=True)}
        if len(heads) > 1 or any(total % width for total, width in zip(features, widths, strict=True)):
            raise UnsupportedModelError(
                f"{name} ({type(model.get_submodule(name)).__name__}): {self.query} has {features[0]} output features,"
                f" {self.key_value} {features[1]} and {self.output} {features[2]} input features; expected as many heads in each,"
                f" of {widths[0]}, {widths[1]} and {widths[2]} features."
            )
        (count,) = heads
        query, key_value, values = (torch.arange(count * width).view(count, width) for width in widths)
        slices = (
            *produced(model, name, self.query, query),
            *produced(model, name, self.key_value, key_value),
            consumed(model, name, self.output, values),
        )
        counts = {"query_heads": 1, "key_value_heads": 1}
        found = group_set_of(model, name, layer, self.kind, slices, self.attributes, counts)
        adaptations = [] if self.adapt is None else [Adaptation(name, self.adapt)]
        if self.skippable:
            adaptations.append(Adaptation(name, without_heads(self.output, self.weights)))
        return replace(found, minimum=0 if self.skippable else 1, adaptations=tuple(adaptations))
