"""Transformers models whose layers differ in width, built from the ``pruning`` entry of their config.

This file needs torch and transformers and nothing else. lit_prune registers what is in it; a copy of it can lie beside
the weights of a pruned model, and ``trust_remote_code=True`` then loads the model where lit_prune is not installed.

A pruned model's ``config.json`` is that of its dense model with three more entries: ``per_layer_config``, by which
transformers says what single layers have other than the rest; ``base_model_type``, the dense model's type; and ``pruning``,
which lists for every place that lost groups which of them were kept, which dimension of which parameter they lie along, and
how many positions of it a group takes (several dimensions are a list of such pairs); and for every list of blocks that lost
some, which were kept. Where blocks or hidden channels left, the config says how many there are, and ``pruning`` what the
dense model's config says in the same fields.

Where ``per_layer_config`` says all of it, the config keeps the dense model's ``model_type``, and building the model means
building every layer from ``config.per_layer_config[i]``, as a transformers that reads this in the model's own code would. Where
it does not (a bias was added, heads have a table of their own), ``model_type`` is ``lit_prune``, and building means building
the dense model, making the parameters in ``pruning`` smaller and leaving blocks out. Every other step of loading is that of
transformers.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

MODEL_TYPE = "lit_prune"
VERSION = 1
BLOCK = "block"
HIDDEN = "hidden"
LAYER_INDICES = ("layer_idx", "layer_id", "block_idx")
PREFIX = "Pruned"
# the entry of ``pruning`` that says that ``per_layer_config`` is enough to build the model
COMPLETE = "complete"
LAYERS = "per_layer_config"
# the entry of ``pruning`` with what the dense model's config says of single layers
DENSE_LAYERS = "dense_layers"
# what an inner model that an Auto class builds is told of its layers
SET_ASIDE = "layers_set_aside"
# digits of ASCII only: ``int`` reads those of other scripts and underscores, too
RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
# more groups than any place of a model has; indices are expanded in memory
MOST_GROUPS = 1_000_000
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
)


class PrunedModelError(ValueError):
    """The files of a pruned model are damaged or do not belong together."""


class PrunedPlanError(PrunedModelError):
    """What ``config.json`` says was cut is malformed, was changed, or does not fit the weights."""


class ConfigView:
    """One module's view of a config that it shares with others: some fields are its own, the rest is the shared config's.

    Args:
        shared: The shared config.
        overrides: The module's own fields.
    """

    def __init__(self, shared: Any, overrides: Mapping[str, Any]) -> None:
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "overrides", dict(overrides))

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "overrides") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return self.overrides[name] if name in self.overrides else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def sync_features(module: nn.Module) -> None:
    """Make the size attributes of a layer agree with its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif weight.dim() == 2 and hasattr(module, "nf") and hasattr(module, "nx"):
        module.__dict__.update(nx=weight.shape[0], nf=weight.shape[1])
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif weight.dim() == 1 and isinstance(getattr(module, "normalized_shape", None), tuple):
        module.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]


def attribute_value(rule: int | Sequence[int], kept: int) -> int:
    """The value of an integer of a module that follows the number of kept groups.

    Args:
        rule: What the integer counts for each group; or three numbers: that, what it counts besides, and a number of groups
            that counts as one.
        kept: The number of groups.
    """
    per_group, fixed, divisor = (rule, 0, 1) if isinstance(rule, int) else rule
    return fixed + per_group * kept // divisor


def is_complete(pruning: Any) -> bool:
    """Whether the ``pruning`` entry of a config says that ``per_layer_config`` is enough to build the model."""
    return isinstance(pruning, Mapping) and bool(pruning.get(COMPLETE))


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text: ``[0, 1, 2, 5]`` is ``"0-2 5"``."""
    values = torch.as_tensor(indices, dtype=torch.long)
    if not len(values):
        return ""
    breaks = (values.diff() != 1).nonzero().flatten()
    first = torch.cat([values[:1], values[breaks + 1]]).tolist()
    last = torch.cat([values[breaks], values[-1:]]).tolist()
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def from_ranges(text: str, size: int) -> list[int]:
    """The indices that a text stands for; the inverse of :func:`to_ranges`.

    Args:
        text: The text.
        size: Number of groups that there are; every index is smaller.

    Raises:
        PrunedPlanError: If the text is not such a list, or not ascending and within ``0..size - 1``. Nothing is expanded
            before this is known.
    """
    try:
        parts = [_range(part) for part in text.split()]
    except (AttributeError, ValueError) as error:
        raise PrunedPlanError(f"Expected indices like '0-2 5' of the kept groups; found {_short(text)}.") from error
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_GROUPS:
        raise PrunedPlanError(f"Expected a number of groups from 0 to {MOST_GROUPS}; found {_short(size)}.")
    ends = [end for part in parts for end in part]
    rising = all(a <= b for a, b in parts) and all(a[1] < b[0] for a, b in pairwise(parts))
    if not rising or (ends and not 0 <= ends[0] <= ends[-1] < size):
        raise PrunedPlanError(f"Expected ascending indices of groups within 0..{size - 1}; found {_short(text)}.")
    return [index for first, last in parts for index in range(first, last + 1)]


def _range(text: str) -> tuple[int, int]:
    match = RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a number or two with a hyphen between; found {_short(text)}")
    return int(match[1]), int(match[2] or match[1])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def resize(model: nn.Module, pruning: Mapping[str, Any]) -> None:
    """Make the parameters of a freshly built dense model as small as its config says; which values stay has no meaning.

    Args:
        model: The dense model, on any device; changed in place.
        pruning: The ``pruning`` entry of the config.

    Raises:
        PrunedPlanError: If the entry is malformed or does not fit the model.
    """
    if not isinstance(pruning, Mapping) or pruning.get("version") != VERSION:
        found = pruning.get("version") if isinstance(pruning, Mapping) else pruning
        raise PrunedPlanError(f"The pruning entry of config.json has version {found!r}; expected {VERSION}.")
    lost: dict[str, dict[int, int]] = {}
    try:
        for entry in pruning["groups"]:
            kept = len(from_ranges(entry["kept"], entry["size"]))
            for name, places in entry["parameters"].items():
                own = local_name(model, name)
                # a head has hidden channels, too, and a model may be loaded without it
                if entry["kind"] == HIDDEN and not _holds(model, own):
                    continue
                for dim, width in [places] if isinstance(places[0], int) else places:
                    dims = lost.setdefault(own, {})
                    dims[dim] = dims.get(dim, 0) + width * (entry["size"] - kept)
        for name, dims in lost.items():
            _shrink(model, name, dims)
        _narrow_heads(model, pruning)
        if not isinstance(pruning["biases"], list):
            raise PrunedPlanError(f"Expected a list of biases in config.json; found {_short(pruning['biases'])}.")
        for name in pruning["biases"]:
            module: Any = model.get_submodule(local_name(model, name))
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(outputs))
        for entry in pruning["groups"]:
            kept = len(from_ranges(entry["kept"], entry["size"]))
            for name, rule in entry["attributes"].items():
                _set_attribute(model, local_name(model, name), attribute_value(rule, kept))
        for entry in pruning["groups"]:
            if entry["kind"] == BLOCK:
                blocks = model.get_submodule(local_name(model, entry["name"]))
                stay = from_ranges(entry["kept"], entry["size"])
                keep_blocks(blocks, stay)
                change_config(model, {n: of_kept_blocks(v, stay) for n, v in pruning["dense"].items()})
            elif entry["kind"] == HIDDEN:
                kept = len(from_ranges(entry["kept"], entry["size"]))
                change_config(model, dict.fromkeys(pruning.get("dense_width", {}), kept))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PrunedModelError):
            raise
        raise PrunedPlanError(
            f"The pruning entry of config.json is malformed or does not fit a {type(model).__name__}:"
            f" {type(error).__name__}: {error}."
        ) from error


def local_name(model: nn.Module, name: str) -> str:
    """What a name means in a model with another head, or without one, than the model that was saved."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    children = dict(model.named_children())
    if name.partition(".")[0] in children:
        return name
    return name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}"


def _holds(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    try:
        return attribute in model.get_submodule(owner)._parameters
    except AttributeError:
        return False


def _shrink(model: nn.Module, name: str, lost: Mapping[int, int]) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, attribute)
    data = parameter.data
    for dim, count in lost.items():
        if not 0 <= count <= data.shape[dim]:
            raise PrunedPlanError(
                f"The pruning entry of config.json takes {count} of the {data.shape[dim]} positions of {name!r} along"
                f" dimension {dim}; expected at least 0 and no more than there are."
            )
        data = data.narrow(dim, 0, data.shape[dim] - count)
    smaller = nn.Parameter(data.clone(), requires_grad=parameter.requires_grad)
    smaller.__dict__.update(parameter.__dict__)
    # a tied head is the embedding
    for owner_of_it in model.modules():
        for key in [k for k, p in owner_of_it._parameters.items() if p is parameter]:
            setattr(owner_of_it, key, smaller)
            sync_features(owner_of_it)


def _narrow_heads(model: nn.Module, pruning: Mapping[str, Any]) -> None:
    """Let heads that the saved model did not have read as many hidden channels as there are."""
    inner = getattr(model, "base_model", model)
    inside = {id(module) for module in inner.modules()}
    for entry in pruning["groups"]:
        if entry["kind"] == HIDDEN:
            kept = len(from_ranges(entry["kept"], entry["size"]))
            for name, module in model.named_modules():
                if id(module) not in inside and isinstance(module, nn.Linear) and module.in_features == entry["size"]:
                    _shrink(model, f"{name}.weight", {1: entry["size"] - kept})


def overridden(config: Any, name: str, value: Any) -> ConfigView:
    """A view of a config, or of what a view shows already, with a value of its own for one field."""
    shared, overrides = (config.shared, config.overrides) if isinstance(config, ConfigView) else (config, {})
    return ConfigView(shared, {**overrides, name: value})


def keep_blocks(blocks: nn.Module, kept: Sequence[int]) -> Callable[[], None]:
    """Let only some blocks (decoder layers) stay in a list, and tell each its new index in the cache of keys and values.

    Args:
        blocks: The list, an ``nn.ModuleList``; changed in place.
        kept: Indices of the kept ones, ascending.

    Returns:
        A function that undoes this.
    """
    before: dict[str, Any] = dict(blocks._modules)
    told: list[tuple[nn.Module, str, int]] = []
    blocks._modules.clear()
    for new, old in enumerate(kept):
        block = before[str(old)]
        blocks._modules[str(new)] = block
        for module in block.modules():
            for name in LAYER_INDICES:
                if module.__dict__.get(name) == old:
                    module.__dict__[name] = new
                    told.append((module, name, old))

    def undo() -> None:
        blocks._modules.clear()
        blocks._modules.update(before)
        for module, name, old in told:
            module.__dict__[name] = old

    return undo


def of_kept_blocks(value: Any, kept: Sequence[int]) -> Any:
    """What becomes of a number of blocks, or of a list with an entry for every block, when only some blocks stay."""
    return len(kept) if isinstance(value, int) else type(value)(value[i] for i in kept)


def with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """A copy of a config with other values for some fields."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def change_config(model: nn.Module, fields: Mapping[str, Any]) -> Callable[[], None]:
    """Give a model a copy of its config with other values for some fields; return a function that undoes this.

    Modules that hold another copy of the config, as a model inside a task head may, get one likewise.
    """
    kind, changed = type(model.config), {}
    places: list[tuple[Any, Any]] = []
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        shared = config.shared if isinstance(config, ConfigView) else config
        if type(shared) is not kind:
            continue
        if id(shared) not in changed:
            changed[id(shared)] = with_fields(shared, fields)
        places.append((module, config))
        new = changed[id(shared)]
        module.__dict__["config"] = ConfigView(new, config.overrides) if isinstance(config, ConfigView) else new

    def undo() -> None:
        for module, config in places:
            module.__dict__["config"] = config

    return undo


def _set_attribute(model: nn.Module, path: str, value: int) -> None:
    owner, marker, name = path.partition(".config.")
    if not marker:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
        return
    module: Any = model.get_submodule(owner)
    module.config = overridden(module.config, name, value)


def is_pruned_config(config: Any) -> bool:
    """Whether a config is a :class:`PrunedConfig`: of this module, or of the code that lies beside a model's weights."""
    return any(cls.__name__ == PrunedConfig.__name__ for cls in type(config).__mro__)


def named_configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config, by the name ``""``, and those of the parts of its model (``text_config``), by theirs."""
    yield path, config
    for name in getattr(config, "sub_configs", None) or {}:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from named_configs(inner, f"{path}.{name}" if path else name)


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What a config says of single layers, by their index; empty if it says nothing, or its transformers cannot."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(index): dict(fields) for index, fields in config.to_dict()[LAYERS].items()}


def same_in_all_layers(config: Any) -> Any:
    """A copy of a config that says of single layers only what all layers of one type (``layer_types``) share.

    A model reads the rest where it means all layers, which ``per_layer_config`` forbids where they differ.
    """
    plain = copy.deepcopy(config)
    for _, each in named_configs(plain):
        if overrides := layer_overrides(each):
            each.per_layer_config = _shared_by_types(overrides, getattr(each, "layer_types", None)) or None
    return plain


def as_dense(config: Any, depth: Mapping[str, Any], layers: Mapping[str, Mapping[Any, Any]]) -> Any:
    """A copy of a pruned model's config with what the dense model's says of its depth and of single layers.

    Args:
        config: The config.
        depth: Fields of it that say how many layers there are, or something for each of them.
        layers: What it says of single layers, as :func:`stated_layers` gives it.
    """
    dense = copy.deepcopy(config)
    for _, each in named_configs(dense):
        if layer_overrides(each):
            each.per_layer_config = None
    for name, value in depth.items():
        setattr(dense, name, value)
    for path, each in named_configs(dense):
        if layers.get(path):
            each.per_layer_config = {int(index): dict(fields) for index, fields in layers[path].items()}
    return dense


def _shared_by_types(overrides: Mapping[int, Mapping[str, Any]], types: Any) -> dict[int, dict[str, Any]]:
    if not isinstance(types, (list, tuple)):
        return {}
    shared = []
    for name in sorted({name for fields in overrides.values() for name in fields}):
        values: dict[Any, set[str]] = {}
        for index, kind in enumerate(types):
            values.setdefault(kind, set()).add(repr(overrides.get(index, {}).get(name, "of all layers")))
        if name != "skip" and all(len(found) == 1 for found in values.values()):
            shared.append(name)
    kept = {index: {n: fields[n] for n in shared if n in fields} for index, fields in overrides.items()}
    return {index: fields for index, fields in kept.items() if fields}


def stated_layers(config: Any) -> dict[str, dict[int, dict[str, Any]]]:
    """What a config and those in it say of single layers, by the name of the config and the index of the layer."""
    found = {path: layer_overrides(each) for path, each in named_configs(config)}
    return {path: overrides for path, overrides in found.items() if overrides}


def build_layers(model: nn.Module, stated: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Build those layers anew of which a config says something, each from ``config.per_layer_config[i]``.

    Args:
        model: A model that was built from a config of layers that are all the same; changed in place.
        stated: As :func:`stated_layers` gives it.

    Raises:
        PrunedPlanError: If the model has no such layers, or they take something else than a config and an index.
    """
    configs = dict(named_configs(model.config))
    for path, overrides in stated.items():
        plain: Any = configs.get(path)
        stacks = [
            child
            for module in model.modules()
            if plain is not None and module.__dict__.get("config") is plain
            for child in module.children()
            if isinstance(child, nn.ModuleList) and len(child) == getattr(plain, "num_hidden_layers", None)
        ]
        if len(stacks) != 1:
            raise PrunedPlanError(
                f"config.json says of layers of {path or 'the model'} what {type(model).__name__} cannot be built from: expected"
                f" one list of layers there; found {len(stacks)}."
            )
        whole = copy.copy(plain)
        try:
            whole.per_layer_config = {index: dict(fields) for index, fields in overrides.items()}
            for index in overrides:
                stacks[0][index] = _built_layer(stacks[0][index], plain, whole, index)
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, PrunedModelError):
                raise
            raise PrunedPlanError(
                f"No {type(model).__name__} can be built from per_layer_config in config.json: {type(error).__name__}: {error}."
            ) from error


def _built_layer(old: nn.Module, plain: Any, whole: Any, index: int) -> nn.Module:
    """The layer that takes the place of one, from its own config."""
    config = whole.per_layer_config[index]
    given = {"config": config, **dict.fromkeys(LAYER_INDICES, index)}
    parameters = inspect.signature(type(old).__init__).parameters
    layer: nn.Module = type(old)(**{name: given[name] for name in parameters if name in given})
    own = {name: getattr(config, name) for name in whole.per_layer_attributes}
    for module in layer.modules():
        if module.__dict__.get("config") is config:
            # a copy: what is changed in the model's config later, the kind of attention for instance, has to be seen
            module.__dict__["config"] = ConfigView(plain, own)
    return layer.train(old.training)


def state_layers(model: nn.Module, stated: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Let the config of a built model say which layers differ, and its modules see what they were built from.

    Args:
        model: The model; its config is changed in place.
        stated: As :func:`stated_layers` gives it.
    """
    configs = dict(named_configs(model.config))
    for path, overrides in stated.items():
        config = configs[path]
        before = copy.copy(config)
        seen = {LAYERS: before.per_layer_config, "is_heterogeneous": before.is_heterogeneous}
        common = layer_overrides(before)
        for name in {name for fields in overrides.values() for name in fields if name != "skip"}:
            if not any(name in fields for fields in common.values()):
                seen[name] = getattr(before, name, None)
        for module in model.modules():
            held = module.__dict__.get("config")
            own = held.overrides if isinstance(held, ConfigView) else {}
            shared = held.shared if isinstance(held, ConfigView) else held
            if shared is config and not isinstance(module, PreTrainedModel):
                module.__dict__["config"] = ConfigView(config, {**seen, **own})
        config.per_layer_config = {index: dict(fields) for index, fields in overrides.items()}
        if not isinstance(config, PrunedConfig):
            config.allow_global_per_layer_attribute_access = True


# where lit_prune is installed, its own engine takes the place of this
build: Callable[[Any, Any], None] = resize


class PrunedConfig(PreTrainedConfig):
    """What ``model_type: lit_prune`` stands for: the config of a dense model with the entry ``pruning``.

    It is only an entrance: :meth:`from_dict` gives an instance of a class derived from the dense model's config class. That has
    the model type of the dense model, by which peft and others choose; the file says ``lit_prune`` where more is needed than
    ``per_layer_config``.
    """

    model_type = MODEL_TYPE

    def __getattribute__(self, name: str) -> Any:
        """A field by its name or another name for it; of what layers differ in, the dense model's, without a warning."""
        known = object.__getattribute__(self, "attribute_map")
        return object.__getattribute__(self, known.get(name, name))

    @property
    def allow_global_per_layer_attribute_access(self) -> bool:
        """``True``: what is asked of all layers is answered by the dense model's value, where transformers would refuse."""
        return True

    @allow_global_per_layer_attribute_access.setter
    def allow_global_per_layer_attribute_access(self, value: bool) -> None:
        self.__dict__["allow_global_per_layer_attribute_access"] = value

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of a ``config.json``, with the model type of this class: the file's says whether code is needed."""
        fields, rest = super().get_config_dict(*args, **kwargs)
        if isinstance(fields.get("pruning"), Mapping):
            fields = {**fields, "model_type": cls.model_type}
        return fields, rest

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop(SET_ASIDE, None)
        pruning = fields.get("pruning")
        if isinstance(pruning, Mapping):
            if is_complete(pruning):
                names = fields.get("architectures")
                fields["architectures"] = names and [name.removeprefix(PREFIX) for name in names]
            else:
                fields["model_type"] = MODEL_TYPE
        return fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config that the dense model's class would, with what pruning adds.

        Raises:
            PrunedPlanError: If the dense model's type is missing or unknown to this transformers, or no ``pruning``
                entry is there.
            PrunedModelError: If the data type is unknown, or the class of the model is unknown or of another type.
        """
        if cls is not PrunedConfig:
            return super().from_dict(config_dict, **kwargs)
        base = str(config_dict.get("base_model_type"))
        if base not in CONFIG_MAPPING or not isinstance(config_dict.get("pruning"), Mapping):
            raise PrunedPlanError(
                f"config.json has base_model_type {base!r} and a pruning entry of type"
                f" {type(config_dict.get('pruning')).__name__}; expected a model type that transformers"
                f" {transformers.__version__} knows, and a mapping."
            )
        check_dtype(config_dict)
        model_class(config_dict.get("architectures"), CONFIG_MAPPING[base])
        # the class has the dense model's type
        rest = {name: value for name, value in config_dict.items() if name != "model_type"}
        return pruned_config_class(base).from_dict(rest, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the config, and this file beside it if the config refers to it."""
        if getattr(self, "auto_map", None):
            self.auto_map = auto_map()
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, Path(save_directory) / f"{_MODULE}.py")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: :meth:`save_pretrained` takes care of this file itself."""


_MODULE = "modeling_pruned"
_CONFIGS: dict[str, type[PrunedConfig]] = {}
_MODELS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def auto_map() -> dict[str, str]:
    """What ``config.json`` says about the classes in this file when it lies beside the weights."""
    names = {name: f"{_MODULE}.{name.replace('Auto', PREFIX, 1)}" for name in AUTO_CLASSES}
    return {"AutoConfig": f"{_MODULE}.PrunedConfig", **names}


def pruned_config_class(base_model_type: str) -> type[PrunedConfig]:
    """The class of pruned configs of a model type of transformers, derived from :class:`PrunedConfig` and the type's own."""
    if base_model_type not in _CONFIGS:
        base = CONFIG_MAPPING[base_model_type]
        members = {"model_type": base.model_type, "__module__": __name__}
        derived = type(f"{PREFIX}{base.__name__}", (PrunedConfig, base), members)
        _CONFIGS[base_model_type] = derived
        for name in AUTO_CLASSES:
            if base in getattr(transformers, name)._model_mapping:
                getattr(transformers, name).register(derived, _FACADES[name], exist_ok=True)
    return _CONFIGS[base_model_type]


def pruned_model_class(base: type[PreTrainedModel], base_model_type: str) -> type[PreTrainedModel]:
    """The class of pruned models of a class of transformers, derived from it."""
    if base not in _MODELS:
        members = {"config_class": pruned_config_class(base_model_type), "__module__": __name__}
        _MODELS[base] = type(f"{PREFIX}{base.__name__}", (_Pruned, base), members)
    return _MODELS[base]


def check_dtype(config: Mapping[str, Any]) -> None:
    """Refuse a config whose data type is none that weights can have.

    Raises:
        PrunedModelError: If it is not the name of a floating type of torch.
    """
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        found = getattr(torch, str(value).removeprefix("torch."), None)
        if value is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise PrunedModelError(
                f"config.json has {key} {_short(value)}; expected a floating type of torch, like 'float32' or 'bfloat16'."
            )


def model_class(names: Any, config_class: type) -> type[PreTrainedModel] | None:
    """The class of transformers that a config's ``architectures`` name, without the prefix of pruned ones.

    Args:
        names: What the config says.
        config_class: The class of its dense model's config.

    Returns:
        The class, or ``None`` if none is named.

    Raises:
        PrunedModelError: If the name is no model class, or the class belongs to another type of model.
    """
    if not names:
        return None
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else ""
    found = getattr(transformers, name.removeprefix(PREFIX), None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or found is PreTrainedModel:
        raise PrunedModelError(
            f"config.json names the model class {_short(names)}; expected a list with one of transformers"
            f" {transformers.__version__}, like {PREFIX}LlamaForCausalLM."
        )
    if found.config_class is not None and not issubclass(config_class, found.config_class):
        raise PrunedModelError(
            f"config.json names the model class {name!r} and a model type with the config {config_class.__name__}, which do not"
            f" belong together; expected the type of {found.config_class.__name__}."
        )
    return found


def weight_files(path: Any, **hub: Any) -> list[str]:
    """The files with the weights of a folder or a repository on the hub, all of them there.

    Raises:
        FileNotFoundError: If one is missing.
        PrunedModelError: If the list of them is damaged, or names a file outside the folder.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, **hub}
    if (single := cached_file(path, WEIGHTS, **optional)) is not None:
        return [single]
    index = cached_file(path, WEIGHTS_INDEX, **optional)
    if index is None:
        raise FileNotFoundError(f"{path} has no weights: expected {WEIGHTS} or {WEIGHTS_INDEX}.")
    try:
        content = json.loads(Path(index).read_text(encoding="utf-8"))
        names: Any = set(content["weight_map"].values()) or {""}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PrunedModelError(
            f"{WEIGHTS_INDEX} in {path} is damaged: expected JSON with a mapping 'weight_map' ({type(error).__name__})."
        ) from error
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or name in ("", ".."):
            raise PrunedModelError(
                f"{WEIGHTS_INDEX} in {path} is damaged: it names the file {_short(name)}; expected one in the same folder."
            )
    # transformers reads it, too
    if not isinstance(content.get("metadata"), dict):
        raise PrunedModelError(f"{WEIGHTS_INDEX} in {path} is damaged: expected JSON with a mapping 'metadata'.")
    files = []
    for name in sorted(names):
        file = cached_file(path, name, **optional)
        if file is None:
            raise FileNotFoundError(f"{path} has no file {name}, which {WEIGHTS_INDEX} names.")
        files.append(file)
    return files


def weight_headers(path: Any, files: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type, as safetensors writes it, and shape of every tensor in some files, by name.

    Raises:
        PrunedModelError: If a file is not a whole safetensors file.
    """
    headers = {}
    for file in files:
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118, it cannot be iterated
                    part = content.get_slice(name)
                    headers[name] = (str(part.get_dtype()), tuple(part.get_shape()))
        except SafetensorError as error:
            raise PrunedModelError(f"The weights in {path} are damaged: {Path(file).name}: {error}.") from error
    return headers


def _check_values(path: Any, model: Any, headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse weights that are whole numbers in the files, or not finite."""
    whole = {n: kind for n, (kind, _) in headers.items() if kind.startswith(("I", "U", "BOOL"))}
    whole |= {local_name(model, name): kind for name, kind in whole.items()}
    for name, parameter in model.named_parameters():
        if name in whole:
            raise PrunedModelError(
                f"The weights in {path} are damaged: {name!r} has the type {whole[name]}; expected a floating one."
            )
        known = parameter.device.type != "meta" and parameter.dtype.itemsize > 1
        if known and not bool(torch.isfinite(parameter).all()):
            raise PrunedModelError(f"The weights in {path} are damaged: {name!r} has values that are not finite.")


def load_whole(load: Callable[..., Any], path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
    """Load as transformers does, and refuse files that are damaged or do not fit the config.

    Args:
        load: A ``from_pretrained`` of transformers, which by itself fills what is missing with random numbers.
        path: The folder, or the name of a repository on the hub.
        args: What else ``load`` takes.
        config: The config of the pruned model.
        kwargs: What else ``load`` takes.

    Raises:
        PrunedPlanError: If weights have other shapes than the plan leaves.
        PrunedModelError: For files that are no whole safetensors files, and for weights that are missing, unknown, not
            floating or not finite.
        NotImplementedError: If quantisation is asked for.
    """
    if kwargs.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        raise NotImplementedError(
            f"{path} is a pruned model; quantising it on loading, or loading a quantised one, is not supported. Load it"
            " in float32, bfloat16 or float16, and quantise the loaded model."
        )
    wanted = kwargs.pop("output_loading_info", False)
    tolerant = kwargs.pop("ignore_mismatched_sizes", False)
    headers = {}
    if kwargs.get("variant") is None and kwargs.get("state_dict") is None:
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        headers = weight_headers(path, weight_files(path, **hub))
    try:
        model, info = load(path, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        raise PrunedModelError(f"The weights in {path} are damaged: {error}.") from error
    if info["mismatched_keys"] and not tolerant:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise PrunedPlanError(
            f"The weights in {path} do not fit the plan in its config.json: {name!r} has shape {tuple(found)}; expected"
            f" {tuple(expected)} ({len(info['mismatched_keys'])} tensors differ)."
        )
    # as in any from_pretrained, another task's head may be new, and that of the files unused
    same_task = type(model).__name__.removeprefix(PREFIX) in [
        n.removeprefix(PREFIX) for n in config.architectures or ()
    ]
    inner = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = [n for n in info["missing_keys"] if same_task or n.startswith(inner)]
    unknown = list(info["unexpected_keys"]) if same_task else []
    for what, names in (("lacks the weights", missing), ("has unknown weights", unknown)):
        if names:
            raise PrunedModelError(f"{path} {what} {sorted(names)[:3]} ({len(names)} tensors).")
    _check_values(path, model, headers)
    return (model, info) if wanted else model


class _Pruned:
    """What the classes of pruned models have in common."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        pruning = config.pruning if isinstance(config.pruning, Mapping) else {}
        stated = config.__dict__.pop(SET_ASIDE, None) or stated_layers(config)
        by_layers = build is resize and is_complete(pruning)
        depth = {} if by_layers else {**pruning.get("dense", {}), **pruning.get("dense_width", {})}
        plain = same_in_all_layers(config) if by_layers else as_dense(config, depth, pruning.get(DENSE_LAYERS, {}))
        plain.__dict__[SET_ASIDE] = stated
        super().__init__(plain, *args, **kwargs)  # type: ignore[call-arg]
        plain.__dict__.pop(SET_ASIDE, None)
        # some task heads build their inner model by an Auto class, which gives a pruned one already
        if any(isinstance(module, _Pruned) for module in self.modules() if module is not self):  # type: ignore[attr-defined]
            change_config(self, {name: getattr(config, name) for name in depth})  # type: ignore[arg-type]
            _narrow_heads(self, pruning)  # type: ignore[arg-type]
        elif by_layers:
            build_layers(self, stated)  # type: ignore[arg-type]
        else:
            build(self, config.pruning)
        state_layers(self, stated)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and refuse files that are damaged or do not fit the config; see :func:`load_whole`."""
        config = kwargs.pop("config", None) or cls.config_class.from_pretrained(path)  # type: ignore[attr-defined]
        return load_whole(super().from_pretrained, path, *args, config=config, **kwargs)  # type: ignore[misc]


class _Facade:
    """What the Auto classes find for a pruned config; loads the class derived from the one they find for the dense model."""

    auto_class = ""

    @classmethod
    def _model_class(cls, config: Any) -> Any:
        mapping = getattr(transformers, cls.auto_class)._model_mapping
        found = mapping[CONFIG_MAPPING[config.base_model_type]]
        candidates = found if isinstance(found, tuple) else (found,)
        names = [name.removeprefix(PREFIX) for name in config.architectures or ()]
        named = [c for c in candidates if c.__name__ in names]
        return pruned_model_class((named or candidates)[0], config.base_model_type)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a pruned model; takes what ``from_pretrained`` of transformers takes."""
        config = kwargs.pop("config", None)
        if config is None:
            config = PrunedConfig.from_pretrained(path)
        return cls._model_class(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._model_class(config)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the config takes care of this file when a model is saved."""


_FACADES = {
    name: type(name.replace("Auto", PREFIX, 1), (_Facade,), {"auto_class": name, "__module__": __name__})
    for name in AUTO_CLASSES
}
globals().update({facade.__name__: facade for facade in _FACADES.values()})
