"""The residual stream of a model as one group set: a group is one channel, in every layer at once.

Whatever reads or writes hidden states has one position for each channel: embeddings, norms, the projections that a
description names, heads. A channel leaves from all of them together, and the model is a narrower one of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune.architectures.components import MLP, Attention, Component
from lit_prune.architectures.features import output_dim
from lit_prune.architectures.plain_modules import CONVOLUTIONS
from lit_prune.architectures.slices import _has, consumed, part_of, produced
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import HIDDEN, GroupSet, Slice, group_cost


@dataclass(frozen=True)
class Stream:
    """Description of what reads and writes the hidden states, beside the projections that the components name.

    Attention and MLPs are known: the projections that make queries, keys, values and channels read the stream, their output
    projections write it. All other places are named here, as paths that match at the end of a name, ``*`` standing for an
    index. A model need not have all of them, so that one description serves several families and task heads.

    Args:
        embeddings: Modules whose outputs are hidden states: ``nn.Embedding``, or the convolution of patches. The first one
            that a model has names the group set.
        norms: Norms over the channels.
        readers: Linear layers that read hidden states: heads.
        writers: Linear layers whose outputs have the stream's channels (a transform before a tied head reads and writes).
        parameters: Parameters that are hidden states themselves, each with the dimension of its channels, such as the token
            of a class.
        fields: Fields of the config that hold the number of channels.
    """

    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    fields: tuple[str, ...] = ("hidden_size",)


def stream_set(
    model: nn.Module, stream: Stream, components: Sequence[Component], group_sets: Sequence[GroupSet]
) -> GroupSet:
    """Return the group set of a model's hidden channels.

    Args:
        model: The model.
        stream: The description of its stream.
        components: The descriptions of its attention modules and MLPs.
        group_sets: The group sets that these gave.

    Raises:
        UnsupportedModelError: If a part is not as wide as the stream, or a parameter of that width is in no description.
    """
    named = _matches(model, stream.embeddings)
    if not named:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module at {list(stream.embeddings)}, where its embeddings were expected; the hidden"
            " size cannot be pruned without them. Prune other kinds."
        )
    name = named[0]
    weight = model.get_submodule(name).weight
    width = int(weight.shape[1 if isinstance(model.get_submodule(name), nn.Embedding) else 0])  # type: ignore[index]
    found = _distinct(model, _slices(model, stream, components, width))
    _check_covered(model, found, group_sets, width)
    cost, step = group_cost(model, found), _required_multiple(model, stream, width)
    return GroupSet(name, 0, HIDDEN, width, cost, tuple(found), minimum=1, multiple_of=step)


def _required_multiple(model: nn.Module, stream: Stream, width: int) -> int:
    """The number that the model's config wants the hidden size to be a multiple of: some check it against the heads."""
    config: Any = getattr(model, "config", None)
    if not hasattr(type(config), "from_dict"):
        return 1
    whole = {n: v for n, v in config.to_dict().items() if n not in _OF_PRUNED_MODELS}
    # also those of the dense model, beside which a folder says the hidden size
    dense = (getattr(config, "pruning", None) or {}).get("dense", {})
    heads = [
        h for h in (fields.get("num_attention_heads") for fields in (whole, dense)) if isinstance(h, int) and h > 1
    ]
    heads = [h for h in heads if width % h == 0]
    narrower = {getattr(config, "attribute_map", {}).get(name, name): width - 1 for name in stream.fields}
    base = getattr(config, "base_model_type", None)
    try:
        (type(config) if base is None else CONFIG_MAPPING[base]).from_dict({**whole, **narrower})
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError):
        return lcm(*heads)
    return 1


# what a pruned model's config has beside the dense one's
_OF_PRUNED_MODELS = ("pruning", "per_layer_config", "model_type", "base_model_type", "auto_map")


def no_stream(model: nn.Module, why: str) -> UnsupportedModelError:
    """Return the error for a model of which no description says what reads and writes hidden states."""
    return UnsupportedModelError(
        f"The hidden size of {type(model).__name__} cannot be pruned: {why}, and nothing says what reads and writes hidden"
        f" states. Leave kind {HIDDEN!r} out, or give its Architecture a Stream."
    )


def norms_over_channels(model: nn.Module, stream: Stream | None) -> list[str]:
    """Names of the norms over hidden channels, in the order of the description; none without one."""
    return [] if stream is None else _matches(model, stream.norms)


def _matches(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Names of the modules at some paths, by path and in the order of the modules."""
    found: dict[str, None] = {}
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for path in paths:
        pattern = re.compile(r"(?:.*\.)?" + re.escape(path).replace(r"\*", r"\d+"))
        found.update(dict.fromkeys(name for name in names if pattern.fullmatch(name)))
    return list(found)


def _leaves(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Names of the modules at some paths that have no parts: a head of one layer in one class has several in another."""
    return [name for name in _matches(model, paths) if not list(model.get_submodule(name).children())]


def _slices(model: nn.Module, stream: Stream, components: Sequence[Component], width: int) -> Iterator[Slice]:
    channels = torch.arange(width).view(width, 1)
    for name in _matches(model, stream.embeddings):
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            yield part_of(model, f"{name}.weight", 1, channels)
        elif isinstance(module, CONVOLUTIONS):
            yield part_of(model, f"{name}.weight", output_dim(module), channels, 1)
            if module.bias is not None:
                yield part_of(model, f"{name}.bias", 0, channels)
        else:
            yield from _written(model, name, channels)
    for path, dim in stream.parameters:
        owner, _, last = path.rpartition(".")
        for holder in _matches(model, (owner,)):
            if _has(model, f"{holder}.{last}"):
                yield part_of(model, f"{holder}.{last}", dim, channels)
    for name in _matches(model, stream.norms):
        for parameter, _ in model.get_submodule(name).named_parameters(recurse=False):
            yield part_of(model, f"{name}.{parameter}", 0, channels)
    reading, writing = _projections(model, components)
    for name in (*reading, *_leaves(model, stream.readers)):
        yield _read(model, name, channels)
    for name in (*writing, *_leaves(model, stream.writers)):
        yield from _written(model, name, channels)


def _projections(model: nn.Module, components: Sequence[Component]) -> tuple[list[str], list[str]]:
    """Names of the projections that read the stream, and of those that write it, as the components say.

    Raises:
        UnsupportedModelError: For a component of another kind, of which it is not known.
    """
    reading: list[str] = []
    writing: list[str] = []
    for component in components:
        places = [
            name
            for name, _, _ in component.places(model)
            if component.requires is None or _has(model, f"{name}.{component.requires}")
        ]
        if not places:
            continue
        inputs: tuple[str, ...]
        if isinstance(component, Attention):
            inputs = (component.fused,) if component.fused else (component.query, component.key, component.value)
        elif isinstance(component, MLP) and not component.routed:
            inputs = component.inputs
        else:
            raise UnsupportedModelError(
                f"{places[0]!r} is described by a {type(component).__name__}, of which it is not known what reads and writes"
                " hidden states; the hidden size can be pruned where attention and MLPs are plain. Prune other kinds."
            )
        for name in places:
            reading += [f"{name}.{part}" for part in inputs]
            writing.append(f"{name}.{component.output}")
    return reading, writing


def _read(model: nn.Module, name: str, channels: torch.Tensor) -> Slice:
    owner, _, last = name.rpartition(".")
    return _as_wide(model, consumed(model, owner, last, channels), channels)


def _written(model: nn.Module, name: str, channels: torch.Tensor) -> Iterator[Slice]:
    owner, _, last = name.rpartition(".")
    for part in produced(model, owner, last, channels):
        yield _as_wide(model, part, channels)


def _as_wide(model: nn.Module, part: Slice, channels: torch.Tensor) -> Slice:
    """The slice, checked to lie along as many positions as there are channels."""
    return part_of(model, part.parameter, part.dim, channels, part.input_dim)


def _distinct(model: nn.Module, slices: Iterator[Slice]) -> list[Slice]:
    """The slices, each parameter's dimension once: a tied head is the embedding, and is cut with it.

    Raises:
        UnsupportedModelError: If a parameter is tied in a way that has its channels along two dimensions.
    """
    found: dict[tuple[int, int], Slice] = {}
    names: dict[int, str] = {}
    tied: dict[int, list[Slice]] = {}
    for part in slices:
        parameter = model.get_parameter(part.parameter)
        first = names.setdefault(id(parameter), part.parameter)
        if first == part.parameter:
            found.setdefault((id(parameter), part.dim), part)
        elif (id(parameter), part.dim) not in found:
            tied.setdefault(id(parameter), []).append(part)
    for key, parts in tied.items():
        if any((key, part.dim) not in found for part in parts):
            raise UnsupportedModelError(
                f"{parts[0].parameter!r} is the same parameter as {names[key]!r}, and has hidden channels along another"
                " dimension of it. Untie them first."
            )
    return list(found.values())


def _check_covered(model: nn.Module, found: Sequence[Slice], group_sets: Sequence[GroupSet], width: int) -> None:
    """Refuse a model that has a parameter as wide as the stream in no description, which may read or write hidden states.

    Raises:
        UnsupportedModelError: Naming it.
    """
    known = {id(model.get_parameter(part.parameter)) for part in found}
    known |= {id(model.get_parameter(part.parameter)) for s in group_sets for part in s.slices}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known and width in parameter.shape:
            raise UnsupportedModelError(
                f"{name!r} of {type(model).__name__} has shape {tuple(parameter.shape)}, and the hidden size is {width}: whether"
                " it reads or writes hidden states is in no description, so the hidden size cannot be pruned. Prune other"
                " kinds, or name it in the Stream of the model's Architecture."
            )
    for name, module in model.named_modules():
        over = getattr(module, "normalized_shape", None)
        if isinstance(over, tuple) and over == (width,) and not list(module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{name!r} ({type(module).__name__}) is a norm of {width} channels without weights, which a cut does not reach;"
                " the hidden size of such a model cannot be pruned. Prune other kinds."
            )
