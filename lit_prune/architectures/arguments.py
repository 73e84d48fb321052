"""Names of the arguments that models take sequences and their masks by, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Positions:
    """Arguments of a forward that hold the same positions (tokens, frames, patches), and the masks that say which are real.

    Args:
        states: Names of the tensors with an entry for each position: ids, embeddings, hidden states, samples.
        masks: Names of their masks: what is not 0 is real; of additive masks, what is not far below 0.
        padding: Names of masks that say the opposite: True, or minus infinity, at padding.
        patterns: Names of masks of shape ``(queries, keys)`` or ``(batch * heads, queries, keys)`` that are True, or minus
            infinity, where a query does not see a key.
        enters: Whether the sequence comes into the model here. Then a mask of a module around this one is for it only if that
            module was called with the very same tensor. Hidden states go on from layer to layer, and their masks with them.
        context: Whether this is a second sequence, which the module attends to.
    """

    states: tuple[str, ...]
    masks: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    enters: bool = True
    context: bool = False


# of several sequences that are no context, the first one here is that of the module's own hidden states, and has the mask if
# two of them could
POSITIONS = (
    Positions(("input_ids", "inputs_embeds"), ("attention_mask", "mask")),
    Positions(("input_features", "input_values"), ("feature_attention_mask", "input_features_mask", "attention_mask")),
    Positions(("pixel_values",), ("pixel_attention_mask", "patch_attention_mask", "attention_mask")),
    # torch.nn's transformers
    Positions(("tgt",), padding=("tgt_key_padding_mask",), patterns=("tgt_mask",)),
    Positions(("src",), padding=("src_key_padding_mask",), patterns=("src_mask", "mask")),
    Positions(("memory",), padding=("memory_key_padding_mask",), context=True),
    Positions(("hidden_states",), ("attention_mask", "mask"), enters=False),
    Positions(("decoder_input_ids", "decoder_inputs_embeds"), ("decoder_attention_mask",), context=True),
    Positions(
        ("encoder_hidden_states", "key_value_states", "cross_attention_states"),
        ("encoder_attention_mask", "cross_attention_mask"),
        context=True,
    ),
)

# of a module with arguments of other names: its first tensor
UNNAMED = Positions((), ("attention_mask", "mask"))


def positions_first(module: nn.Module) -> bool | None:
    """Whether a module's hidden states lie with positions before the batch, if its own attention (or its layers') says so."""
    children = list(module.children())
    layers = [layer for child in children if isinstance(child, nn.ModuleList) for layer in child]
    inside = [module, *children, *(part for layer in layers for part in layer.children())]
    return next((not m.batch_first for m in inside if isinstance(m, nn.MultiheadAttention)), None)
