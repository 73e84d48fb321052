"""Which description a model has, and the search that turns description and model into group sets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lit_prune._renamed import renamed_fields
from lit_prune.architectures.arguments import POSITIONS, Positions
from lit_prune.architectures.components import Component
from lit_prune.architectures.identity import ClassRef, matching_class, namesakes, qualified_name, refers_to_any
from lit_prune.architectures.stream import Stream, no_stream, stream_set
from lit_prune.errors import UnsupportedModelError
from lit_prune.group_data import KeptGroups, dimension_lengths, kept_groups
from lit_prune.groups import BLOCK, GroupSet, Slice, check_weights, stack_of
from lit_prune.plan import get_plan
from lit_prune.transformers_internals import layers_that_count_tokens


@renamed_fields(blocks="components")
@dataclass(frozen=True)
class Architecture:
    """Description of a family of models: where its attention modules, MLPs and experts are.

    Args:
        name: Name of the family.
        models: Classes; a model belongs to the family if its class or one of its base classes is among them. Each is the class
            itself, or its dotted name (``"my_package.models.MyGPT"``, also of a module that exports it), which imports
            nothing; or its bare name (``"MyGPT"``), which means any class of that name that the description fits.
        components: The descriptions of the parts that hold groups.
        check: Raises :class:`~lit_prune.UnsupportedModelError` for a model of these classes that cannot be pruned, for
            example because of an option in its config.
        depth: The fields that depend on the number of blocks, and are updated when whole blocks are removed:
            ``config.NAME`` for a field of its config, ``NAME`` for an attribute of the module that holds the
            list of blocks; an integer, or a list with an entry for each block. Those that a model lacks are skipped.
            ``None`` if blocks cannot be removed, because they share weights or pass each other more than hidden states.
        arguments: Names of the arguments of the model's forwards that hold sequences and their masks, if they are not
            among
            :data:`~lit_prune.architectures.arguments.POSITIONS`.
        stream: What reads and writes the hidden states, so that their channels can be pruned; ``None`` if they cannot.

    Example::

        register_architecture(Architecture(
            name="my-gpt",
            models=("MyGPT",),
            components=(
                Attention(path="blocks.*.attn", query="wq", key="wk", value="wv", output="wo"),
                MLP(path="blocks.*.mlp", inputs=("up",), output="down"),
            ),
        ))
    """

    name: str
    models: tuple[ClassRef, ...]
    components: tuple[Component, ...]
    check: Callable[[nn.Module], None] | None = None
    depth: tuple[str, ...] | None = None
    arguments: tuple[Positions, ...] = ()
    stream: Stream | None = None

    def matches(self, module: nn.Module) -> bool:
        """Whether the module's class, or one of its bases, belongs to the family."""
        return refers_to_any(self.models, module)

    def fits(self, model: nn.Module, *, whole: bool = False) -> bool:
        """Whether the parts of a model are where the descriptions expect them.

        Args:
            model: The model.
            whole: Whether to describe a module of each kind, too, in place of looking only at the names.
        """
        if not all(block.optional or block.requires or block.places(model) for block in self.components):
            return False
        if whole:
            try:
                for block in self.components:
                    next(iter(block.group_sets(model, _pruned_before(model))), None)
            except (UnsupportedModelError, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
                # what a description does with a model that it is not for
                return False
        return True


_REGISTRY: list[Architecture] = []


def register_architecture(architecture: Architecture) -> Architecture:
    """Register a description, so that models of its classes can be pruned.

    A later description takes precedence over an earlier one, and replaces one with the same name and a class in common.
    If several descriptions name the same bare class name, a model gets the latest one that fits it.

    Raises:
        ValueError: If it names no class or no block.
        TypeError: If ``models`` holds something else than classes and names of classes.
    """
    if isinstance(architecture.models, str) or not all(isinstance(m, str | type) for m in architecture.models):
        raise TypeError(
            f"Architecture {architecture.name!r} has models={architecture.models!r}; expected a tuple of classes or names of"
            " classes."
        )
    if not architecture.models or not architecture.components:
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
    if kept_groups(module) is not None or _architecture_of(module, anyway=anyway) is not None:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _outermost_models(child, f"{prefix}.{name}" if prefix else name, anyway=anyway)


def has_groups(module: nn.Module) -> bool:
    """Whether groups of the module, or of something in it, are known: by a description, or found by running it before."""
    return next(_outermost_models(module), None) is not None or (
        next(_outermost_models(module, anyway=True), None) is not None
    )


def submodule(module: nn.Module, path: str | None) -> nn.Module:
    """The module at a path; the module itself if that is ``None`` or empty.

    Raises:
        UnsupportedModelError: If there is none.
    """
    try:
        return module.get_submodule(path or "")
    except AttributeError as error:
        children = [name for name, _ in module.named_children()]
        raise UnsupportedModelError(f"No module at {path!r}. The top-level modules are {children}.") from error


def find_model(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Find the one model inside a module, a LightningModule for instance, whose groups are known.

    They are known of a model of a registered architecture, however deep it is nested, and of a module that
    :func:`lit_prune.trace` or :func:`lit_prune.prune` ran to find them.

    Args:
        module: The module to search; it may be the model itself.
        path: Qualified name of the model within ``module``, for a module that holds several.

    Returns:
        The model's qualified name within ``module`` (empty if it is ``module``) and the model.

    Raises:
        UnsupportedModelError: If there is no supported model, or more than one; the message lists what was looked at.
    """
    module = submodule(module, path)
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
            f" Described are modules of, or derived from: {', '.join(supported)}. Of any other module lit_prune.prune and the"
            " callback find the groups by running it, as lit_prune.trace(model, batches, loss_fn) does; or describe it with"
            " lit_prune.register_architecture."
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


def find_group_sets(model: nn.Module, *, blocks: bool = False, hidden: bool = False) -> list[GroupSet]:
    """Find all group sets of a model. Sets that an earlier cut emptied are left out.

    Groups that were found by running the model (:func:`lit_prune.trace`) are kept beside it, and follow every cut.

    Args:
        model: A model of a registered architecture or one that was traced, or a module that holds one (see :func:`find_model`).
        blocks: Find whole blocks (decoder layers), too: group sets of the kind ``"block"`` and of one group, around the
            others.
        hidden: Find the channels of the hidden states, too: one group set of the kind ``"hidden"`` for the whole model.

    Returns:
        The group sets in the order of the layers. Names are relative to the model.

    Raises:
        UnsupportedModelError: If the model has no description, its parts are not where the description expects them,
            its weights are quantised, or ``blocks`` or ``hidden`` is set for a model whose blocks or hidden channels cannot
            be removed.
    """
    model = find_model(model)[1]
    if (kept := kept_groups(model)) is not None:
        return _kept_sets(model, kept, blocks, hidden)
    architecture = _architecture_of(model, anyway=True)
    assert architecture is not None
    if architecture.check is not None:
        architecture.check(model)
    pruned = _pruned_before(model)
    group_sets: list[GroupSet] = []
    for block in architecture.components:
        found = list(block.group_sets(model, pruned))
        if not found and not block.optional and block.requires is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} is described by the architecture {architecture.name!r}, but no module is at"
                f" {block.path!r}. Its modules are {[name for name, _ in model.named_modules() if name.count('.') < 3][1:20]}."
            )
        group_sets.extend(found)
    _check_alternatives(model, architecture, group_sets)
    described = group_sets
    group_sets = [s for s in group_sets if s.size]
    if hidden:
        if architecture.stream is None:
            raise no_stream(model, f"its description is that of the architecture {architecture.name!r}")
        channels = stream_set(model, architecture.stream, architecture.components, described)
        # its ties are its own affair: embedding and head lose the same channels
        check_weights(model, [channels], ties=False)
    if blocks:
        group_sets.extend(_whole_blocks(model, architecture))
    group_sets.sort(key=lambda s: (s.layer, s.name))
    check_weights(model, group_sets, ties=not all(block.follows_ties for block in architecture.components))
    return [channels, *group_sets] if hidden else group_sets


def _kept_sets(model: nn.Module, kept: KeptGroups, blocks: bool, hidden: bool) -> list[GroupSet]:
    if hidden:
        raise no_stream(model, "its groups were found by running it")
    if blocks:
        raise UnsupportedModelError(
            f"Whole blocks cannot leave {type(model).__name__}: its groups were found by running it, which tells nothing of"
            " blocks. Prune other kinds, or describe the model with lit_prune.register_architecture."
        )
    now = dimension_lengths(model, kept.group_sets)
    for (name, dim), length in kept.lengths.items():
        if now[name, dim] != length:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not as it was when its groups were found: {name!r} had {length} positions along"
                f" dimension {dim}, and has {now[name, dim] or 'none'} now. If modules were replaced, find the groups anew with"
                " lit_prune.trace(model, batches, loss_fn); if it carries adapters, merge them first."
            )
    check_weights(model, kept.group_sets, ties=False)
    return list(kept.group_sets)


def _pruned_before(model: nn.Module) -> Collection[tuple[str, str]]:
    """Keys of the group sets that lost something in earlier cuts."""
    plan = get_plan(model)
    return set() if plan is None else plan.entries_after().keys()


def depth_of(model: nn.Module) -> tuple[str, ...] | None:
    """Where the model says how many blocks it has, see :class:`Architecture`."""
    architecture = _architecture_of(model)
    return None if architecture is None else architecture.depth


def stream_of(model: nn.Module) -> Stream | None:
    """What reads and writes the model's hidden states, see :class:`Architecture`."""
    architecture = _architecture_of(model)
    return None if architecture is None else architecture.stream


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
            f"Whole blocks cannot be removed from {type(model).__name__}: its description (architecture {architecture.name!r})"
            " names no depth. Prune other kinds."
        )
    stacks = dict.fromkeys(
        stack_of(b)[0] for part in architecture.components for _, _, b in part.places(model) if b[-1:].isdigit()
    )
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    counting = layers_that_count_tokens(getattr(model, "config", None))
    for stack in stacks:
        blocks = model.get_submodule(stack)
        config = getattr(model.get_submodule(stack.rpartition(".")[0]), "config", None)
        if config is not None and type(config) is not type(model.config):
            raise UnsupportedModelError(
                f"Whole blocks cannot be removed from {stack!r}: it has a config of its own, a {type(config).__name__}, inside"
                f" the {type(model.config).__name__} of {type(model).__name__}. Give the model that is inside, or"
                " prune other kinds."
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
                    f"Whole blocks cannot be removed from {type(model).__name__}: {unfit[0]!r} is shared with another part of the"
                    " model (or is a single number). Prune other kinds."
                )
            own = {id(p): (n, p) for n, p in parameters.items()}
            slices = tuple(Slice(n, 0, torch.arange(len(p)).view(1, -1)) for n, p in own.values())
            cost = sum(p.numel() for _, p in own.values())
            counts = len(counting) == len(blocks) and counting[index]
            yield GroupSet(name, index, BLOCK, 1, cost, slices, block=name, counts_tokens=counts)


def _check_alternatives(model: nn.Module, architecture: Architecture, group_sets: list[GroupSet]) -> None:
    """Refuse a module at a path that only descriptions with conditions have, if none of those applies to it."""
    described = {s.name for s in group_sets}
    conditions: dict[str, list[str]] = {}
    for block in architecture.components:
        if block.requires is not None and not block.optional:
            conditions.setdefault(block.path, []).append(block.requires)
    for path, names in conditions.items():
        block = next(b for b in architecture.components if b.path == path)
        for name, _, _ in block.places(model):
            if name not in described:
                module = model.get_submodule(name)
                raise UnsupportedModelError(
                    f"{name} ({type(module).__name__}) was expected to have one of {names}; it has"
                    f" {[child for child, _ in module.named_children()]}."
                )
