"""Descriptions of the parts of a model, as data: where attention and MLPs are, and how their projections are laid out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_prune._renamed import renamed_fields
from lit_prune.architectures.adaptations import without_continuous_batching, without_heads
from lit_prune.architectures.slices import (
    STACKED,
    _check_layout,
    _has,
    consumed,
    group_set_of,
    part_of,
    part_rows,
    produced,
    projection,
    reader_adaptations,
)
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, GroupSet, Slice

QUERY_HEAD = "query_head"


_HEAD_COUNTS = {
    "num_heads": "query_heads",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "key_value_heads",
    "num_key_value_groups": "queries_per_key_value",
}


class Component(ABC):
    """Base class of the descriptions of a part of a model: its path and how to find its groups.

    Subclasses are frozen dataclasses with at least the fields ``path``, ``requires`` and ``optional``.

    Args:
        path: Qualified name of the module within the model, ``*`` standing for an index; the first one is the layer's. It
            matches at the end of a name, so that the same description serves every task head.
        requires: Describe only those modules at ``path`` that have a part of this name, and skip the others.
        optional: Whether a model may have no such module at all.
    """

    path: str
    requires: str | None
    optional: bool
    # whether the groups hold every place where a parameter is used, so that a parameter may be in several modules
    follows_ties: ClassVar[bool] = False

    @abstractmethod
    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the groups of the module ``name``.

        Args:
            model: The model.
            name: Qualified name of the module.
            layer: Index of its layer.
            pruned: Keys of the group sets that lost something in earlier cuts.

        Raises:
            UnsupportedModelError: If the module is not what the description says.
        """

    def places(self, model: nn.Module) -> list[tuple[str, int, str]]:
        """Name, layer and block of every module at the path."""
        pattern = re.compile(r"(?:.*\.)?" + re.escape(self.path).replace(r"\*", r"(\d+)"))
        found = []
        for name, _ in model.named_modules():
            match = pattern.fullmatch(name)
            if match:
                starred = match.lastindex is not None
                found.append((name, int(match[1]) if starred else 0, name[: match.end(1)] if starred else name))
        return found

    def group_sets(self, model: nn.Module, pruned: Collection[tuple[str, str]]) -> Iterator[GroupSet]:
        """The group sets of every module at the path."""
        for name, layer, block in self.places(model):
            if self.requires is None or _has(model, f"{name}.{self.requires}"):
                yield replace(self.group_set(model, name, layer, pruned), block=block)


@renamed_fields(having="requires")
@dataclass(frozen=True)
class Attention(Component):
    """Description of an attention module: its path and the layout of its projections.

    One group is a key/value head with the query heads that share it. Where all query heads share one key/value head
    (multi-query attention), that one stays, and the groups are the query heads. Head counts are read from the
    projections' shapes, so a model that was pruned before is described by the same data.

    Args:
        path: Path of the attention module, see :class:`Component`.
        query: Name of the query projection within the attention module.
        key: Name of the key projection.
        value: Name of the value projection.
        output: Name of the output projection, which reads the heads.
        head_dim: Attribute of the core that holds the features of one head, or a function of the core that gives them.
        attributes: Attributes of the core that count heads or features, each mapped to what it counts:
            ``"query_heads"``, ``"key_value_heads"``, ``"query_features"``, ``"key_value_features"`` or
            ``"queries_per_key_value"``. Those that a module lacks are skipped. ``config.NAME`` stands for a field read
            from the module's config in forward.
        kind: What the group table calls these groups.
        fused: Name of the one projection that gives queries, keys and values, in place of three.
        layout: How the rows of ``fused`` lie: ``"stacked"``, all queries, all keys, all values; or ``"interleaved"``,
            for every key/value head its queries, its key and its value.
        query_parts: How often the features of a head the query projection gives, head by head: 2 where a gate lies behind
            each head's query. With ``fused`` it has no meaning.
        parameters: Further parameters of the attention module with an entry for each head or feature, such as attention
            sinks or norms over all heads; each mapped to what its entries are, as in ``attributes``. Those that a module
            lacks are skipped. A function of the attention module that gives such a mapping, where an option decides.
        core: Path, within the attention module, of the module that computes the heads, if that is another one.
        skippable: Whether a layer may lose all its groups, the core then being skipped. It has to return ``(states, weights)``
            (see ``weights``), its states the output projection's if that is a part of it and the heads' if not.
        weights: Whether a skippable core returns ``(states, weights)``, and not its states alone.
        adapt: Called with the core and the indices of the kept groups at every cut, for cores that need more than
            smaller projections and attributes; see :class:`~lit_prune.groups.Adaptation`.
        requires: See :class:`Component`.
        optional: See :class:`Component`.
    """

    path: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    head_dim: str | Callable[[nn.Module], int] = "head_dim"
    attributes: Mapping[str, str] = field(default_factory=lambda: dict(_HEAD_COUNTS))
    kind: str = "attention"
    fused: str | None = None
    layout: str = STACKED
    query_parts: int = 1
    parameters: Mapping[str, str] | Callable[[nn.Module], Mapping[str, str]] = field(default_factory=dict)
    core: str = ""
    skippable: bool = False
    weights: bool = True
    adapt: Callable[[nn.Module, Tensor], Callable[[], None]] | None = None
    requires: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        """Check the layout.

        Raises:
            ValueError: If it is unknown.
        """
        _check_layout(self.layout)

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the groups of the attention module ``name``.

        Raises:
            UnsupportedModelError: If a projection is missing, of an unknown type, or its shape does not fit the heads.
        """
        core_name = f"{name}.{self.core}" if self.core else name
        core = model.get_submodule(core_name)
        head_dim = getattr(core, self.head_dim, None) if isinstance(self.head_dim, str) else self.head_dim(core)
        if not isinstance(head_dim, int):
            raise UnsupportedModelError(
                f"{core_name} ({type(core).__name__}) was expected to hold the features of one head as an integer"
                f" attribute {self.head_dim!r}; found {head_dim!r}. Let head_dim be the name of the attribute that does, or a"
                " function such as lambda attention: attention.n_embd // attention.n_head."
            )
        heads, kv_heads = self._heads(model, name, head_dim)
        # with one key/value head the earlier cut tells a model that always had one from one that was cut to one
        by_query = kv_heads == 1 and (heads > 1 or (name, QUERY_HEAD) in pruned) and (name, self.kind) not in pruned
        share = 1 if by_query else heads // max(kv_heads, 1)
        query_rows = torch.arange(heads * head_dim).view(heads // max(share, 1), share * head_dim)
        counts = {"query_heads": share, "query_features": share * head_dim}
        if by_query:
            counts["queries_per_key_value"] = 1
        else:
            counts.update(key_value_heads=1, key_value_features=head_dim)
        slices = (
            *self._produced(model, name, heads, kv_heads, head_dim, None if by_query else share),
            *self._extra(model, name, counts, len(query_rows)),
            consumed(model, name, self.output, query_rows),
        )
        adaptations = list(reader_adaptations(model, name, self.output))
        minimum = 1
        if not by_query:
            adaptations.append(Adaptation("", without_continuous_batching(len(query_rows))))
        if self.adapt is not None:
            adaptations.append(Adaptation(core_name, self.adapt))
        if self.skippable and not by_query:
            minimum = 0
            inside = not self.core or self.output.startswith(f"{self.core}.")
            output = self.output.removeprefix(f"{self.core}.") if inside else None
            adaptations.append(Adaptation(core_name, without_heads(output, self.weights)))
        found = group_set_of(
            model, name, layer, QUERY_HEAD if by_query else self.kind, slices, self.attributes, counts, core_name
        )
        return replace(found, minimum=minimum, adaptations=tuple(adaptations))

    def _heads(self, model: nn.Module, name: str, head_dim: int) -> tuple[int, int]:
        """The numbers of query heads and of key/value heads."""
        read = projection(model, name, self.output).in_features
        queries: float
        keys: float
        if self.fused is not None:
            rows = projection(model, name, self.fused).out_features
            queries, keys = read, (rows - read) / 2
            what = f"{self.fused} has {rows} output features and {self.output} {read} input features"
        else:
            rows, keys = (projection(model, name, p).out_features for p in (self.query, self.key))
            what = f"{self.query} has {rows} output features, {self.key} {keys} and {self.output} {read} input features"
            queries = rows // self.query_parts
        heads, kv_heads = queries // head_dim, int(keys // head_dim)
        fits = queries == heads * head_dim == read and keys == kv_heads * head_dim
        if not fits or bool(heads) != bool(kv_heads) or (kv_heads and heads % kv_heads):
            raise UnsupportedModelError(
                f"{name} ({type(model.get_submodule(name)).__name__}): with head_dim {head_dim}, {what}; expected whole"
                f" heads, a whole number of query heads for each key/value head, and as many features into {self.output}"
                " as there are query features."
            )
        return heads, kv_heads

    def _produced(
        self, model: nn.Module, name: str, heads: int, kv_heads: int, head_dim: int, share: int | None
    ) -> Iterator[Slice]:
        """The slices of the projections that give queries, keys and values; the queries' alone without a share."""
        width = head_dim if self.fused is not None else head_dim * self.query_parts
        if share is None:
            query_rows = torch.arange(heads * width).view(heads, width)
            yield from produced(model, name, self.fused or self.query, query_rows)
            return
        query_rows = torch.arange(heads * width).view(kv_heads, share * width)
        key_rows = torch.arange(kv_heads * head_dim).view(kv_heads, head_dim)
        if self.fused is None:
            yield from produced(model, name, self.query, query_rows)
            yield from produced(model, name, self.key, key_rows)
            yield from produced(model, name, self.value, key_rows)
            return
        if self.layout == STACKED:
            first_key, first_value = heads * head_dim, (heads + kv_heads) * head_dim
            rows = torch.cat([query_rows, first_key + key_rows, first_value + key_rows], dim=1)
        else:
            rows = torch.arange((heads + 2 * kv_heads) * head_dim).view(kv_heads, (share + 2) * head_dim)
        yield from produced(model, name, self.fused, rows)

    def _extra(self, model: nn.Module, name: str, counts: Mapping[str, int], groups: int) -> Iterator[Slice]:
        described = self.parameters
        if not isinstance(described, Mapping):
            described = described(model.get_submodule(name))
        for parameter, counted in described.items():
            if counted not in counts or not _has(model, f"{name}.{parameter}"):
                continue
            entries = counts[counted] * groups
            yield part_of(model, f"{name}.{parameter}", 0, torch.arange(entries).view(groups, counts[counted]))


@renamed_fields(having="requires")
@dataclass(frozen=True)
class MLP(Component):
    """Description of an MLP. One group is one channel: a row of every input projection and a column of the output
    projection.

    Args:
        path: Path of the module that holds the projections, see :class:`Component`.
        inputs: Names of the projections that produce the channels, within that module.
        output: Name of the projection that reads them.
        attributes: Attributes of the module that count ``"channels"``.
        kind: What the group table calls these groups.
        parts: How many rows of each input projection belong to one channel: 2 where gate and up projection are fused.
        layout: How the parts lie: ``"stacked"``, first all of the one and then all of the other, or ``"interleaved"``.
        routed: Whether a router sends the module some of the positions only, see :class:`~lit_prune.groups.GroupSet`.
        requires: See :class:`Component`.
        optional: See :class:`Component`.
    """

    path: str
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    attributes: Mapping[str, str] = field(default_factory=lambda: {"intermediate_size": "channels"})
    kind: str = "mlp"
    parts: int = 1
    layout: str = STACKED
    routed: bool = False
    requires: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        """Check the layout.

        Raises:
            ValueError: If it is unknown.
        """
        _check_layout(self.layout)

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """Describe the channels of the MLP ``name``.

        Raises:
            UnsupportedModelError: If a projection is missing, of an unknown type, or the widths differ.
        """
        width = projection(model, name, self.output).in_features
        for source in self.inputs:
            rows_found = projection(model, name, source).out_features
            if rows_found != width * self.parts:
                raise UnsupportedModelError(
                    f"{name}.{source} has {rows_found} output features; expected {width * self.parts}, {self.parts} for each of"
                    f" the input features of {name}.{self.output}."
                )
        rows = part_rows(width, self.parts, self.layout)
        slices = (
            *(s for source in self.inputs for s in produced(model, name, source, rows)),
            consumed(model, name, self.output, torch.arange(width).view(width, 1)),
        )
        found = group_set_of(model, name, layer, self.kind, slices, self.attributes, {"channels": 1})
        return replace(found, adaptations=tuple(reader_adaptations(model, name, self.output)), routed=self.routed)
