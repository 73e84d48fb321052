"""Gives a head that is tied to the embedding a weight of its own, in the optimizers, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lit_prune.modeling_pruned import change_config
from lit_prune.surgery.optimizer_groups import add_beside

# the field of a config of transformers
_TIED = "tie_word_embeddings"


def untie_head(model: nn.Module, optimizers: Sequence[Any], journal: list[Callable[[], None]]) -> bool:
    """Untie linear layers from embeddings, and let the model's config say so; return whether there was anything to untie.

    The new parameter is in the optimizers' groups beside the embedding, and they remember nothing of it yet.

    Args:
        model: The model.
        optimizers: All optimizers.
        journal: Takes what undoes this.
    """
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in embeddings]
    for head in heads:
        tied = head.weight
        journal.append(lambda head=head, tied=tied: setattr(head, "weight", tied))  # type: ignore[misc]
        head.weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
        add_beside(optimizers, model, head.weight, tied, journal)
    if heads and getattr(getattr(model, "config", None), _TIED, False):
        journal.append(change_config(model, {_TIED: False}))
    return bool(heads)
