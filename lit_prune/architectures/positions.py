"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any

from torch import nn


def token_positions(model: Any, config: Any) -> int | None:
    """Return the most tokens that a model's positions are enough for, ``None`` if its config names no number.

    Args:
        model: The model, a transformers model.
        config: The config of the part that reads tokens.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not words and module.num_embeddings == most:
            # the positions of tokens begin behind that of padding
            return most if module.padding_idx is None else most - module.padding_idx - 1
    return most
