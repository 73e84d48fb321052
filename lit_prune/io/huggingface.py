"""Saving a pruned model so that it loads again wherever transformers is."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune import modeling_pruned
from lit_prune._files import write_text
from lit_prune._renamed import renamed_arguments
from lit_prune.architectures import find_group_sets
from lit_prune.distributed.shards import any_sharded
from lit_prune.errors import ArgumentValueError, PruningError, UnsupportedModelError
from lit_prune.groups import HIDDEN, GroupSet, check_weights
from lit_prune.io.conversion import convert_checkpoint as convert_checkpoint
from lit_prune.io.litgpt_config import gpt_class
from lit_prune.io.litgpt_folder import save_litgpt
from lit_prune.io.loading import load_pruned as load_pruned
from lit_prune.io.model_card import model_card, write_card
from lit_prune.io.module_folder import check_saveable, write_module
from lit_prune.io.output_folder import check_replaceable, replacing_folder
from lit_prune.io.per_layer import add_layers, restore_layers, stock_with_layers
from lit_prune.io.pruning_entry import pruning_entry
from lit_prune.io.stock import rescaled_embeddings, stock_config, unstated_parts
from lit_prune.io.ties import built_as_tied, copy_ties, untied_names
from lit_prune.io.wrappers import unwrapped
from lit_prune.modeling_pruned import PrunedConfig
from lit_prune.plan import DEPTH_ATTRIBUTE, PruningPlan, get_plan, set_plan
from lit_prune.surgery import saving
from lit_prune.surgery.depth import depth_fields
from lit_prune.surgery.width import head_size, hidden_entry, width_fields
from lit_prune.transformers_internals import build


@renamed_arguments(figures="metrics")
def save_pruned(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    self_contained: bool = False,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a pruned model to a folder, so that it loads again.

    Of a model that is no transformers model, or has no description, the folder holds safetensors, ``plan.json`` and a small
    ``config.json``; ``load_pruned(directory, model=...)`` needs the dense model, as its code is yours. A module that holds
    the pruned model (a LightningModule) is saved as a whole. For a ``litgpt.GPT``, see
    :func:`lit_prune.io.litgpt_folder.save_litgpt`, whose folder has neither model card nor code.

    For a transformers model the folder holds safetensors, ``config.json`` with the plan, the generation config, a model
    card, and the tokenizer if one is given. If every layer kept the same widths (or nothing but whole blocks left) and a
    stock config can say so, the config is stock, and transformers loads the model without lit_prune. Otherwise its
    ``model_type`` is ``lit_prune``, which ``import lit_prune`` makes known to the Auto classes. Everything is written to a
    temporary folder that replaces ``directory`` at the end. A list of the files, with checksums of the weights, is written,
    too; see :func:`load_pruned`.

    Args:
        model: A model that was cut, by :func:`lit_prune.prune` for instance; also compiled, or in a wrapper of torch.nn.parallel.
        directory: Where to write. An existing folder is replaced if it holds nothing but what lit_prune wrote, and refused
            otherwise.
        tokenizer: A tokenizer to save beside the model; for a ``litgpt.GPT`` also the LitGPT folder that holds it.
        metrics: Metrics for the model card (for the config of other models) by stage (``"dense"``, ``"pruned"``,
            ``"recovered"``) and name.
        self_contained: Write the modelling code beside the weights, so that ``trust_remote_code=True`` loads the model where
            lit_prune is not installed; only for transformers models.
        max_shard_size: Size at which a new weights file begins, bytes or text like ``"2GB"``.
        state_dict: The whole weights by name, where the model's own parameters are shards of them.

    Returns:
        The directory.

    Raises:
        ArgumentValueError: If ``self_contained`` is asked for a model that is no transformers model.
        PruningError: If the model was not pruned, or ``directory`` holds something else, is or contains the working
            directory, or cannot be written; before any work. Also if writing fails; then what was there is unchanged.
        UnsupportedModelError: If its weights are quantised, its state is not all tensors, or it carries adapters of peft.
    """
    model, state_dict = unwrapped(model, state_dict)
    if gpt_class(model) is not None:
        if self_contained:
            raise ArgumentValueError(
                "self_contained=True writes modelling code of transformers; a litgpt.GPT needs litgpt, and no lit_prune where"
                " it was pruned with uniform=True. Leave self_contained out."
            )
        return save_litgpt(model, directory, tokenizer, state_dict=state_dict)
    check_replaceable(directory)
    as_transformers, dense = _how_saved(model)
    if not as_transformers:
        if self_contained:
            raise ArgumentValueError(
                f"self_contained=True writes code of transformers models; found a {type(model).__name__}, whose code is yours."
            )
        check_saveable(model, state_dict)
        with replacing_folder(directory) as temporary:
            write_module(
                model,
                temporary,
                tokenizer=tokenizer,
                metrics=metrics,
                max_shard_size=max_shard_size,
                state_dict=state_dict,
            )
        return Path(directory)
    with saving.plan_of_inner_model(model):
        whole = _to_pretrained(model, self_contained, state_dict, dense)
    with replacing_folder(directory) as temporary:
        write_pruned(
            whole, temporary, tokenizer, metrics=metrics, self_contained=self_contained, max_shard_size=max_shard_size
        )
    return Path(directory)


def _how_saved(model: nn.Module) -> tuple[bool, PreTrainedModel | None]:
    """Whether a model is saved as one of transformers: its config builds it, and a description finds its groups; and the dense
    model that the config builds then, on the device ``meta``, if the model was pruned."""
    if not isinstance(model, PreTrainedModel) or _is_traced(model):
        return False, None
    if (plan := get_plan(model)) is None:
        return True, None
    dense = _dense(model)
    return (False, None) if unstated_parts(model, dense, plan) else (True, dense)


def _is_traced(model: nn.Module) -> bool:
    plan = get_plan(model)
    return plan is not None and plan.groups is not None


def write_pruned(
    whole: PreTrainedModel,
    folder: Path,
    tokenizer: Any = None,
    *,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    self_contained: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the files of a pruned model into an empty folder.

    Args:
        whole: The model, as :func:`to_pretrained` gives it.
        folder: The folder.
        tokenizer: As for :func:`save_pruned`, like the rest.
        metrics: Metrics for the model card.
        self_contained: Whether the modelling code lies beside the weights.
        max_shard_size: Size at which a new weights file begins.

    Raises:
        PruningError: If the weights cannot be written, on a full disk for instance.
    """
    try:
        whole.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise PruningError(f"The weights could not be written to {folder}: {error}.") from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", model_card(whole, metrics or {}, self_contained=self_contained))


def to_pretrained(
    model: nn.Module, *, self_contained: bool = False, state_dict: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The pruned model as an instance of the class that it will load as; it shares its weights with ``model``.

    Its ``save_pretrained`` and ``push_to_hub``, transformers' own, write files that load again.

    Args:
        model: A transformers model that was cut by :func:`lit_prune.apply_plan`.
        self_contained: As for :func:`save_pruned`.
        state_dict: As for :func:`save_pruned`.

    Raises:
        PruningError: If the model was not pruned.
        UnsupportedModelError: If it is not a transformers model, its weights are quantised, or they are shards of weights.
    """
    model, state_dict = unwrapped(model, state_dict)
    with saving.plan_of_inner_model(model):
        return _to_pretrained(model, self_contained, state_dict, None)


def _to_pretrained(
    model: nn.Module, self_contained: bool, state_dict: Mapping[str, Tensor] | None, dense: PreTrainedModel | None
) -> PreTrainedModel:
    """What :func:`to_pretrained` does, with the dense model if it is known that the model's config builds it."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Only transformers models can be saved as one; found {type(model).__name__}. Save it with lit_prune.save_pruned."
        )
    if _is_traced(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no description, so its config cannot say how it was cut. Save it with"
            " lit_prune.save_pruned, and load it with lit_prune.load_pruned(directory, model=...)."
        )
    plan = get_plan(model)
    if plan is None:
        raise PruningError("The model was not pruned; save it with its own save_pretrained.")
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    if any_sharded(weights.values()) is not None:
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are shards, which are no weights of a folder. Gather them, and save"
            " them with lit_prune.save_pruned(model, directory, state_dict=whole_weights) on one rank; see docs/fsdp.md."
        )
    if dense is None:
        dense = _dense(model)
        _check_stated(model, dense, plan)
    base, dense_config = type(dense), _dense_config(model)
    copy_ties(dense.config, dense_config)
    # those of the dense model: a layer that lost everything has none left
    group_sets = find_group_sets(dense, hidden=plan.hidden)
    _check_held(model, group_sets)
    depth, width, changed = _changed_fields(dense, plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    pruning = {"version": modeling_pruned.VERSION, **pruning_entry(group_sets, plan)}
    stock = stock_config(model, base, dense_config, plan, shapes, changed)
    if stock is not None:
        config, replaced = stock
        config.base_model_type, config.pruning = dense_config.model_type, {**pruning, "dense": replaced}
        cls = base
    else:
        pruning |= {key: fields for key, fields in (("dense", depth), ("dense_width", width)) if fields}
        fields = {**dense_config.to_dict(), **changed}
        fields.update(base_model_type=dense_config.model_type, pruning=pruning)
        fields = _with_layers(model, dense, fields, group_sets, plan, shapes)
        if self_contained:
            if not modeling_pruned.is_complete(fields["pruning"]):
                _check_self_contained(model, base, dense_config, pruning)
            fields["auto_map"] = modeling_pruned.auto_map()
        cls = modeling_pruned.pruned_model_class(base, dense_config.model_type)
        config = PrunedConfig.from_dict(fields)
    config.dtype = model.dtype
    with torch.device("meta"):
        whole = build(cls, config)
    if plan.hidden:
        weights.update(rescaled_embeddings(model, whole, weights))
    weights.update({name: weights[name].clone() for name in untied_names(whole, weights)})
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    if model.can_generate():
        whole.generation_config = model.generation_config
    set_plan(whole, plan)
    return whole.eval()


def _check_stated(model: nn.Module, dense: nn.Module, plan: PruningPlan) -> None:
    """Refuse a model of which its config does not say all.

    Raises:
        UnsupportedModelError: Naming what it does not say.
    """
    if unstated := unstated_parts(model, dense, plan):
        raise UnsupportedModelError(
            f"{type(model).__name__} was built with an option that its config does not hold (such as add_pooling_layer=False): of"
            f" {unstated[:3]} the config builds others than it has, so that a folder of transformers would load as another model."
            " Save it with lit_prune.save_pruned, and load it with lit_prune.load_pruned(directory, model=...)."
        )


def _check_held(model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
    """Check the weights of the group sets that a model still has."""
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    whole = [s for s in group_sets if held.issuperset(part.parameter for part in s.slices)]
    # hidden channels are those of a tied head, too
    check_weights(model, [s for s in whole if s.kind != HIDDEN])


saving.to_pretrained = to_pretrained
saving.write_card = write_card


def _with_layers(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    fields: dict[str, Any],
    group_sets: list[GroupSet],
    plan: PruningPlan,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The fields of a config with what single layers have, and whether that is all that building the model takes."""
    fields = copy.deepcopy(fields)
    if not add_layers(fields, dense, group_sets, plan):
        return fields
    fields["pruning"][modeling_pruned.DENSE_LAYERS] = modeling_pruned.stated_layers(dense.config)
    complete = {**fields, "pruning": {**fields["pruning"], modeling_pruned.COMPLETE: True}}
    stock = stock_with_layers(model, type(dense), type(dense.config), complete, shapes, bool(plan.blocks))
    return fields if stock is None else stock


def _changed_fields(dense: nn.Module, plan: PruningPlan) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the dense config says of depth and of hidden size, and what the pruned one says in place of both."""
    depth = {name: (value, e.kept) for e in plan.blocks for name, value in depth_fields(dense, e).items()}
    changed = {name: modeling_pruned.of_kept_blocks(value, kept) for name, (value, kept) in depth.items()}
    channels = hidden_entry(plan)
    width = {} if channels is None else width_fields(dense, channels)
    if channels is not None:
        changed |= {**head_size(dense), **dict.fromkeys(width, len(channels.kept))}
    return {name: value for name, (value, _) in depth.items()}, width, changed


def _check_self_contained(
    model: PreTrainedModel, base: type[PreTrainedModel], dense_config: PreTrainedConfig, pruning: Mapping[str, Any]
) -> None:
    """Refuse what the code beside the weights cannot rebuild: modules that run on code of lit_prune since the cut.

    Raises:
        UnsupportedModelError: If there is one.
    """
    config: Any = type(dense_config).from_dict(dense_config.to_dict())
    with torch.device("meta"):
        rebuilt = build(base, config)
        modeling_pruned.resize(rebuilt, pruning)
    for (name, found), (_, wanted) in zip(rebuilt.named_modules(), model.named_modules(), strict=True):
        if name and type(found) is not type(wanted):
            raise UnsupportedModelError(
                f"{name!r} became a {type(wanted).__name__} when it lost groups, which is code of lit_prune: the model cannot be"
                " saved with self_contained=True. Save it without, or keep at least one group there."
            )


def _dense_class(cls: type) -> type[PreTrainedModel]:
    """The class of transformers that a model's class, or the one it derives from, is."""
    for base in cls.__mro__:
        if issubclass(base, PreTrainedModel) and getattr(transformers, base.__name__, None) is base:
            return base
    raise UnsupportedModelError(
        f"{cls.__module__}.{cls.__name__} is not a class of transformers; a model of it cannot be rebuilt from a config. Save"
        " its state_dict and plan yourself."
    )


def _dense(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its config builds it before any cut, on the meta device; what is one parameter in the model is one there."""
    config, plan = _dense_config(model), get_plan(model)
    named = model.named_parameters(remove_duplicate=False)
    held = {name if plan is None else plan.original_name(name): parameter for name, parameter in named}
    with torch.device("meta"):
        return built_as_tied(lambda: build(_dense_class(type(model)), config), config, held)


def _dense_config(model: nn.Module) -> PreTrainedConfig:
    """A copy of the model's config as it was when the model was dense."""
    config: Any = model.config
    fields = config.to_dict()
    for key in ("pruning", "auto_map", "architectures"):
        fields.pop(key, None)
    model_type = fields.pop("base_model_type", None) or config.model_type
    fields.update(getattr(model, DEPTH_ATTRIBUTE, {}))
    pruning = getattr(config, "pruning", None) or {}
    for key in ("dense", "dense_width"):
        fields.update(pruning.get(key, {}))
    fields.pop("model_type", None)
    if modeling_pruned.is_pruned_config(config):
        own = pruning.get(modeling_pruned.DENSE_LAYERS, {})
        for path, _ in modeling_pruned.named_configs(config):
            restore_layers(fields, path, own.get(path))
    return CONFIG_MAPPING[model_type].from_dict(fields)
