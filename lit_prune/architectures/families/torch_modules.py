"""The transformer modules of ``torch.nn`` itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_prune._renamed import renamed_fields
from lit_prune.architectures.adaptations import KeptHeads, kept_heads
from lit_prune.architectures.components import MLP, Component
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.architectures.slices import group_set_of, part_of
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, GroupSet
from lit_prune.torch_internals import keep_from_fused_path


class WithFewerHeads(KeptHeads):
    """Mixed into ``nn.MultiheadAttention``, whose own forward expects as many features in the heads as in its input."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of ``nn.MultiheadAttention``; an ``attn_mask`` for every head is for the heads of the dense module, or its own."""
        module: Any = self
        batched = query.dim() == 3
        inputs: tuple[Tensor, ...] = (query, key, value)
        if batched and not module.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        elif not batched:
            inputs = tuple(x.unsqueeze(0) for x in inputs)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * module.head_dim**-0.5
            probabilities = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            probabilities = functional.dropout(probabilities, module.dropout, module.training)
            heads = probabilities @ v
        else:
            probabilities = None
            dropout = module.dropout if module.training else 0.0
            heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = module.out_proj(heads.transpose(1, 2).flatten(2))
        if probabilities is not None and average_attn_weights:
            probabilities = probabilities.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if probabilities is None else probabilities.squeeze(0)
        return (output if module.batch_first else output.transpose(0, 1)), probabilities

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores, of a shape that broadcasts to ``(batch, heads, queries, keys)``."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = self._of_own_heads(attn_mask, len(q))
        if padding is not None:
            padding = padding.view(len(q), 1, 1, k.shape[2])
        masks = [
            torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask
            for mask in (attn_mask, padding)
            if mask is not None
        ]
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]

    def _of_own_heads(self, mask: Tensor, batch: int) -> Tensor:
        """A mask of shape ``(batch * heads, queries, keys)`` as ``(batch, heads, queries, keys)``, of the heads that stayed."""
        heads = len(mask) // batch
        if len(mask) == batch * heads and heads == len(self.kept_heads):
            return mask.unflatten(0, (batch, heads))
        if len(mask) == batch * heads and heads > max(self.kept_heads):
            return mask.unflatten(0, (batch, heads))[:, self.kept_heads]
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)} for a batch of {batch}; expected ({batch} * heads, queries, keys), where"
            f" heads is the {len(self.kept_heads)} that this attention kept, or all that it had (more than"
            f" {max(self.kept_heads)})."
        )


def fewer_heads(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of ``nn.MultiheadAttention`` to fewer heads."""
    first = not isinstance(module, WithFewerHeads)
    back = kept_heads(module, kept, WithFewerHeads)
    if not first:
        return back
    unfused = keep_from_fused_path(module)

    def undo() -> None:
        unfused()
        back()

    return undo


def other_inputs(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation of ``nn.MultiheadAttention`` to inputs of another width than all its heads: it keeps the heads it has."""
    attention: Any = module
    return fewer_heads(module, torch.arange(attention.num_heads))


def no_nested_tensors(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation of ``nn.TransformerEncoder``, which packs padded batches for the fused path of its layers."""
    before = module.use_nested_tensor
    module.use_nested_tensor = False  # type: ignore[assignment]

    def undo() -> None:
        module.use_nested_tensor = before

    return undo


@renamed_fields(having="requires")
@dataclass(frozen=True)
class MultiheadAttention(Component):
    """An ``nn.MultiheadAttention``. One group is one head.

    Args:
        path: Its path, see :class:`Component`.
        kind: What the group table calls these groups.
        requires: See :class:`Component`.
        optional: See :class:`Component`.
    """

    path: str
    kind: str = "attention"
    requires: str | None = None
    optional: bool = False

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the heads of the module ``name``.

        Raises:
            UnsupportedModelError: If it is another module, or one whose keys and values have a width of their own, an
                added bias, or an added zero.
        """
        module = model.get_submodule(name)
        if not isinstance(module, nn.MultiheadAttention):
            raise UnsupportedModelError(f"{name} is a {type(module).__name__}; expected nn.MultiheadAttention.")
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has kdim={module.kdim}, vdim={module.vdim},"
                f" add_bias_kv={module.bias_k is not None}, add_zero_attn={module.add_zero_attn}; expected keys and values"
                f" of {module.embed_dim} features and neither of the others."
            )
        heads, width = module.num_heads, module.head_dim
        columns = torch.arange(heads * width).view(heads, width)
        rows = torch.cat([part * heads * width + columns for part in range(3)], dim=1)
        slices = [
            part_of(model, f"{name}.in_proj_weight", 0, rows, 1, unobservable_input=True),
            part_of(model, f"{name}.out_proj.weight", 1, columns, 1, unobservable_input=True),
        ]
        if module.in_proj_bias is not None:
            slices.append(part_of(model, f"{name}.in_proj_bias", 0, rows))
        adaptations = [Adaptation(name, fewer_heads)]
        parent = ".".join(name.split(".")[:-3])
        if hasattr(model.get_submodule(parent), "use_nested_tensor"):
            adaptations.append(Adaptation(parent, no_nested_tensors))
        found = group_set_of(model, name, layer, self.kind, tuple(slices), {"num_heads": "heads"}, {"heads": 1})
        return replace(found, minimum=1, adaptations=tuple(adaptations))


register_architecture(
    Architecture(
        name="torch-transformer",
        models=(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
        components=(
            MultiheadAttention(path="layers.*.self_attn"),
            MultiheadAttention(path="layers.*.multihead_attn", kind="cross_attention", optional=True),
            MLP(path="layers.*", inputs=("linear1",), output="linear2"),
        ),
        depth=("num_layers",),
    )
)
