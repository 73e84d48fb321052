"""What attention becomes when it loses all its heads: a module that is skipped, and that caches still can count on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_CACHES = ("past_key_values", "layer_past")


class WithoutHeads:
    """Mixed into the class of an attention module that has no heads left: its forward computes none.

    A cache gets one feature a token, so that the layers behind and the masks find it as long as it should be.
    """

    output_of_no_heads: str | None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """What the heads give when there are none: states of no features, or what the output projection makes of them.

        Args:
            args: As of the class that this is mixed into; the first are hidden states, shape ``(batch, tokens, features)``.
            kwargs: As of that class.
        """
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        for cache in (kwargs.get(name) for name in _CACHES):
            if cache is not None:
                token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                cache.update(token, token, self.layer_idx)  # type: ignore[attr-defined]
        nothing = hidden.new_zeros(*hidden.shape[:-1], 0)
        if self.output_of_no_heads is None:
            return nothing, None
        output: Tensor = self.get_submodule(self.output_of_no_heads)(nothing)  # type: ignore[attr-defined]
        return output, None


@functools.cache
def _class_without_heads(base: type[nn.Module], output: str | None) -> type[nn.Module]:
    return type(f"{base.__name__}WithoutHeads", (WithoutHeads, base), {"output_of_no_heads": output})


def become(module: nn.Module, cls: type[nn.Module]) -> Callable[[], None]:
    """Make a module an instance of a subclass of its class; return a function that undoes it."""
    before = module.__class__
    module.__class__ = cls

    def undo() -> None:
        module.__class__ = before

    return undo


def without_heads(output: str | None) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of attention that may lose all its heads.

    Args:
        output: Path of the output projection within the module; ``None`` if that is outside of it.
    """

    def apply(module: nn.Module, kept: Tensor) -> Callable[[], None]:
        if len(kept):
            return lambda: None
        return become(module, _class_without_heads(type(module), output))

    return apply
