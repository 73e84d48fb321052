"""Descriptions of modules that mix tokens without attention scores: state-space models, linear attention, convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_prune.architectures.components import Component
from lit_prune.architectures.slices import _has, parameter_of, projection
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, Attribute, GroupSet, Slice, group_cost

Layout = tuple[str, ...]
"""Names of the sections that lie one after the other along a dimension of a parameter."""

# the CUDA kernels of causal-conv1d read their input in place, with strides that are multiples of 8 elements
# (https://github.com/state-spaces/mamba/issues/351)
KERNEL_ALIGNMENT = 8


@dataclass(frozen=True)
class SequenceMixer(Component):
    """A module that mixes tokens by a recurrence or a convolution. One group is one of its heads, or one channel.

    Parameters are described by their sections: ``("value", "value", "states", "head")`` are rows for the values of all heads,
    once more, then rows that belong to no head, and a row for each head. The number of groups is read from the output
    projection's shape, so a model that was pruned before is described by the same data.

    Args:
        path: Path of the module, see :class:`Component`.
        kind: What the group table calls these groups.
        widths: Called with the module; by name of a section, the positions that a group has in it.
        shared: Called with the module; by name of a section that belongs to no group, its size.
        produced: Names of the projections whose outputs belong to groups, each with the layout of its rows.
        parameters: Names of other parameters (convolutions, decays, scales of norms, projections that forward does not call
            but whose weight it reads), each with the layout of its first dimension. Those that a module lacks are passed
            over. Of a depthwise convolution the number of channels follows.
        dims: Of ``parameters`` whose groups do not lie along the first dimension, which one it is.
        output: Name of the output projection, which reads the groups.
        features: The section that its columns are.
        read: Names of further projections that read groups, each with the layout of its columns.
        attributes: Integers of the module, or of a part of it (``"norm.group_size"``), each with the sections whose sizes it
            adds up. Those that a module lacks are passed over.
        parts: Attribute that says in how many equal parts the groups lie, each with something of its own that its groups
            share; every part keeps as many groups as the others. Empty if there are none.
        part_attributes: As ``attributes``, for one part.
        aligned: Which of ``produced`` and ``parameters`` CUDA kernels want a multiple of 8 positions of.
        adapt: Called with the model; gives the function that a module needs to be changed by at every cut, see
            :class:`~lit_prune.groups.Adaptation`.
        requires: See :class:`Component`.
        optional: See :class:`Component`.
    """

    path: str
    kind: str
    widths: Callable[[nn.Module], Mapping[str, int]]
    produced: Mapping[str, Layout]
    output: str = "out_proj"
    features: str = "value"
    shared: Callable[[nn.Module], Mapping[str, int]] = lambda module: {}
    parameters: Mapping[str, Layout] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    read: Mapping[str, Layout] = field(default_factory=dict)
    attributes: Mapping[str, Layout] = field(default_factory=dict)
    parts: str = ""
    part_attributes: Mapping[str, Layout] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    adapt: Callable[[nn.Module], Callable[[nn.Module, Tensor], Callable[[], None]]] | None = None
    requires: str | None = None
    optional: bool = False

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the groups of the module ``name``.

        Raises:
            UnsupportedModelError: If a projection is missing, or a shape does not fit the sections.
        """
        sections = self._sections(model, name)
        slices = tuple(self._slices(model, name, sections))
        size, parts = sections.groups, sections.parts
        return GroupSet(
            name,
            layer,
            self.kind,
            size,
            group_cost(model, slices) if size else 0,
            slices,
            tuple(self._attributes(model, name, sections)),
            minimum=parts,
            adaptations=() if self.adapt is None else (Adaptation(name, self.adapt(model)),),
            equal_parts=parts,
            multiple_of=self._multiple(sections),
        )

    def _sections(self, model: nn.Module, name: str) -> _Sections:
        module = model.get_submodule(name)
        widths, shared = dict(self.widths(module)), dict(self.shared(module))
        parts = getattr(module, self.parts) if self.parts else 1
        columns = projection(model, name, self.output).in_features
        width = widths[self.features]
        if width < 1 or columns % (width * parts):
            raise UnsupportedModelError(
                f"{name}.{self.output} ({type(module).__name__}) has {columns} input features; expected a multiple of"
                f" {width * parts}, {width} for each of the groups in {parts} equal parts."
            )
        return _Sections(columns // width, parts, widths, shared)

    def _slices(self, model: nn.Module, name: str, sections: _Sections) -> Iterator[Slice]:
        for source, layout in self.produced.items():
            found = projection(model, name, source)
            index = sections.index(f"{name}.{source}.weight", layout, found.out_features)
            yield Slice(f"{name}.{source}.weight", 1 - found.input_dim, index, found.input_dim)
            if found.has_bias:
                yield Slice(f"{name}.{source}.bias", 0, index)
        for parameter, layout in self.parameters.items():
            path = f"{name}.{parameter}"
            if _has(model, path):
                dim = self.dims.get(parameter, 0)
                yield Slice(path, dim, sections.index(path, layout, parameter_of(model, path).shape[dim]))
        for reader, layout in {**self.read, self.output: (self.features,)}.items():
            found = projection(model, name, reader)
            index = sections.index(f"{name}.{reader}.weight", layout, found.in_features)
            yield Slice(f"{name}.{reader}.weight", found.input_dim, index, found.input_dim)

    def _attributes(self, model: nn.Module, name: str, sections: _Sections) -> Iterator[Attribute]:
        for attributes, divisor in ((self.attributes, 1), (self.part_attributes, sections.parts)):
            for attribute, layout in attributes.items():
                path, _, last = f"{name}.{attribute}".rpartition(".")
                if _has(model, f"{path}.{last}"):
                    yield Attribute(path, last, *sections.count(layout), divisor)
        for parameter, layout in self.parameters.items():
            path, _, last = f"{name}.{parameter}".rpartition(".")
            if last == "weight" and isinstance(module := model.get_submodule(path), nn.Conv1d):
                if module.groups != module.out_channels:
                    raise UnsupportedModelError(
                        f"{path} has {module.groups} groups and {module.out_channels} channels; expected a depthwise"
                        " convolution, with as many groups as channels."
                    )
                yield Attribute(path, "groups", *sections.count(layout))
                yield Attribute(path, "in_channels", *sections.count(layout))

    def _multiple(self, sections: _Sections) -> int:
        """The smallest number of groups that leaves every aligned dimension a multiple of 8; 1 where one is not today."""
        multiple = 1
        for source in self.aligned:
            layout = self.produced.get(source) or self.parameters[source]
            width, fixed = sections.count(layout)
            if fixed % KERNEL_ALIGNMENT or (sections.groups * width) % KERNEL_ALIGNMENT:
                return 1
            multiple = math.lcm(multiple, KERNEL_ALIGNMENT // math.gcd(width, KERNEL_ALIGNMENT))
        return multiple


@dataclass(frozen=True)
class _Sections:
    """The sections of the parameters of one module.

    Args:
        groups: Number of groups.
        parts: Number of equal parts that they lie in.
        widths: By name of a section, the positions that a group has in it.
        shared: By name of a section that belongs to no group, its size.
    """

    groups: int
    parts: int
    widths: Mapping[str, int]
    shared: Mapping[str, int]

    def count(self, layout: Layout) -> tuple[int, int]:
        """How many positions a layout has for each group, and how many that belong to none."""
        return sum(self.widths.get(s, 0) for s in layout), sum(self.shared.get(s, 0) for s in layout)

    def index(self, parameter: str, layout: Layout, length: int) -> Tensor:
        """The positions of every group in a layout, shape ``(groups, width)``.

        Raises:
            UnsupportedModelError: If the parameter's dimension has another length than the layout.
        """
        found, start = [], 0
        for section in layout:
            if section in self.shared:
                start += self.shared[section]
                continue
            positions = self.groups * self.widths[section]
            found.append(start + torch.arange(positions).view(self.groups, self.widths[section]))
            start += positions
        if start != length:
            sizes = {s: self.shared.get(s, self.groups * self.widths.get(s, 0)) for s in layout}
            raise UnsupportedModelError(
                f"{parameter!r} has {length} positions along the dimension of its groups; expected {start}, in sections"
                f" {', '.join(f'{s}: {sizes[s]}' for s in layout)}."
            )
        return torch.cat(found, dim=1)
