"""Saving a pruned model so that it loads again wherever transformers is, loading it, and converting a checkpoint to it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune import modeling_pruned
from lit_prune.architectures import find_group_sets
from lit_prune.checkpoint import merge_adapters, saved_prunings
from lit_prune.errors import PlanError, PruningError, UnsupportedModelError
from lit_prune.figures import format_figure, label
from lit_prune.files import write_text
from lit_prune.groups import GroupSet, check_weights, count_parameters
from lit_prune.modeling_pruned import PREFIX, PrunedConfig, PrunedModelError, PrunedPlanError, to_ranges
from lit_prune.plan import DEPTH_ATTRIBUTE, PruningPlan, get_plan, plan_from_config, set_plan
from lit_prune.surgery import apply_plan, depth_fields


def _build(model: PreTrainedModel, pruning: Any) -> None:
    """Cut a freshly built dense model by its config's plan, with the engine that cut the one that was saved."""
    del pruning
    try:
        plan = plan_from_config(model.config)
        assert plan is not None
        set_plan(model, None)
        with torch.device("cpu"):
            apply_plan(model, plan.renamed(lambda name: modeling_pruned.local_name(model, name)))
    except PruningError as error:
        raise PrunedPlanError(str(error)) from error


modeling_pruned.build = _build
AutoConfig.register(modeling_pruned.MODEL_TYPE, PrunedConfig, exist_ok=True)


def save_pruned(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    figures: Mapping[str, Mapping[str, float]] | None = None,
    self_contained: bool = False,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a pruned transformers model so that it loads again.

    The folder holds safetensors, ``config.json`` with the plan, the generation config, a model card, and the tokenizer if
    one is given. If every layer kept the same widths (or nothing but whole blocks left) and a stock config can say so, the
    config is stock, and transformers loads the model without lit_prune. Otherwise its ``model_type`` is ``lit_prune``,
    which ``import lit_prune`` makes known to the Auto classes. Everything is written to a temporary folder that replaces
    ``directory`` at the end.

    Args:
        model: A transformers model that was cut by :func:`lit_prune.apply_plan`.
        directory: Where to write; an existing folder is replaced if it holds a saved model, and refused otherwise.
        tokenizer: A tokenizer to save beside the model.
        figures: Figures for the model card by stage (``"dense"``, ``"pruned"``, ``"healed"``) and name.
        self_contained: Write the modelling code beside the weights, so that ``trust_remote_code=True`` loads the model where
            lit_prune is not installed.
        max_shard_size: Size at which a new weights file begins, bytes or text like ``"2GB"``.
        state_dict: The whole weights by name, where the model's own parameters are shards of them.

    Returns:
        The directory.

    Raises:
        PruningError: If the model was not pruned, or ``directory`` holds something else.
        UnsupportedModelError: If it is not a transformers model, or its weights are quantised.
    """
    whole = to_pretrained(model, self_contained=self_contained, state_dict=state_dict)
    with _replacing_directory(Path(directory)) as temporary:
        whole.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(whole, figures or {}, self_contained=self_contained))
    return Path(directory)


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
        UnsupportedModelError: If it is not a transformers model, or its weights are quantised.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Only transformers models can be saved as one; found {type(model).__name__}. Save its state_dict and plan"
            " yourself."
        )
    plan = get_plan(model)
    if plan is None:
        raise PruningError("The model was not pruned; save it with its own save_pretrained.")
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    base = _dense_class(type(model))
    dense_config = _dense_config(model)
    with torch.device("meta"):
        dense = base._from_config(dense_config)
    # those of the dense model: a layer that lost everything has none left
    group_sets = find_group_sets(dense)
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    check_weights(model, [s for s in group_sets if held.issuperset(part.parameter for part in s.slices)])
    depth = {name: (value, e.kept) for e in plan.blocks for name, value in depth_fields(dense, e).items()}
    pruned_depth = {name: modeling_pruned.of_kept_blocks(value, kept) for name, (value, kept) in depth.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    pruning = {"version": modeling_pruned.VERSION, **_pruning_entry(group_sets, plan)}
    stock = _stock_config(model, base, dense_config, plan, shapes, pruned_depth)
    if stock is not None:
        config, replaced = stock
        config.base_model_type, config.pruning = dense_config.model_type, {**pruning, "dense": replaced}
        cls = base
    else:
        if depth:
            pruning["dense"] = {name: value for name, (value, _) in depth.items()}
        fields = {**dense_config.to_dict(), **pruned_depth}
        fields.update(model_type=modeling_pruned.MODEL_TYPE, base_model_type=dense_config.model_type, pruning=pruning)
        if self_contained:
            _check_self_contained(model, base, dense_config, pruning)
            fields["auto_map"] = modeling_pruned.auto_map()
        cls = modeling_pruned.pruned_model_class(base, dense_config.model_type)
        config = PrunedConfig.from_dict(fields)
    config.dtype = model.dtype
    with torch.device("meta"):
        whole = cls._from_config(config)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    if model.can_generate():
        whole.generation_config = model.generation_config
    set_plan(whole, plan)
    return whole.eval()


def load_pruned(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", **options: Any
) -> PreTrainedModel:
    """Load a model that :func:`save_pruned` wrote, as the class that it was saved as.

    ``AutoModelForCausalLM.from_pretrained`` and its likes load it, too, after ``import lit_prune``.

    Args:
        directory: The folder, or the name of a repository on the hub.
        dtype: Data type of the weights; that of the files if ``"auto"``.
        options: What ``from_pretrained`` of transformers takes: ``device_map``, ``attn_implementation``, ``token``...

    Returns:
        The pruned model, in eval mode. :func:`lit_prune.get_plan` gives its plan.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        PlanError: If the plan was changed, or does not fit the weights.
        PruningError: If files are damaged, weights are missing or unknown, or the model was not pruned.
        UnsupportedModelError: If the model's class is unknown, or quantisation is asked for.
    """
    _check_config_file(Path(directory))
    hub = {k: options[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in options}
    try:
        config = AutoConfig.from_pretrained(directory, **hub)
        if not isinstance(getattr(config, "pruning", None), Mapping):
            raise PruningError(
                f"{directory}/config.json has no pruning entry: it is the config of a {config.model_type!r} model that was"
                " not pruned by lit_prune. Load it with transformers."
            )
        name = next(iter(config.architectures or ()), "")
        base = getattr(transformers, name.removeprefix(PREFIX), None)
        if base is None:
            raise UnsupportedModelError(
                f"{directory}/config.json names the class {name!r}; expected one of transformers {transformers.__version__}."
            )
        cls = modeling_pruned.pruned_model_class(base, config.base_model_type) if name.startswith(PREFIX) else base
        load: Any = cls.from_pretrained
        if cls is base:
            load = partial(modeling_pruned.load_whole, load)
        model = load(directory, config=config, dtype=dtype, **options)
    except PrunedPlanError as error:
        raise PlanError(str(error)) from error
    except PrunedModelError as error:
        raise PruningError(str(error)) from error
    except NotImplementedError as error:
        raise UnsupportedModelError(str(error)) from error
    except OSError as error:
        raise FileNotFoundError(str(error)) from error
    plan = get_plan(model)
    assert plan is not None
    kept = {key: len(e.kept) for key, e in plan.afterwards().items()}
    for group_set in find_group_sets(model):
        if group_set.size != kept.get(group_set.key, group_set.size):
            raise PlanError(
                f"The weights in {directory} do not fit the plan in its config.json: {group_set.name!r} ({group_set.kind})"
                f" has {group_set.size} groups; the plan keeps {kept[group_set.key]}."
            )
    return model


def _check_config_file(directory: Path) -> None:
    """Refuse a local folder whose ``config.json`` is missing or damaged.

    Raises:
        FileNotFoundError: If there is none.
        PruningError: If it is not valid JSON.
    """
    file = directory / "config.json"
    if not directory.is_dir():
        return
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; expected a folder written by lit_prune.save_pruned.")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PruningError(f"{file} is damaged: {error}.") from error


def convert_checkpoint(
    checkpoint: str | os.PathLike[str], model: PreTrainedModel, *, name: str | None = None
) -> PreTrainedModel:
    """Fill a dense model from a Lightning checkpoint of a run that pruned it, cutting it as the checkpoint's plan says.

    Args:
        checkpoint: A checkpoint file that ``Trainer.save_checkpoint`` or ``ModelCheckpoint`` wrote.
        model: The model that the run began with, with any weights; cut and filled in place.
        name: Name of the model within the LightningModule; found by the names of the weights if ``None``.

    Returns:
        ``model``, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        PruningError: If it is no Lightning checkpoint, holds more than plain data, or was written before the cut.
        PlanError: If plan or weights do not fit the model.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"No file at {checkpoint}; expected a Lightning checkpoint in one file. Consolidate a sharded one first."
        )
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise PruningError(
            f"{checkpoint} is damaged, or holds more than plain data; expected a checkpoint as Trainer.save_checkpoint writes it."
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise PruningError(f"{checkpoint} is not a Lightning checkpoint: it has no state_dict.")
    found = [s for s in saved_prunings(content) if s.plan is not None]
    if not found:
        raise PruningError(
            f"{checkpoint} holds no pruning plan: it was written before the cut, or by a run without one."
        )
    if len(found) > 1:
        paths = [s.model_path for s in found]
        found = [s for s in found if s.model_path == name]
        if len(found) != 1:
            raise PruningError(
                f"{checkpoint} holds the plans of several models, {paths}; say which by name, found {name!r}."
            )
    assert found[0].plan is not None
    apply_plan(model, found[0].plan)
    merge_adapters(model, content)
    weights = content["state_dict"]
    wanted = dict(model.state_dict())
    first = next(iter(wanted))
    prefixes = (
        [k.removesuffix(first) for k in weights if k.endswith(first)] if name is None else [f"{name}." if name else ""]
    )
    fitting = [p for p in prefixes if all(p + key in weights for key in wanted)]
    if len(fitting) != 1:
        raise PruningError(
            f"{checkpoint} has {len(fitting)} places with the weights of a {type(model).__name__} (looked at"
            f" {prefixes[:5]}); expected one. Say where it is within the LightningModule by its name."
        )
    for key, tensor in wanted.items():
        if weights[fitting[0] + key].shape != tensor.shape:
            raise PlanError(
                f"{checkpoint}: {fitting[0] + key!r} has shape {tuple(weights[fitting[0] + key].shape)}; the plan in it leaves"
                f" {tuple(tensor.shape)} of the model given. Give the model that the run began with."
            )
    model.load_state_dict({key: weights[fitting[0] + key] for key in wanted})
    return model.eval()


def model_card(
    model: PreTrainedModel, figures: Mapping[str, Mapping[str, float]], *, self_contained: bool = False
) -> str:
    """The README of a saved model: what was cut, how, the figures, and how to load it.

    Args:
        model: The model, as :func:`to_pretrained` gives it.
        figures: Figures by stage and name.
        self_contained: Whether the modelling code lies beside the weights.
    """
    plan = get_plan(model)
    assert plan is not None
    config: Any = model.config
    auto_class = "AutoModelForCausalLM" if model.can_generate() else "AutoModel"
    stock = config.model_type != modeling_pruned.MODEL_TYPE
    before, after = plan.info.get("parameters_before"), count_parameters(model)
    lines = ["---", "library_name: transformers", "tags: [pruned, structured-pruning, lit_prune]"]
    if model.can_generate():
        lines.append("pipeline_tag: text-generation")
    lines += ["---", "", f"# A pruned {config.base_model_type} model", ""]
    removed = f", {1 - after / before:.1%} fewer than before" if before else ""
    what = ["attention heads and MLP channels"] * bool(plan.group_entries) + ["whole blocks"] * bool(plan.blocks)
    lines.append(f"{after:,} parameters{removed}: {' and '.join(what)} were cut out for good with lit_prune.")
    lines += ["", "| group set | of | kept |", "|---|---|---|"]
    lines += [f"| blocks | {e.size} | {len(e.kept)} |" for e in plan.blocks]
    for kind in dict.fromkeys(e.kind for e in plan.group_entries):
        entries = [e for e in plan.entries if e.kind == kind]
        kept = [len(e.kept) for e in entries]
        lines.append(
            f"| {kind}, {len(entries)} layers cut | {max(e.size for e in entries)} | {min(kept)} to {max(kept)}, mean"
            f" {sum(kept) / len(kept):.1f} |"
        )
    for key in ("importance", "pruning_ratio", "ratio_of", "repair", "calibration_batches"):
        if key in plan.info:
            lines += [""] * (key == "importance") + [f"- {key.replace('_', ' ')}: {plan.info[key]}"]
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    if names:
        lines += ["", "| | " + " | ".join(figures) + " |", "|---" * (1 + len(figures)) + "|"]
        for name in names:
            cells = [format_figure(name, values.get(name)) for values in figures.values()]
            lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    lines += ["", "```python"] + ([] if stock or self_contained else ["import lit_prune  # makes the model known"])
    trusted = ", trust_remote_code=True" if self_contained and not stock else ""
    lines += [
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("this folder"{trusted})',
        "```",
        "",
    ]
    return "\n".join(lines)


def _check_self_contained(
    model: PreTrainedModel, base: type[PreTrainedModel], dense_config: PreTrainedConfig, pruning: Mapping[str, Any]
) -> None:
    """Refuse what the code beside the weights cannot rebuild: modules that run on code of lit_prune since the cut.

    Raises:
        UnsupportedModelError: If there is one.
    """
    config: Any = type(dense_config).from_dict(dense_config.to_dict())
    with torch.device("meta"):
        rebuilt = base._from_config(config)
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


def _dense_config(model: nn.Module) -> PreTrainedConfig:
    """A copy of the model's config as it was when the model was dense."""
    config: Any = model.config
    fields = config.to_dict()
    for key in ("pruning", "auto_map", "architectures"):
        fields.pop(key, None)
    model_type = fields.pop("base_model_type", None) or config.model_type
    fields.update(getattr(model, DEPTH_ATTRIBUTE, {}))
    fields.update((getattr(config, "pruning", None) or {}).get("dense", {}))
    fields.pop("model_type", None)
    return CONFIG_MAPPING[model_type].from_dict(fields)


def _pruning_entry(group_sets: list[GroupSet], plan: PruningPlan) -> dict[str, Any]:
    by_key = {s.key: s for s in group_sets}
    groups = []
    for entry in plan.entries:
        group_set = by_key.get(entry.key)
        parameters: dict[str, list[int]] = {}
        for part in () if group_set is None else group_set.slices:
            width = part.index.shape[1]
            dim, before = parameters.get(part.parameter, (part.dim, 0))
            if dim != part.dim:
                raise UnsupportedModelError(f"{part.parameter!r} loses groups of {entry.name!r} along two dimensions.")
            parameters[part.parameter] = [dim, before + width]
        attributes = () if group_set is None else group_set.attributes
        groups.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "layer": entry.layer,
                "size": entry.size,
                "kept": to_ranges(entry.kept),
                "parameters": parameters,
                "attributes": {f"{a.module}.{a.name}": a.per_group for a in attributes},
            }
        )
    info = json.loads(json.dumps(dict(plan.info)))
    return {"digest": plan.digest(), "groups": groups, "biases": list(plan.biases), "info": info}


_WIDTHS = {"attention": ("num_attention_heads", "num_key_value_heads"), "mlp": ("intermediate_size",)}


def _stock_config(
    model: nn.Module,
    base: type[PreTrainedModel],
    dense: PreTrainedConfig,
    plan: PruningPlan,
    shapes: Mapping[str, tuple[int, ...]],
    depth: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]] | None:
    """A stock config with widths and depth of the pruned model and the dense values of what it changes, or ``None``.

    Whether it does is decided by building the model: every parameter has to come out with the shape that it has, and,
    where blocks left, every layer with the settings that it has, some of which may follow from its index.
    """
    fields, changed = dense.to_dict(), dict(depth)
    for kind in dict.fromkeys(e.kind for e in plan.group_entries):
        shares = {(e.size, len(e.kept)) for e in plan.entries if e.kind == kind}
        if len(shares) > 1 or kind not in _WIDTHS:
            return None
        size, kept = shares.pop()
        for name in _WIDTHS[kind]:
            value = getattr(dense, name, None)
            if isinstance(value, int):
                changed[dense.attribute_map.get(name, name)] = value * kept // size
    head_dim = getattr(dense, "head_dim", None)
    if head_dim is not None:
        changed["head_dim"] = head_dim
    try:
        config: Any = type(dense).from_dict({**fields, **changed})
        with torch.device("meta"):
            built = base._from_config(config)
    except Exception:  # a config class may refuse the widths in whatever way it likes
        return None
    if {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} != dict(shapes):
        return None
    if plan.blocks and not _same_settings(built, model):
        return None
    return config, {name: fields[name] for name in changed}


def _same_settings(built: nn.Module, model: nn.Module) -> bool:
    """Whether every module has the numbers and words (widths of windows, scales, kinds of layers) of its counterpart."""
    for (_, a), (_, b) in zip(built.named_modules(), model.named_modules(), strict=True):
        for name in (a.__dict__.keys() & b.__dict__.keys()) - {"training", "gradient_checkpointing"}:
            value = a.__dict__[name]
            if isinstance(value, (int, float, str)) and not name.startswith("_") and value != b.__dict__[name]:
                return False
    return True


def check_replaceable(directory: Path) -> None:
    """Refuse to replace a folder, or a file, that is not a saved model.

    Raises:
        PruningError: If ``directory`` is there, is not empty and holds no model.
    """
    if directory.exists() and (
        not directory.is_dir() or (any(directory.iterdir()) and not (directory / "config.json").exists())
    ):
        raise PruningError(f"{directory} exists and holds no saved model; refusing to replace it.")


@contextmanager
def _replacing_directory(directory: Path) -> Iterator[Path]:
    check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
