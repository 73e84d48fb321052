"""Group sets: which slices of which parameters are removed together.

A *group* is the smallest set of weights that can only be removed together: a key/value head with the query heads that
share it, or one channel of an MLP. A :class:`GroupSet` holds all groups of one kind in one place of the model and
describes, as index matrices, which slices of which parameters belong to each of them. Nothing here knows an
architecture; the descriptions that produce group sets live in :mod:`lit_prune.architectures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune._renamed import RenamedAttribute, renamed_fields
from lit_prune.errors import UnsupportedModelError
from lit_prune.modeling_pruned import BLOCK as BLOCK
from lit_prune.modeling_pruned import HIDDEN as HIDDEN
from lit_prune.modeling_pruned import attribute_value


@renamed_fields(opaque="unobservable_input")
@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one parameter that belongs to each group of a set.

    Args:
        parameter: Qualified name of the parameter, relative to the model.
        dim: Dimension of the parameter along which the groups lie.
        index: Integer tensor of shape ``(groups, width)``: ``index[g]`` are the positions along ``dim`` that are
            removed with group ``g``.
        input_dim: Dimension of the parameter that is multiplied with the input features of its module: 1 for the
            weight of ``nn.Linear`` and of convolutions, 0 for that of ``Conv1D`` and of transposed convolutions; ``None`` for
            biases and norms.
        unobservable_input: Whether the module that owns the parameter does more than multiply its input with it, or convolve
            it (fused experts, ``nn.MultiheadAttention``), so that the input features cannot be observed from outside.
            Criteria of activations take them all to be 1, and repair leaves the parameter as it is, unless it is that of
            experts.
        only_in_training: Whether nothing but training mode uses the parameter, as that of an auxiliary head. It is cut with
            its groups; calibration, which is in evaluation mode, says nothing of it, and repair leaves it as it is.
    """

    parameter: str
    dim: int
    index: Tensor
    input_dim: int | None = None
    unobservable_input: bool = False
    only_in_training: bool = False
    # the index by device: a copy from pageable memory in every batch would wait for the device
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def consumes(self) -> bool:
        """Whether the slice reads what the group produces (columns of ``o_proj`` and ``down_proj``)."""
        return self.dim == self.input_dim

    @property
    def observable(self) -> bool:
        """Whether the inputs of the slice's module are the features that its parameter multiplies."""
        return self.input_dim is not None and not self.unobservable_input and not self.only_in_training

    gather = RenamedAttribute("sum_by_group")

    def sum_by_group(self, line: Tensor, start: int = 0, length: int | None = None) -> Tensor:
        """Sum values, one for each position along ``dim``, to one number a group.

        Args:
            line: Tensor of the parameter's length along ``dim``, or a part of it.
            start: Position where the part starts.
            length: Length of the whole, if ``line`` is a part.

        Returns:
            Tensor of shape ``(groups,)``.
        """
        if length is not None:
            line = torch.nn.functional.pad(line, (start, length - start - line.shape[0]))
        return line[self.index_on(line.device)].sum(dim=1)

    def index_on(self, device: torch.device) -> Tensor:
        """Return the index on a device, copied there once.

        Args:
            device: The device.
        """
        if device == self.index.device:
            return self.index
        if device not in self._copies:
            self._copies[device] = self.index.to(device)
        return self._copies[device]


@dataclass(frozen=True)
class Attribute:
    """An integer of a module that counts something per group and has to follow the number of kept groups.

    Args:
        module: Qualified name of the module.
        name: Name of the attribute; ``config.NAME`` stands for a field that the module's forward reads from its
            config, which the module then sees through a view of its own, so that other layers keep theirs; ``NAME[1]`` for
            one number of a list or tuple of numbers, of which the module gets another.
        per_group: The attribute's value is ``per_group`` times the number of kept groups, divided by ``divisor``, plus
            ``fixed``.
        fixed: What it counts that belongs to no group: the channels of B and C in a Mamba-2's convolution.
        divisor: A number that the kept groups are always a multiple of: of the features that one of several norms counts,
            the number of norms.
        shared: Whether groups of other sets may count in it, too: it then goes down by ``per_group`` for every group that is
            removed, from whatever it is.
    """

    module: str
    name: str
    per_group: int
    fixed: int = 0
    divisor: int = 1
    shared: bool = False

    def value(self, kept: int) -> int:
        """What the attribute is once ``kept`` groups are left."""
        return attribute_value((self.per_group, self.fixed, self.divisor), kept)

    def followed(self, owner: nn.Module, kept: int, removed: int) -> tuple[str, Any]:
        """What a module's attribute is to be once groups are gone.

        Args:
            owner: The module.
            kept: The number of groups that stay.
            removed: The number of groups that go.

        Returns:
            The attribute's name, and its value.
        """
        name, bracket, position = self.name.partition("[")
        if not bracket and not self.shared:
            return name, self.value(kept)
        before = getattr(owner, name)
        values = list(before) if bracket else [before]
        at = int(position.rstrip("]")) if bracket else 0
        values[at] = values[at] - self.per_group * removed if self.shared else self.value(kept)
        return name, type(before)(values) if bracket else values[0]


@dataclass(frozen=True)
class Adaptation:
    """A change that a module needs to run with fewer groups, where smaller parameters and integers are not enough.

    Args:
        module: Qualified name of the module.
        apply: Called with the module and the indices of the groups that stay, a tensor of shape ``(kept,)``; it changes
            the module and returns a function that undoes this.
    """

    module: str
    apply: Callable[[nn.Module, Tensor], Callable[[], None]]


@dataclass(frozen=True, eq=False)
class GroupSet:
    """All groups of one kind in one module, for example the channels of one MLP.

    Args:
        name: Qualified name of the module that the groups are parts of; unique together with ``kind``.
        layer: Index of the layer.
        kind: ``"attention"``, ``"mlp"`` or whatever an architecture's description calls it; ``"block"`` for a whole block,
            which holds the other sets of that block; ``"hidden"`` for the channels of the hidden states, which every layer has.
        size: Number of groups.
        cost: Number of parameters that are removed with one group.
        slices: The parameter slices that the groups couple.
        attributes: Module attributes that depend on the number of groups.
        block: Qualified name of the block of the model (a decoder layer) that the set is in.
        minimum: Smallest number of groups with which the module still runs; 0 if all can be removed.
        adaptations: Further changes that the module needs when groups are removed.
        equal_parts: The groups lie in so many parts of the same size, one after the other, each of which has to keep as
            many groups as the others: heads that share one of several B and C of a Mamba-2.
        multiple_of: A number that kernels want the kept groups to be a multiple of; where ``Limits.multiple_of`` says
            something else, that holds.
        routed: Whether the module is called with some of the positions only, those that a router sends there: an expert that
            is a module of its own. Its rows are then no positions of the layer around it.
        buffers: The slices of buffers (running statistics of batch norms) that are removed with the groups; ``parameter``
            names a buffer.
        counts_tokens: Of a whole block, whether it is one of those whose part of the key/value cache says how many tokens
            there are so far, where that of other blocks (state-space models, linear attention, MLPs) does not. The model
            runs with one of these or more.
    """

    name: str
    layer: int
    kind: str
    size: int
    cost: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    block: str = ""
    minimum: int = 0
    adaptations: tuple[Adaptation, ...] = ()
    equal_parts: int = 1
    multiple_of: int = 1
    routed: bool = False
    buffers: tuple[Slice, ...] = ()
    counts_tokens: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """The identifier of the set within its model: name and kind."""
        return self.name, self.kind

    @property
    def consumers(self) -> tuple[Slice, ...]:
        """The slices that read the groups' outputs in evaluation mode, for example the columns of ``down_proj``."""
        return tuple(s for s in self.slices if s.consumes and not s.only_in_training)

    @property
    def masked(self) -> tuple[Slice, ...]:
        """The slices to set to zero in order to mask a group: its consumers, or all slices if it has none (experts)."""
        return self.consumers or self.slices

    refittable = RenamedAttribute("repairable")

    @property
    def repairable(self) -> tuple[Slice, ...]:
        """The consumers that repair can refit: those whose inputs and outputs can be observed."""
        return tuple(s for s in self.consumers if not s.unobservable_input)

    def removed_with(self, group: int) -> tuple[int, ...]:
        """A group, and those at the same place in the other parts (see ``equal_parts``): what a smallest cut removes."""
        size = self.size // self.equal_parts
        return tuple(part * size + group % size for part in range(self.equal_parts))

    def kept_to_removed(self, kept: Iterable[int]) -> Tensor:
        """The sorted indices of the groups that are not in ``kept``."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[torch.as_tensor(list(kept), dtype=torch.long)] = False
        return mask.nonzero().flatten()


def stack_of(block: str) -> tuple[str, int]:
    """Name of the list that a block is in, and its position there."""
    stack, _, index = block.rpartition(".")
    return stack, int(index)


def is_inside(name: str, block: str) -> bool:
    """Whether a qualified name is that of a block or of something in it."""
    return name == block or name.startswith(f"{block}.")


def group_cost(model: nn.Module, slices: Sequence[Slice]) -> int:
    """Number of parameters of ``model`` that one group of these slices holds."""
    sizes = ((s, model.get_parameter(s.parameter)) for s in slices)
    return sum(s.index.shape[1] * parameter.numel() // parameter.shape[s.dim] for s, parameter in sizes)


def count_removed(model: nn.Module, group_sets: Sequence[GroupSet], removed: Sequence[Tensor]) -> int:
    """Number of parameters that leave with some groups; a weight that belongs to groups of two sets counts once.

    Args:
        model: The model.
        group_sets: Its group sets.
        removed: The indices of the removed groups of every set.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left: dict[str, dict[int, Tensor]] = {}
    for group_set, groups in zip(group_sets, removed, strict=True):
        for part in group_set.slices:
            length = parameters[part.parameter].shape[part.dim]
            masks = left.setdefault(part.parameter, {})
            mask = masks.setdefault(part.dim, torch.ones(length, dtype=torch.bool))
            mask[part.index[groups].flatten()] = False
    total = 0
    for name, masks in left.items():
        stays = parameters[name].numel()
        for mask in masks.values():
            stays = stays // max(len(mask), 1) * int(mask.sum())
        total += parameters[name].numel() - stays
    return total


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of the model, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of the model, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def check_names(model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
    """Refuse group sets that are not of this model, but of one inside it for instance.

    Raises:
        UnsupportedModelError: If the model lacks a parameter that they name.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for group_set in group_sets:
        for part in group_set.slices:
            if part.parameter not in names:
                raise UnsupportedModelError(
                    f"The group sets name the parameter {part.parameter!r}, which this {type(model).__name__} does not have."
                    " Names are relative to the model that was found: give find_model(module)[1], and the module as root."
                )


def check_weights(model: nn.Module, group_sets: Sequence[GroupSet], *, ties: bool = True) -> None:
    """Refuse weights that cannot be scored or sliced.

    Args:
        model: The model.
        group_sets: Its group sets.
        ties: Whether to look for ties, too; not for groups that were found by tracing, which saw every use of a weight.

    Raises:
        UnsupportedModelError: For quantised weights, or a weight that is tied to one outside its group set. A module
            that the model uses in several places is one place.
    """
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group_set in group_sets:
        names = {s.parameter for s in group_set.slices}
        for name in names:
            parameter = parameters[name]
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                raise UnsupportedModelError(
                    f"{name!r} holds quantised weights ({parameter.dtype}). Pruning needs float32, bfloat16 or float16"
                    " weights: load the model without a quantization_config, prune it, and quantise afterwards."
                )
            elsewhere = set(places[id(parameter)]) - names
            if ties and elsewhere:
                raise UnsupportedModelError(
                    f"{name!r} is the same parameter as {sorted(elsewhere)}, which belongs to another place of the"
                    " model: cutting one would cut the other. Untie them first."
                )
