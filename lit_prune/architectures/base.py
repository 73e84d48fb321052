"""Descriptions of architectures as data, and the search that turns a description and a model into group sets."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.adapt import without_continuous_batching, without_heads, without_inputs
from lit_prune.architectures.arguments import POSITIONS, Positions
from lit_prune.architectures.identity import ClassRef, matching_class, namesakes, qualified_name, refers_to_any
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import BLOCK, Adaptation, Attribute, GroupSet, Slice, check_weights, group_cost, stack_of
from lit_prune.module_checks import check_plain
from lit_prune.plan import get_plan

STACKED = "stacked"
INTERLEAVED = "interleaved"
QUERY_HEAD = "query_head"

_HEAD_COUNTS = {
    "num_heads": "query_heads",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "key_value_heads",
    "num_key_value_groups": "queries_per_key_value",
}


class Block(ABC):
    """What every description of a part of a model has: where the part is, and a way to describe its groups.

    Subclasses are frozen dataclasses with at least the fields ``path``, ``having`` and ``optional``.

    Args:
        path: Qualified name of the module within the model, ``*`` standing for an index; the first one is the layer's. It
            matches at the end of a name, so that the same description serves every task head.
        having: Describe only those modules at ``path`` that have a part of this name, and pass over the others.
        optional: Whether a model may have no such module at all.
    """

    path: str
    having: str | None
    optional: bool

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
            if self.having is None or _has(model, f"{name}.{self.having}"):
                yield replace(self.group_set(model, name, layer, pruned), block=block)


def _has(model: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), last, None) is not None
    except AttributeError:
        return False


@dataclass(frozen=True)
class Attention(Block):
    """Where attention sits in a model and how its projections are laid out.

    One group is a key/value head with the query heads that share it. Where all query heads share one key/value head
    (multi-query attention), that one stays, and the groups are the query heads. Head counts are read from the
    projections' shapes, so a model that was pruned before is described by the same data.

    Args:
        path: Path of the attention module, see :class:`Block`.
        query: Name of the query projection within the attention module.
        key: Name of the key projection.
        value: Name of the value projection.
        output: Name of the output projection, which reads the heads.
        head_dim: Attribute of the core that holds the features of one head, or a function of the core that gives them.
        attributes: Attributes of the core that count heads or features, each mapped to what it counts:
            ``"query_heads"``, ``"key_value_heads"``, ``"query_features"``, ``"key_value_features"`` or
            ``"queries_per_key_value"``. Those that a module lacks are passed over. ``config.NAME`` stands for a field read
            from the module's config in forward.
        kind: What the group table calls these groups.
        fused: Name of the one projection that gives queries, keys and values, in place of three.
        layout: How the rows of ``fused`` lie: ``"stacked"``, all queries, all keys, all values; or ``"interleaved"``,
            for every key/value head its queries, its key and its value.
        query_parts: How often the features of a head the query projection gives, head by head: 2 where a gate lies behind
            each head's query. With ``fused`` it has no meaning.
        parameters: Further parameters of the attention module with an entry for each head or feature, such as attention
            sinks or norms over all heads; each mapped to what its entries are, as in ``attributes``. Those that a module
            lacks are passed over.
        core: Path, within the attention module, of the module that computes the heads, if that is another one.
        skippable: Whether the core returns ``(states, weights)``, its states the output projection's if that is a part of
            it and the heads' if not; then a layer may lose all its groups, and the core is skipped.
        adapt: Called with the core and the indices of the kept groups at every cut, for cores that need more than
            smaller projections and attributes; see :class:`~lit_prune.groups.Adaptation`.
        having: See :class:`Block`.
        optional: See :class:`Block`.
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
    parameters: Mapping[str, str] = field(default_factory=dict)
    core: str = ""
    skippable: bool = False
    adapt: Callable[[nn.Module, Tensor], Callable[[], None]] | None = None
    having: str | None = None
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
            adaptations.append(Adaptation(core_name, without_heads(output)))
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
        for parameter, counted in self.parameters.items():
            if counted not in counts or not _has(model, f"{name}.{parameter}"):
                continue
            entries = counts[counted] * groups
            yield part_of(model, f"{name}.{parameter}", 0, torch.arange(entries).view(groups, counts[counted]))


@dataclass(frozen=True)
class MLP(Block):
    """Where an MLP sits in a model. One group is one channel: a row of every input projection, a column of the output.

    Args:
        path: Path of the module that holds the projections, see :class:`Block`.
        inputs: Names of the projections that produce the channels, within that module.
        output: Name of the projection that reads them.
        attributes: Attributes of the module that count ``"channels"``.
        kind: What the group table calls these groups.
        parts: How many rows of each input projection belong to one channel: 2 where gate and up projection are fused.
        layout: How the parts lie: ``"stacked"``, first all of the one and then all of the other, or ``"interleaved"``.
        having: See :class:`Block`.
        optional: See :class:`Block`.
    """

    path: str
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    attributes: Mapping[str, str] = field(default_factory=lambda: {"intermediate_size": "channels"})
    kind: str = "mlp"
    parts: int = 1
    layout: str = STACKED
    having: str | None = None
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
        return replace(found, adaptations=tuple(reader_adaptations(model, name, self.output)))


def part_rows(width: int, parts: int, layout: str) -> Tensor:
    """The rows of each channel where ``parts`` rows belong to one, shape ``(width, parts)``."""
    rows = torch.arange(width * parts)
    return rows.view(parts, width).T.contiguous() if layout == STACKED else rows.view(width, parts)


def _check_layout(layout: str) -> None:
    if layout not in (STACKED, INTERLEAVED):
        raise ValueError(f"Unknown layout {layout!r}; expected {STACKED!r} or {INTERLEAVED!r}.")


@dataclass(frozen=True)
class Architecture:
    """A family of models whose groups one description finds.

    Args:
        name: Name of the family.
        models: Classes; a model belongs to the family if its class or one of its base classes is among them. Each is the class
            itself, or its dotted name (``"my_package.models.MyGPT"``, also of a module that exports it), which imports
            nothing; or its bare name (``"MyGPT"``), which means any class of that name that the description fits.
        blocks: The descriptions of the parts that hold groups.
        check: Raises :class:`~lit_prune.UnsupportedModelError` for a model of these classes that the descriptions do not
            fit all the same, because of an option in its config for instance.
        depth: Where a model says how many blocks it has, and anything for each of them, so that it can follow when whole
            blocks leave: ``config.NAME`` for a field of its config, ``NAME`` for an attribute of the module that holds the
            list of blocks; an integer, or a list with an entry for each block. Those that a model lacks are passed over.
            ``None`` if no block may leave: if blocks share weights, or take from each other more than hidden states.
        arguments: Names that the forwards in such a model give sequences and their masks, where they are none of
            :data:`~lit_prune.architectures.arguments.POSITIONS`.

    Example::

        register_architecture(Architecture(
            name="my-gpt",
            models=("MyGPT",),
            blocks=(
                Attention(path="blocks.*.attn", query="wq", key="wk", value="wv", output="wo"),
                MLP(path="blocks.*.mlp", inputs=("up",), output="down"),
            ),
        ))
    """

    name: str
    models: tuple[ClassRef, ...]
    blocks: tuple[Block, ...]
    check: Callable[[nn.Module], None] | None = None
    depth: tuple[str, ...] | None = None
    arguments: tuple[Positions, ...] = ()

    def matches(self, module: nn.Module) -> bool:
        """Whether the module's class, or one of its bases, belongs to the family."""
        return refers_to_any(self.models, module)

    def fits(self, model: nn.Module, *, whole: bool = False) -> bool:
        """Whether the parts of a model are where the descriptions expect them.

        Args:
            model: The model.
            whole: Whether to describe a module of each kind, too, in place of looking only at the names.
        """
        if not all(block.optional or block.having or block.places(model) for block in self.blocks):
            return False
        if whole:
            try:
                for block in self.blocks:
                    next(iter(block.group_sets(model, _pruned_before(model))), None)
            except (UnsupportedModelError, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
                # what a description does with a model that it is not for
                return False
        return True


_REGISTRY: list[Architecture] = []


def register_architecture(architecture: Architecture) -> Architecture:
    """Make a description known, so that models of its classes can be pruned.

    A later one wins over an earlier one, and takes the place of one with the same name and a class in common. Where classes
    of one bare name are described several times, each model gets the latest description that fits it.

    Raises:
        ValueError: If it names no class or no block.
        TypeError: If ``models`` holds something else than classes and names of classes.
    """
    if isinstance(architecture.models, str) or not all(isinstance(m, str | type) for m in architecture.models):
        raise TypeError(
            f"Architecture {architecture.name!r} has models={architecture.models!r}; expected a tuple of classes or names of"
            " classes."
        )
    if not architecture.models or not architecture.blocks:
        raise ValueError(f"Architecture {architecture.name!r} needs at least one class and one block description.")
    classes = {qualified_name(m) for m in architecture.models}
    _REGISTRY[:] = [
        a for a in _REGISTRY if a.name != architecture.name or classes.isdisjoint(map(qualified_name, a.models))
    ]
    _REGISTRY.append(architecture)
    return architecture


def architectures() -> tuple[Architecture, ...]:
    """The registered descriptions, the latest last."""
    return tuple(_REGISTRY)


def _architecture_of(module: nn.Module, *, anyway: bool = False) -> Architecture | None:
    """The description of a module; one by a bare name counts only if it fits, or ``anyway`` if there is no other."""
    candidates = [a for a in reversed(_REGISTRY) if a.matches(module)]
    meant = [matching_class(a.models, module) for a in candidates]
    for architecture, cls in zip(candidates, meant, strict=True):
        by_class = refers_to_any(architecture.models, module, bare=False)
        # where others describe a class of this name, too, the place of its parts may not be enough to tell
        if by_class or architecture.fits(module, whole=meant.count(cls) > 1):
            return architecture
    return candidates[0] if candidates and anyway else None


def _outermost_models(module: nn.Module, prefix: str = "", *, anyway: bool = False) -> Iterator[tuple[str, nn.Module]]:
    if _architecture_of(module, anyway=anyway) is not None:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _outermost_models(child, f"{prefix}.{name}" if prefix else name, anyway=anyway)


def find_model(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Find the one supported model inside a module, a LightningModule for instance, however deep it is nested.

    Args:
        module: The module to search; it may be the model itself.
        path: Qualified name of the model within ``module``, for a module that holds several.

    Returns:
        The model's qualified name within ``module`` (empty if it is ``module``) and the model.

    Raises:
        UnsupportedModelError: If there is no supported model, or more than one; the message lists what was looked at.
    """
    if path is not None:
        try:
            module = module.get_submodule(path)
        except AttributeError as error:
            children = [name for name, _ in module.named_children()]
            raise UnsupportedModelError(f"No module at {path!r}. The top-level modules are {children}.") from error
    # last, one that has the name of a class but not its parts, for an error that names the part
    found = list(_outermost_models(module)) or list(_outermost_models(module, anyway=True))
    if len(found) == 1:
        name, model = found[0]
        return ".".join(part for part in (path, name) if part), model
    if not found:
        looked_at = [
            f"{name or '(root)'}: {type(m).__name__}" for name, m in module.named_modules() if name.count(".") < 2
        ]
        supported = sorted(qualified_name(c) for a in _REGISTRY for c in a.models)
        raise UnsupportedModelError(
            f"No supported model found in {type(module).__name__}. Looked at {', '.join(looked_at[:20])}"
            f"{', ...' if len(looked_at) > 20 else ''}.{_layers_hint(module)}{_namesake_hint(module)}"
            f" Supported are modules of, or derived from: {', '.join(supported)}. Describe"
            " your own with lit_prune.register_architecture."
        )
    listed = ", ".join(f"{name!r} ({type(m).__name__})" for name, m in found)
    raise UnsupportedModelError(
        f"{len(found)} supported models found in {type(module).__name__}: {listed}. Say which one to prune by its path."
    )


def _namesake_hint(module: nn.Module) -> str:
    """Which module has the name, but is not the class, that a description is for."""
    for name, m in module.named_modules():
        for architecture in _REGISTRY:
            if found := namesakes(architecture.models, m):
                return (
                    f" {name or '(root)'} has the name of {found[0]}, but is {qualified_name(type(m))}: if its parts are laid"
                    " out alike, describe it with models=(that class,)."
                )
    return ""


def _layers_hint(module: nn.Module) -> str:
    """Where the layers of an unknown model seem to be, and what they consist of."""
    lists = [
        (name, m) for name, m in module.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1
    ]
    same = [(name, m) for name, m in lists if len({type(child) for child in m}) == 1]
    if not same:
        return ""
    name, layers = max(same, key=lambda item: len(item[1]))
    children = ", ".join(f"{n}: {type(m).__name__}" for n, m in layers[0].named_children())
    return (
        f" Detection stopped at {name + '.0' if name else '0'!r} ({type(layers[0]).__name__}, one of {len(layers)}), which no"
        f" description covers; it has {{{children}}}."
    )


def find_group_sets(model: nn.Module, *, blocks: bool = False) -> list[GroupSet]:
    """Find everything in the model that can be pruned. What an earlier cut emptied is left out.

    Args:
        model: A model of a registered architecture, or a module that holds one (see :func:`find_model`).
        blocks: Find whole blocks (decoder layers), too: group sets of the kind ``"block"`` and of one group, around the
            others.

    Returns:
        The group sets in the order of the layers. Names are relative to the model.

    Raises:
        UnsupportedModelError: If the model has no description, its parts are not where the description expects them,
            its weights are quantised, or ``blocks`` are asked of a model that none may leave from.
    """
    model = find_model(model)[1]
    architecture = _architecture_of(model, anyway=True)
    assert architecture is not None
    if architecture.check is not None:
        architecture.check(model)
    pruned = _pruned_before(model)
    group_sets: list[GroupSet] = []
    for block in architecture.blocks:
        found = list(block.group_sets(model, pruned))
        if not found and not block.optional and block.having is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} is described by the architecture {architecture.name!r}, but no module is at"
                f" {block.path!r}. Its modules are {[name for name, _ in model.named_modules() if name.count('.') < 3][1:20]}."
            )
        group_sets.extend(found)
    _check_alternatives(model, architecture, group_sets)
    group_sets = [s for s in group_sets if s.size]
    if blocks:
        group_sets.extend(_whole_blocks(model, architecture))
    group_sets.sort(key=lambda s: (s.layer, s.name))
    check_weights(model, group_sets)
    return group_sets


def _pruned_before(model: nn.Module) -> Collection[tuple[str, str]]:
    """Keys of the group sets that lost something in earlier cuts."""
    plan = get_plan(model)
    return set() if plan is None else plan.afterwards().keys()


def depth_of(model: nn.Module) -> tuple[str, ...] | None:
    """Where the model says how many blocks it has, see :class:`Architecture`."""
    architecture = _architecture_of(model)
    return None if architecture is None else architecture.depth


def arguments_of(model: nn.Module) -> tuple[Positions, ...]:
    """The names that forwards in the model may give sequences and their masks, those of its description first."""
    architecture = _architecture_of(model)
    return POSITIONS if architecture is None else (*architecture.arguments, *POSITIONS)


def _whole_blocks(model: nn.Module, architecture: Architecture) -> Iterator[GroupSet]:
    """A group set for every block of every list of blocks.

    Raises:
        UnsupportedModelError: If no block may leave, or a block shares weights with another part of the model.
    """
    if architecture.depth is None:
        raise UnsupportedModelError(
            f"Whole blocks cannot leave {type(model).__name__}: its description (architecture {architecture.name!r}) names no"
            " depth. Prune other kinds."
        )
    stacks = dict.fromkeys(
        stack_of(b)[0] for part in architecture.blocks for _, _, b in part.places(model) if b[-1:].isdigit()
    )
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    for stack in stacks:
        blocks = model.get_submodule(stack)
        config = getattr(model.get_submodule(stack.rpartition(".")[0]), "config", None)
        if config is not None and type(config) is not type(model.config):
            raise UnsupportedModelError(
                f"Whole blocks cannot leave {stack!r}: it has a config of its own, a {type(config).__name__}, inside the"
                f" {type(model.config).__name__} of {type(model).__name__}. Give the model that is inside, or prune other kinds."
            )
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModelError(
                f"{stack} is a {type(blocks).__name__}; expected the blocks in an nn.ModuleList."
            )
        for index in range(len(blocks)):
            name = f"{stack}.{index}"
            parameters = {f"{name}.{n}": p for n, p in blocks[index].named_parameters(remove_duplicate=False)}
            unfit = [n for n, p in parameters.items() if p.dim() == 0 or not places[id(p)] <= parameters.keys()]
            if unfit:
                raise UnsupportedModelError(
                    f"Whole blocks cannot leave {type(model).__name__}: {unfit[0]!r} is shared with another part of the model"
                    " (or is a single number). Prune other kinds."
                )
            own = {id(p): (n, p) for n, p in parameters.items()}
            slices = tuple(Slice(n, 0, torch.arange(len(p)).view(1, -1)) for n, p in own.values())
            yield GroupSet(name, index, BLOCK, 1, sum(p.numel() for _, p in own.values()), slices, block=name)


def _check_alternatives(model: nn.Module, architecture: Architecture, group_sets: list[GroupSet]) -> None:
    """Refuse a module at a path that only descriptions with conditions have, if none of those applies to it."""
    described = {s.name for s in group_sets}
    conditions: dict[str, list[str]] = {}
    for block in architecture.blocks:
        if block.having is not None and not block.optional:
            conditions.setdefault(block.path, []).append(block.having)
    for path, names in conditions.items():
        block = next(b for b in architecture.blocks if b.path == path)
        for name, _, _ in block.places(model):
            if name not in described:
                module = model.get_submodule(name)
                raise UnsupportedModelError(
                    f"{name} ({type(module).__name__}) was expected to have one of {names}; it has"
                    f" {[child for child, _ in module.named_children()]}."
                )


@dataclass(frozen=True)
class Projection:
    """The shape of a linear projection, whichever way round its weight is stored."""

    in_features: int
    out_features: int
    input_dim: int
    has_bias: bool


def projection(model: nn.Module, owner: str, name: str) -> Projection:
    """The shape of the projection ``name`` within the module ``owner``.

    Raises:
        UnsupportedModelError: If it is missing, carries an adapter, or is not a linear projection.
    """
    path = f"{owner}.{name}"
    try:
        module = model.get_submodule(path)
    except AttributeError:
        parent = model.get_submodule(owner)
        children = [child for child, _ in parent.named_children()]
        raise UnsupportedModelError(
            f"{owner} ({type(parent).__name__}) was expected to have a projection {name!r}; it has {children}."
        ) from None
    if any("lora" in child for child, _ in module.named_children()):
        raise UnsupportedModelError(
            f"{path} ({type(module).__name__}) carries a LoRA adapter. Merge it first (model.merge_and_unload()), prune,"
            " and add a new adapter to the pruned model."
        )
    check_plain(module, path)
    weight = getattr(module, "weight", None)
    # transformers' Conv1D stores (in, out); nn.Linear stores (out, in)
    transposed = isinstance(module, Conv1D)
    if (not isinstance(module, nn.Linear) and not transposed) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{path} is a {type(module).__name__}; expected nn.Linear or transformers' Conv1D. Quantised and wrapped"
            " projections cannot be pruned: load the model in float32, bfloat16 or float16 and without adapters."
        )
    if not isinstance(weight, nn.Parameter):
        raise UnsupportedModelError(
            f"{path}.weight ({type(module).__name__}) is no nn.Parameter but computed from others; expected a parameter. Put a"
            " plain nn.Linear with the computed weight in its place before pruning."
        )
    if weight.dim() != 2:
        raise UnsupportedModelError(
            f"{path}.weight has shape {tuple(weight.shape)} and type {weight.dtype}; expected a matrix. Packed quantised"
            " weights cannot be pruned: load the model without a quantization_config."
        )
    rows, columns = weight.shape
    has_bias = getattr(module, "bias", None) is not None
    return Projection(rows, columns, 0, has_bias) if transposed else Projection(columns, rows, 1, has_bias)


def produced(model: nn.Module, owner: str, name: str, rows: Tensor) -> Iterator[Slice]:
    """The slices of a projection whose outputs belong to the groups: weight rows and biases."""
    found = projection(model, owner, name)
    yield Slice(f"{owner}.{name}.weight", 1 - found.input_dim, rows, found.input_dim)
    if found.has_bias:
        yield Slice(f"{owner}.{name}.bias", 0, rows)


def consumed(model: nn.Module, owner: str, name: str, columns: Tensor) -> Slice:
    """The slice of a projection whose inputs belong to the groups. Its bias belongs to none of them."""
    found = projection(model, owner, name)
    return Slice(f"{owner}.{name}.weight", found.input_dim, columns, found.input_dim)


def reader_adaptations(model: nn.Module, owner: str, name: str) -> Iterator[Adaptation]:
    """What the projection that reads the groups needs once there are none."""
    if projection(model, owner, name).input_dim == 0:
        yield Adaptation(f"{owner}.{name}", without_inputs)


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name.

    Raises:
        UnsupportedModelError: If there is none; the message names the module that should have it.
    """
    owner, _, last = name.rpartition(".")
    while True:
        try:
            module = model.get_submodule(owner)
            break
        except AttributeError:
            owner = owner.rpartition(".")[0]
    check_plain(module, owner)
    parameter = getattr(module, last, None) if name == f"{owner}.{last}" else None
    if not isinstance(parameter, nn.Parameter):
        parts = [n for n, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        raise UnsupportedModelError(
            f"{owner} ({type(module).__name__}) was expected to hold the parameter {name.removeprefix(owner + '.')!r}; it has"
            f" {parts}."
        )
    return parameter


def part_of(
    model: nn.Module, name: str, dim: int, index: Tensor, input_dim: int | None = None, opaque: bool = False
) -> Slice:
    """A slice of a parameter, checked against the parameter's shape.

    Raises:
        UnsupportedModelError: If there is no such parameter, or its dimension is not what the index covers.
    """
    parameter = parameter_of(model, name)
    if parameter.dim() <= dim or parameter.shape[dim] != index.numel():
        raise UnsupportedModelError(
            f"{name!r} has shape {tuple(parameter.shape)}; expected {index.numel()} entries along dimension {dim}."
        )
    return Slice(name, dim, index, input_dim, opaque)


def group_set_of(
    model: nn.Module,
    name: str,
    layer: int,
    kind: str,
    slices: tuple[Slice, ...],
    attributes: Mapping[str, str],
    counts: Mapping[str, int],
    owner: str | None = None,
) -> GroupSet:
    """A group set with its cost, and those of the attributes that are there and counted; they are the module ``owner``'s."""
    owner = name if owner is None else owner
    present = []
    for attribute, counted in attributes.items():
        path, _, last = attribute.rpartition(".") if not attribute.startswith("config.") else ("", "", attribute)
        module_name = f"{owner}.{path}" if path else owner
        there = last.startswith("config.") or hasattr(model.get_submodule(module_name), last)
        if there and counted in counts:
            present.append(Attribute(module_name, last, counts[counted]))
    size = len(slices[0].index)
    return GroupSet(name, layer, kind, size, group_cost(model, slices) if size else 0, slices, tuple(present))
