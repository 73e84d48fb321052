"""Adaptations of modules that need more than smaller parameters and integers to run with fewer groups, or with none."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lit_prune.errors import UnsupportedModelError

_CACHES = ("past_key_values", "layer_past")
_CLASSES: dict[tuple[type, type], type] = {}


class Adapted:
    """Base class of what is mixed into the class of a module at a cut; lets such a module be copied and pickled.

    The class is made when it is needed, so that pickle could not find it by its name: it is written as the class that the
    module had, and what was mixed in.
    """

    adapted_from: type
    adapted_by: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How pickle and copy build the module anew."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        build, arguments, *state = reduced
        if build is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return build, arguments, *state
        return new_adapted, (self.adapted_from, self.adapted_by, *arguments[1:]), *state


def new_adapted(before: type, mixins: tuple[type, ...], *arguments: Any) -> Any:
    """An empty module of the class that :func:`become` makes of a class with these mixins, one after the other."""
    cls = before
    for mixin in mixins:
        cls = _adapted_class(cls, mixin)
    return cls.__new__(cls, *arguments)


def _adapted_class(before: type, mixin: type) -> type:
    if (before, mixin) not in _CLASSES:
        members = {
            "adapted_from": getattr(before, "adapted_from", before),
            "adapted_by": (*getattr(before, "adapted_by", ()), mixin),
            "__module__": __name__,
        }
        _CLASSES[before, mixin] = type(f"{before.__name__}{mixin.__name__}", (mixin, before), members)
    return _CLASSES[before, mixin]


def become(module: nn.Module, mixin: type[Adapted]) -> Callable[[], None]:
    """Make a module an instance of its class with ``mixin`` before it; return a function that undoes this."""
    before = type(module)
    module.__class__ = _adapted_class(before, mixin)

    def undo() -> None:
        module.__class__ = before

    return undo


def nothing_to_undo() -> None:
    """What an adaptation returns that left the module as it was."""


class KeptHeads(Adapted):
    """What attention remembers that gets something for every head of the dense model: which of them are its own."""

    kept_heads: list[int]


def kept_heads(module: nn.Module, kept: Tensor, mixin: type[KeptHeads]) -> Callable[[], None]:
    """Let attention know, by ``mixin``, which heads of the dense model it has; the function that undoes this.

    Args:
        module: The attention module, of which one group is one head.
        kept: Indices of the heads that stay, of those that it has now, shape ``(kept,)``.
        mixin: What its class becomes, derived from :class:`KeptHeads`.
    """
    if isinstance(module, mixin):
        before: list[int] = module.kept_heads
        module.kept_heads = [before[i] for i in kept.tolist()]

        def undo() -> None:
            module.kept_heads = before

        return undo
    back = become(module, mixin)
    # no buffer: from_pretrained builds models without values, and buffers that no file holds would stay so
    module.kept_heads = kept.tolist()  # type: ignore[assignment]

    def undo_all() -> None:
        vars(module).pop("kept_heads", None)
        back()

    return undo_all


class WithoutHeads(Adapted):
    """Mixed into the class of an attention module that has no heads left: its forward computes none.

    A cache gets one feature a token, so that the layers behind and the masks find it as long as it should be.
    """

    output_of_no_heads: str | None
    weights_of_no_heads: bool = True

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None] | Tensor:
        """What the heads give when there are none: states of no features, or what the output projection makes of them.

        Args:
            args: As of the class that this is mixed into; the first are hidden states, shape ``(batch, tokens, features)``.
            kwargs: As of that class.
        """
        module: Any = self
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        for cache in (kwargs.get(name) for name in _CACHES):
            if cache is not None:
                token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                cache.update(token, token, module.layer_idx)
        # cut from what came in, so that the norm before has a gradient: zeros, where DDP would wait for one
        states = hidden[..., :0]
        if self.output_of_no_heads is not None:
            states = module.get_submodule(self.output_of_no_heads)(states)
        return (states, None) if self.weights_of_no_heads else states


def without_heads(output: str | None, weights: bool = True) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of attention that may lose all its heads.

    Args:
        output: Path of the output projection within the module; ``None`` if that is outside of it.
        weights: Whether the module returns ``(states, weights)``, and not its states alone.
    """

    def apply(module: nn.Module, kept: Tensor) -> Callable[[], None]:
        if len(kept):
            return nothing_to_undo
        back = become(module, WithoutHeads)
        module.output_of_no_heads = output  # type: ignore[assignment]
        module.weights_of_no_heads = weights  # type: ignore[assignment]

        def undo() -> None:
            vars(module).pop("output_of_no_heads", None)
            vars(module).pop("weights_of_no_heads", None)
            back()

        return undo

    return apply


class WithoutInputs(Adapted):
    """Mixed into transformers' Conv1D once nothing is left to read: its own forward cannot tell the shape of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """The bias for every token, shape ``(..., outputs)``."""
        module: Any = self
        return functional.linear(x, module.weight.T, module.bias)


def without_inputs(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of a Conv1D that may lose all its inputs."""
    return nothing_to_undo if len(kept) else become(module, WithoutInputs)


def refuse_continuous_batching(*_: Any, **__: Any) -> Any:
    """Takes the place of ``init_continuous_batching`` of a model that lost key/value heads.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        "Continuous batching (generate_batch) holds a cache of config.num_key_value_heads for every layer; layers of this model"
        " kept fewer by pruning. Use generate, prune with kinds=['mlp'], or prune with uniform=True, save and load the model."
    )


def without_continuous_batching(size: int) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of a whole model to layers with fewer key/value heads.

    Args:
        size: The number of groups of heads before the cut.
    """

    def apply(model: nn.Module, kept: Tensor) -> Callable[[], None]:
        name = "init_continuous_batching"
        if len(kept) == size or not hasattr(model, name) or name in vars(model):
            return nothing_to_undo
        setattr(model, name, refuse_continuous_batching)

        def undo() -> None:
            vars(model).pop(name, None)

        return undo

    return apply
