"""Descriptions of architectures as data, and the search that turns a description and a model into group sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Attribute, GroupSet, Slice, check_weights, group_cost


@dataclass(frozen=True)
class Attention:
    """Where attention sits in a model and how its projections are laid out.

    One group is a key/value head with the query heads that share it. Head counts are read from the projections'
    shapes, so a model that was pruned before is described by the same data.

    Args:
        path: Path of the attention module within the model, ``*`` standing for the layer's index. It matches at the
            end of a qualified name, so that the same description serves every task head.
        query: Name of the query projection within the attention module.
        key: Name of the key projection.
        value: Name of the value projection.
        output: Name of the output projection, which reads the heads.
        head_dim: Attribute of the attention module that holds the features of one head.
        attributes: Attributes of the attention module that count heads or features, each mapped to what it counts:
            ``"query_heads"``, ``"key_value_heads"``, ``"query_features"`` or ``"key_value_features"``. Those that a
            module lacks are passed over. ``config.NAME`` stands for a field read from the module's config in forward.
        kind: What the group table calls these groups.
    """

    path: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    head_dim: str = "head_dim"
    attributes: Mapping[str, str] = field(
        default_factory=lambda: {
            "num_heads": "query_heads",
            "num_attention_heads": "query_heads",
            "num_key_value_heads": "key_value_heads",
        }
    )
    kind: str = "attention"

    def group_set(self, model: nn.Module, name: str, layer: int) -> GroupSet:
        """Describe the groups of the attention module ``name``.

        Raises:
            UnsupportedModelError: If a projection is missing, of an unknown type, or its shape does not fit the heads.
        """
        module = model.get_submodule(name)
        head_dim = getattr(module, self.head_dim, None)
        if not isinstance(head_dim, int):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) was expected to hold the features of one head as an integer"
                f" attribute {self.head_dim!r}; found {head_dim!r}."
            )
        query_features = _projection(model, name, self.query).out_features
        key_features = _projection(model, name, self.key).out_features
        output = _projection(model, name, self.output)
        heads, kv_heads = query_features // head_dim, key_features // head_dim
        if (
            query_features != heads * head_dim
            or key_features != kv_heads * head_dim
            or kv_heads == 0
            or heads % kv_heads
            or output.in_features != query_features
        ):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}): with head_dim {head_dim}, {self.query} has {query_features} output"
                f" features, {self.key} {key_features} and {self.output} {output.in_features} input features; expected"
                f" whole heads, a whole number of query heads for each key/value head, and as many features into"
                f" {self.output} as out of {self.query}."
            )
        share = heads // kv_heads
        query_rows = torch.arange(query_features).view(kv_heads, share * head_dim)
        key_rows = torch.arange(key_features).view(kv_heads, head_dim)
        slices = (
            *_produced(model, name, self.query, query_rows),
            *_produced(model, name, self.key, key_rows),
            *_produced(model, name, self.value, key_rows),
            _consumed(model, name, self.output, query_rows),
        )
        counts = {
            "query_heads": share,
            "key_value_heads": 1,
            "query_features": share * head_dim,
            "key_value_features": head_dim,
        }
        return _group_set(model, name, layer, self.kind, kv_heads, slices, self.attributes, counts)


@dataclass(frozen=True)
class MLP:
    """Where an MLP sits in a model. One group is one channel: a row of every input projection, a column of the output.

    Args:
        path: Path of the module that holds the projections, as for :class:`Attention`.
        inputs: Names of the projections that produce the channels, within that module.
        output: Name of the projection that reads them.
        attributes: Attributes of the module that count ``"channels"``.
        kind: What the group table calls these groups.
    """

    path: str
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    attributes: Mapping[str, str] = field(default_factory=lambda: {"intermediate_size": "channels"})
    kind: str = "mlp"

    def group_set(self, model: nn.Module, name: str, layer: int) -> GroupSet:
        """Describe the channels of the MLP ``name``.

        Raises:
            UnsupportedModelError: If a projection is missing, of an unknown type, or the widths differ.
        """
        width = _projection(model, name, self.output).in_features
        for source in self.inputs:
            found = _projection(model, name, source).out_features
            if found != width:
                raise UnsupportedModelError(
                    f"{name}.{source} has {found} output features; expected {width}, as many as"
                    f" {name}.{self.output} has input features."
                )
        rows = torch.arange(width).view(width, 1)
        slices = (
            *(s for source in self.inputs for s in _produced(model, name, source, rows)),
            _consumed(model, name, self.output, rows),
        )
        return _group_set(model, name, layer, self.kind, width, slices, self.attributes, {"channels": 1})


@dataclass(frozen=True)
class Architecture:
    """A family of models whose groups one description finds.

    Args:
        name: Name of the family.
        models: Class names; a model belongs to the family if its class or one of its base classes has such a name.
        blocks: The descriptions of the parts that hold groups.

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
    models: tuple[str, ...]
    blocks: tuple[Attention | MLP, ...]

    def matches(self, module: nn.Module) -> bool:
        """Whether the module's class, or one of its bases, belongs to the family."""
        return any(c.__name__ in self.models for c in type(module).__mro__)


_REGISTRY: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> Architecture:
    """Make a description known, so that models of its classes can be pruned. A later one wins over an earlier one.

    Raises:
        ValueError: If it names no class or no block.
    """
    if not architecture.models or not architecture.blocks:
        raise ValueError(f"Architecture {architecture.name!r} needs at least one class name and one block description.")
    _REGISTRY.pop(architecture.name, None)
    _REGISTRY[architecture.name] = architecture
    return architecture


def architectures() -> tuple[Architecture, ...]:
    """The registered descriptions, the latest last."""
    return tuple(_REGISTRY.values())


def _architecture_of(module: nn.Module) -> Architecture | None:
    return next((a for a in reversed(_REGISTRY.values()) if a.matches(module)), None)


def _outermost_models(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if _architecture_of(module) is not None:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _outermost_models(child, f"{prefix}.{name}" if prefix else name)


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
    found = list(_outermost_models(module))
    if len(found) == 1:
        name, model = found[0]
        return ".".join(part for part in (path, name) if part), model
    if not found:
        looked_at = [
            f"{name or '(root)'}: {type(m).__name__}" for name, m in module.named_modules() if name.count(".") < 2
        ]
        supported = sorted(c for a in _REGISTRY.values() for c in a.models)
        raise UnsupportedModelError(
            f"No supported model found in {type(module).__name__}. Looked at {', '.join(looked_at[:20])}"
            f"{', ...' if len(looked_at) > 20 else ''}. Supported are modules of, or derived from: {', '.join(supported)}."
            " Describe your own with lit_prune.register_architecture."
        )
    listed = ", ".join(f"{name!r} ({type(m).__name__})" for name, m in found)
    raise UnsupportedModelError(
        f"{len(found)} supported models found in {type(module).__name__}: {listed}. Say which one to prune by its path."
    )


def find_group_sets(model: nn.Module) -> list[GroupSet]:
    """Find everything in the model that can be pruned.

    Args:
        model: A model of a registered architecture (see :func:`find_model`).

    Returns:
        The group sets in the order of the layers.

    Raises:
        UnsupportedModelError: If the model has no description, its parts are not where the description expects them,
            or its weights are quantised.
    """
    architecture = _architecture_of(model)
    if architecture is None:
        model = find_model(model)[1]
        architecture = _architecture_of(model)
        assert architecture is not None
    group_sets = []
    for block in architecture.blocks:
        pattern = re.compile(r"(?:.*\.)?" + re.escape(block.path).replace(r"\*", r"(\d+)"))
        matches = [(name, match) for name, _ in model.named_modules() if (match := pattern.fullmatch(name))]
        if not matches:
            raise UnsupportedModelError(
                f"{type(model).__name__} is described by the architecture {architecture.name!r}, but no module is at"
                f" {block.path!r}. Its modules are {[name for name, _ in model.named_modules() if name.count('.') < 3][1:20]}."
            )
        for name, match in matches:
            group_set = block.group_set(model, name, int(match[1]))
            group_sets.append(replace(group_set, block=name[: match.end(1)]))
    group_sets.sort(key=lambda s: (s.layer, s.name))
    check_weights(model, group_sets)
    return group_sets


@dataclass(frozen=True)
class _Projection:
    in_features: int
    out_features: int
    input_dim: int
    has_bias: bool


def _projection(model: nn.Module, owner: str, name: str) -> _Projection:
    """The shape of a linear projection, whichever way round its weight is stored."""
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
    weight = getattr(module, "weight", None)
    # transformers' Conv1D stores (in, out); anything else that looks linear stores (out, in)
    transposed = type(module).__name__ == "Conv1D"
    if (not isinstance(module, nn.Linear) and not transposed) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{path} is a {type(module).__name__}; expected nn.Linear or transformers' Conv1D. Quantised and wrapped"
            " projections cannot be pruned: load the model in float32, bfloat16 or float16 and without adapters."
        )
    if weight.dim() != 2:
        raise UnsupportedModelError(
            f"{path}.weight has shape {tuple(weight.shape)} and type {weight.dtype}; expected a matrix. Packed quantised"
            " weights cannot be pruned: load the model without a quantization_config."
        )
    rows, columns = weight.shape
    has_bias = getattr(module, "bias", None) is not None
    return _Projection(rows, columns, 0, has_bias) if transposed else _Projection(columns, rows, 1, has_bias)


def _produced(model: nn.Module, owner: str, name: str, rows: Tensor) -> Iterator[Slice]:
    """The slices of a projection whose outputs belong to the groups: weight rows and biases."""
    projection = _projection(model, owner, name)
    yield Slice(f"{owner}.{name}.weight", 1 - projection.input_dim, rows, projection.input_dim)
    if projection.has_bias:
        yield Slice(f"{owner}.{name}.bias", 0, rows)


def _consumed(model: nn.Module, owner: str, name: str, columns: Tensor) -> Slice:
    """The slice of a projection whose inputs belong to the groups. Its bias belongs to none of them."""
    projection = _projection(model, owner, name)
    return Slice(f"{owner}.{name}.weight", projection.input_dim, columns, projection.input_dim)


def _group_set(
    model: nn.Module,
    name: str,
    layer: int,
    kind: str,
    size: int,
    slices: tuple[Slice, ...],
    attributes: Mapping[str, str],
    counts: Mapping[str, int],
) -> GroupSet:
    module = model.get_submodule(name)
    present = tuple(
        Attribute(name, attribute, counts[counted])
        for attribute, counted in attributes.items()
        if attribute.startswith("config.") or hasattr(module, attribute)
    )
    return GroupSet(name, layer, kind, size, group_cost(model, slices), slices, present)
