"""Which positions of hidden states are real, taken from the masks that the modules of a model are called with.

A batch can be anything, and an encoder's mask is none of the decoder's; but the forward of a model, and those of the stacks
of layers in it, name their masks. :class:`TokenMasks` follows the calls of the modules around those whose inputs are looked
at. The hidden states there belong to the sequence that the innermost module around them was called with; where a tensor is
one that some module around was given (an encoder's output that a decoder attends to), to that one.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from lit_prune.architectures.arguments import POSITIONS, UNNAMED, Positions, positions_first
from lit_prune.architectures.registry import arguments_of
from lit_prune.calibration.mask_shapes import fitted, in_frames, masks_in, seen_positions, visible


@dataclass
class _Sequence:
    """A sequence that a module was called with: its tensors, and its mask if one was given."""

    states: list[Tensor]
    mask: Any
    positions: Positions
    enters: bool
    inverted: bool = False
    pattern: bool = False

    def masks(self) -> list[Tensor]:
        """The masks that were given; there may be one for each type of layer."""
        masks = self.mask.values() if isinstance(self.mask, Mapping) else [self.mask]
        return [mask for mask in masks if isinstance(mask, Tensor)]


@dataclass(frozen=True)
class _Output:
    """What a module made of a sequence that came in there, and the mask of its positions."""

    tensor: weakref.ref[Tensor]
    mask: Tensor | None


class _Call:
    """One call of a module's forward, its arguments sorted into sequences."""

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[Positions],
        parameters: Sequence[str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        positions_first: bool | None = None,
    ) -> None:
        self.module = module
        self.positions_first = positions_first
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        self.given = given
        self.sequences = [s for p in names if (s := _sequence(p, given)) is not None]
        self.main = next((s for s in self.sequences if not s.positions.context), None) or self._unnamed(names, given)
        for sequence in self.sequences:
            if self.main is not None and sequence is not self.main and not sequence.positions.context:
                sequence.mask = None if sequence.mask is self.main.mask else sequence.mask
        self.past = _past_length(self.main, given)
        context = next((s for s in self.sequences if s.positions.masks and s.positions.context), None)
        # cross-attention: its only mask is that of what it attends to
        inside = self.main is not None and self.main is not context and not self.main.enters
        if inside and context is not None and not {*context.positions.masks} & {*parameters, *kwargs}:
            context.mask, self.main.mask = self.main.mask, None  # type: ignore[union-attr]

    def _unnamed(self, names: Sequence[Positions], given: Mapping[str, Any]) -> _Sequence | None:
        masks = _mask_names(names)
        first = next((v for n, v in given.items() if isinstance(v, Tensor) and n not in masks), None)
        if first is None or any(first is t for s in self.sequences for t in s.states):
            return None
        mask = next((given[name] for name in UNNAMED.masks if name in given), None)
        self.sequences.append(_Sequence([first], mask, UNNAMED, not first.is_floating_point()))
        return self.sequences[-1]

    def mask_of(self, sequence: _Sequence, lead: Sequence[int], batch_dim: int = 0) -> Tensor | None:
        """The mask of a sequence in the shape of hidden states, if one was given position by position."""
        for mask in sequence.masks():
            if sequence.pattern or mask.dim() > 3:
                continue
            batch = len(mask) if len(lead) < 2 else lead[batch_dim]
            positions = math.prod(lead) // max(batch, 1)
            shown = visible(mask, sequence.inverted)
            if shown.dim() == 3:
                # patches in rows and columns, not queries and keys
                if len(shown) != batch or shown[0].numel() != positions:
                    continue
                shown = shown.flatten(1)
            elif shown.dim() == 2 and shown.shape[1] != positions:
                if self.past and shown.shape[1] == positions + self.past:
                    shown = shown[:, self.past :]
                else:
                    frames = in_frames(self.module, shown, positions)
                    shown = shown if frames is None else frames
            found = fitted(shown, lead, batch_dim)
            if found is not None:
                return found
        return None


def _mask_names(names: Sequence[Positions]) -> set[str]:
    return {name for p in names for name in (*p.masks, *p.padding)}


def _sequence(positions: Positions, given: Mapping[str, Any]) -> _Sequence | None:
    states = [given[name] for name in positions.states if isinstance(given.get(name), Tensor)]
    if not states:
        return None
    for names, inverted, pattern in (
        (positions.masks, False, False),
        (positions.padding, True, False),
        (positions.patterns, True, True),
    ):
        for name in names:
            if name in given:
                return _Sequence(states, given[name], positions, positions.enters, inverted, pattern)
    return _Sequence(states, None, positions, positions.enters)


def _past_length(sequence: _Sequence | None, given: Mapping[str, Any]) -> int:
    """How many positions of a mask are those of a cache, which come before what the module was called with."""
    if sequence is None or not isinstance(sequence.mask, Tensor) or sequence.mask.dim() != 2:
        return 0
    states = sequence.states[0]
    if states.dim() < 2 or sequence.mask.shape[1] <= states.shape[1]:
        return 0
    return next((int(value.get_seq_length()) for value in given.values() if hasattr(value, "get_seq_length")), 0)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, seen in different shapes perhaps."""
    if a is b:
        return True
    if a.is_nested or b.is_nested or a.numel() != b.numel() or a.storage_offset() != b.storage_offset():
        return False
    place = a.untyped_storage().data_ptr()
    return place != 0 and place == b.untyped_storage().data_ptr()


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order."""
    kinds = inspect.Parameter
    named = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in named)


_DECODER = next(p for p in POSITIONS if "decoder_input_ids" in p.states)


def has_decoder(module: nn.Module) -> bool:
    """Whether a model's forward takes a second sequence that its outputs are for."""
    return not {*_DECODER.states, *_DECODER.masks}.isdisjoint(_parameters(module))


def output_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], lead: Sequence[int]
) -> Tensor | None:
    """The mask of the positions that a model gives outputs for: those of the decoder, if it has one.

    Args:
        module: The model.
        args: Positional arguments of its forward.
        kwargs: Its other arguments.
        lead: Shape of the outputs without their features.

    Returns:
        Bool tensor of the shape ``lead``, True at real positions; ``None`` if there is no mask of such positions.
    """
    call = _Call(module, arguments_of(module), _parameters(module), args, kwargs)
    if has_decoder(module):
        return call.mask_of(_Sequence([], call.given.get(_DECODER.masks[0]), _DECODER, True), lead)
    return None if call.main is None else call.mask_of(call.main, lead)


class TokenMasks:
    """Tells, within a forward, which positions of a module's input are real.

    Args:
        model: The model.
        names: Names of the modules in it whose inputs are looked at.

    Example::

        with TokenMasks(model, ["layers.0.mlp.down_proj"]) as masks:
            masks.start_batch(batch)
            # in a hook on that module: masks.of(inputs)
            model(**batch)
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        around = {""}
        for name in names:
            parts = name.split(".")
            around.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        self._modules = {name: model.get_submodule(name) for name in sorted(around)}
        self._model = type(model).__name__
        self._names = arguments_of(model)
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._outputs: list[_Output] = []
        self._patterns: dict[tuple[int, torch.Size, int], tuple[Tensor, Tensor | None]] = {}
        self._receives = False
        self._batch: list[Tensor] = []
        self._asked = self._used = self._warned = False
        self.batches = 0

    def __enter__(self) -> TokenMasks:
        masks = _mask_names(self._names)
        for module in self._modules.values():
            # a list of blocks is never called, and a projection is given nothing but its input
            parameters = _parameters(module) if next(module.children(), None) is not None else ()
            self._receives |= not masks.isdisjoint(parameters)
            if parameters:
                before = self._before(parameters, positions_first(module))
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._check_use()
        self._forget()

    def start_batch(self, batch: Any) -> None:
        """Forget the batch before.

        Args:
            batch: What the next forwards are of. A mask in it counts only for a model whose forward takes none.
        """
        self._check_use()
        self._forget()
        self._batch = masks_in(batch)
        self.batches += 1

    @property
    def batch_dim(self) -> int:
        """The dimension of hidden states, where the forward is now, that samples lie along."""
        known = (c.positions_first for c in reversed(self._calls) if c.positions_first is not None)
        return int(next(known, False))

    def of(self, hidden: Tensor) -> Tensor | None:
        """The mask of hidden states that a module is called with right now.

        Args:
            hidden: Hidden states, shape ``(..., features)``.

        Returns:
            Bool tensor of the shape of ``hidden`` without its last dimension, True at real positions; ``None`` if all are.
        """
        if hidden.is_nested:
            return None
        mask = self._search(hidden, hidden.shape[:-1])
        if mask is None and not self._receives:
            shown = (fitted(visible(m), hidden.shape[:-1], self.batch_dim) for m in self._batch if m.dim() == 2)
            mask = next((m for m in shown if m is not None), None)
        self._asked = True
        self._used |= mask is not None
        return None if mask is None else mask.to(hidden.device)

    def _search(self, tensor: Tensor, lead: torch.Size) -> Tensor | None:
        sequences, output = self._sequences(tensor)
        for call, sequence in sequences:
            mask = call.mask_of(sequence, lead, self.batch_dim)
            if mask is not None:
                return mask
        for _, sequence in sequences:
            masks = (self._reduced(mask, sequence, lead) for mask in sequence.masks())
            fit = [mask for mask in masks if mask is not None]
            if fit:
                return torch.stack(fit).any(dim=0)
        return None if output is None or output.mask is None else fitted(output.mask, lead, self.batch_dim)

    def _reduced(self, mask: Tensor, sequence: _Sequence, lead: torch.Size) -> Tensor | None:
        """A mask of queries and keys as one of positions; layer after layer is called with the same one."""
        if mask.dim() < 3 and not sequence.pattern:
            return None
        key = (id(mask), lead, self.batch_dim)
        if key not in self._patterns:
            batch = len(mask) if len(lead) < 2 else lead[self.batch_dim]
            positions = lead.numel() // max(batch, 1)
            seen = seen_positions(visible(mask, sequence.inverted), batch)
            fits = seen is not None and seen.shape[1] >= positions
            found = fitted(seen[:, seen.shape[1] - positions :], lead, self.batch_dim) if fits else None  # type: ignore[index, union-attr]
            # the mask itself is kept so that no other one gets its id
            self._patterns[key] = (mask, found)
        return self._patterns[key][1]

    def _sequences(self, tensor: Tensor) -> tuple[list[tuple[_Call, _Sequence]], _Output | None]:
        """The sequence that a tensor belongs to, as the calls around it know it, from the innermost on.

        It ends with the call that the sequence came in by, or with the output of another one that it is.
        """
        found: list[tuple[_Call, _Sequence]] = []
        calls = [call for call in reversed(self._calls) if call.sequences]
        states, follows = [tensor], True
        # what some module around was given is looked for there first
        known = any(_same(tensor, s) for call in calls for seq in call.sequences for s in seq.states)
        output = None if known else self._output(states)
        for call in calls if output is None else ():
            match = next((q for q in call.sequences if any(_same(a, b) for a in q.states for b in states)), None)
            if match is None and follows and not known:
                output = self._output(states)
                if output is not None:
                    break
                match = call.main
            if match is None:
                continue
            found.append((call, match))
            states = [*states, *match.states]
            known = False
            follows = match is call.main and not match.enters
        return found, output or self._output(states)

    def _output(self, states: Sequence[Tensor]) -> _Output | None:
        for output in self._outputs:
            tensor = output.tensor()
            if tensor is not None and any(_same(tensor, s) for s in states):
                return output
        return None

    def _before(self, parameters: Sequence[str], first: bool | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append(_Call(module, self._names, parameters, args, kwargs, first))

        return hook

    def _after(self, module: nn.Module, _: Any, output: Any) -> None:
        if all(call.module is not module for call in self._calls):
            return
        while self._calls[-1].module is not module:
            self._calls.pop()
        main = self._calls[-1].main
        states = output if isinstance(output, Tensor) else _first(output)
        if main is not None and main.enters and states is not None and states.dim() > 1:
            mask = self._search(main.states[0], states.shape[:-1])
            mask = mask.T if mask is not None and self.batch_dim and mask.dim() == 2 else mask
            self._outputs.append(_Output(weakref.ref(states), mask))
        self._calls.pop()

    def _forget(self) -> None:
        self._calls, self._outputs, self._batch, self._patterns = [], [], [], {}
        self._asked = self._used = False

    def _check_use(self) -> None:
        if self._used or self._warned or not self._asked:
            return
        if any(bool((mask == 0).any()) for mask in self._batch):
            self._warned = True
            warnings.warn(
                f"The calibration batches hold an attention_mask, but the forward of {self._model} was not called with one of"
                " the shape of its hidden states, so padding counts as tokens. Give the mask to the model.",
                stacklevel=3,
            )


def _first(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    return first if isinstance(first, Tensor) else None


def recomputing() -> bool:
    """Whether a forward runs within a backward pass, to make anew what activation checkpointing left out."""
    return ModuleTracker().is_bw
