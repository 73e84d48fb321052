"""Loading a pruned model: damaged files are found before the weights are read, and none of their code is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from lit_prune import modeling_pruned
from lit_prune._files import read_json
from lit_prune.architectures import find_group_sets
from lit_prune.arguments import PATH, shown
from lit_prune.errors import ArgumentValueError, PlanError, PruningError, UnsupportedModelError
from lit_prune.io import auto_config, hub
from lit_prune.io.litgpt_folder import is_litgpt_folder, load_litgpt
from lit_prune.io.manifest import MANIFEST, verify_weights
from lit_prune.io.module_folder import floating_dtype, is_module_folder, load_module
from lit_prune.io.output_folder import leftover
from lit_prune.modeling_pruned import (
    HUB_OPTIONS,
    PrunedConfig,
    PrunedModelError,
    PrunedPlanError,
    check_dtype,
    model_class,
    same_in_all_layers,
    weight_files,
    weight_headers,
)
from lit_prune.plan import get_plan, plan_from_config, set_plan
from lit_prune.surgery.apply import cut_as_saved
from lit_prune.surgery.saving import save_plainly

# how the classes of transformers refuse a config
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError)


def _build(model: PreTrainedModel, pruning: Any) -> None:
    """Cut a freshly built dense model by its config's plan, with the engine that cut the one that was saved."""
    del pruning
    try:
        plan = plan_from_config(model.config)
        assert plan is not None
        set_plan(model, None)
        cut_as_saved(model, plan.renamed(lambda name: modeling_pruned.local_name(model, name)))
        # its config says what was cut
        save_plainly(model)
    except PruningError as error:
        raise PrunedPlanError(str(error)) from error


modeling_pruned.build = _build
AutoConfig.register(modeling_pruned.MODEL_TYPE, PrunedConfig, exist_ok=True)
auto_config.install()
hub.install()


def load_pruned(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    dtype: torch.dtype | str = "auto",
    verify: bool = False,
    **options: Any,
) -> Any:
    """Load a model that :func:`lit_prune.save_pruned` wrote.

    A transformers model loads as the class that it was saved as. Of any other the code is yours: ``model`` is cut by the
    plan of the folder, and the weights are loaded into it, all of them.

    ``AutoModelForCausalLM.from_pretrained`` and its likes load transformers models, too, after ``import lit_prune``. Code that
    lies beside the weights is never run.

    Args:
        directory: The folder, or the name of a repository on the hub.
        model: For what is no transformers model: the dense module, built as the one that was pruned, or a function that builds
            it (its class). It is changed in place; an error leaves it as it was.
        dtype: Data type of the weights; that of the files if ``"auto"``.
        verify: Compare the SHA-256 of the weights with what was noted when they were saved, before they are read.
        options: What ``from_pretrained`` of transformers takes: ``device_map``, ``attn_implementation``, ``token``... For other
            models, only what says where files come from: ``revision``, ``cache_dir``, ``subfolder``, ``token``...

    Returns:
        The pruned model, in eval mode. :func:`lit_prune.get_plan` gives its plan.

    Raises:
        ArgumentTypeError: If ``directory`` is no path.
        ArgumentValueError: If ``model`` is missing, or given for a transformers or LitGPT model, or ``dtype`` is unknown.
        FileNotFoundError: If the folder or a file is missing.
        PlanError: If the plan was changed, or does not fit the weights or ``model``.
        PruningError: If files are damaged, weights are missing, unknown, not floating or not finite, the model was not
            pruned, or ``verify`` finds other weights than were saved.
        UnsupportedModelError: If the model's class or type is unknown, or quantisation is asked for.

    Example::

        model = lit_prune.load_pruned("outputs/pruned", model=MyNet)
    """
    folder = PATH.check("directory", directory) / (options.get("subfolder") or "")
    dtype = _dtype(dtype, options)
    if is_litgpt_folder(folder):
        if found := sorted(options) + ["model"] * (model is not None):
            raise ArgumentValueError(
                f"{directory} holds a model of LitGPT, for which load_pruned takes dtype and verify; found {found}."
            )
        return load_litgpt(folder, dtype=dtype, verify=verify)
    _check_folder(folder)
    options.pop("trust_remote_code", None)
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    try:
        file = Path(str(cached_file(directory, "config.json", **hub)))
        if is_module_folder(read_json(file)):
            _check_options(directory, options.keys() - hub.keys())
            return load_module(str(directory), file, model, dtype=dtype, verify=verify, hub=hub)
        if model is not None:
            raise ArgumentValueError(
                f"{directory} holds a transformers model, which is built from its config; found model={shown(model)}. Leave it"
                " out."
            )
        fields = _checked_fields(directory, file)
        files = weight_files(directory, **hub)
        headers = weight_headers(directory, files)
        if verify:
            cached_file(directory, MANIFEST, _raise_exceptions_for_missing_entries=False, **hub)
            verify_weights(file.parent)
        config: Any = _config(directory, hub)
        _check_pruned(directory, fields, config, headers)
        base = model_class(config.architectures, type(config))
        if base is None:
            raise UnsupportedModelError(
                f"{directory}/config.json names no model class; expected one in 'architectures'."
            )
        pruned = isinstance(config, PrunedConfig)
        cls = modeling_pruned.pruned_model_class(base, config.base_model_type) if pruned else base
        _check_shapes(directory, cls, config, headers)
        load: Any = cls.from_pretrained if pruned else partial(modeling_pruned.load_whole, cls.from_pretrained)
        loaded = load(directory, config=config, dtype=dtype, **options)
    except PrunedPlanError as error:
        raise PlanError(str(error)) from error
    except PrunedModelError as error:
        raise PruningError(f"{directory}: {error}") from error
    except NotImplementedError as error:
        raise UnsupportedModelError(str(error)) from error
    except OSError as error:
        raise FileNotFoundError(str(error)) from error
    _check_plan(directory, loaded[0] if options.get("output_loading_info") else loaded)
    return loaded


def _dtype(dtype: Any, options: dict[str, Any]) -> Any:
    """The data type asked for, which transformers also calls ``torch_dtype``; that is taken out of the options.

    Raises:
        ArgumentValueError: If both are given, or a name is not that of a floating type.
    """
    older = options.pop("torch_dtype", None)
    if older is not None and dtype != "auto":
        raise ArgumentValueError(f"dtype and torch_dtype are two names of one argument; found {dtype!r} and {older!r}.")
    found = dtype if older is None else older
    return floating_dtype(found) if isinstance(found, str) else found


def _check_options(directory: str | os.PathLike[str], options: Collection[str]) -> None:
    """Refuse options that only mean something for transformers models.

    Raises:
        ArgumentValueError: Naming one.
    """
    if options:
        raise ArgumentValueError(
            f"{directory} holds no transformers model, for which load_pruned takes no {sorted(options)[0]!r}: move the loaded"
            " model where it is to run."
        )


def _check_folder(directory: Path) -> None:
    """Refuse a local folder that is missing, or that no model was saved to.

    Raises:
        FileNotFoundError: If the folder or its ``config.json`` is missing.
        PruningError: If it is a file.
    """
    if directory.is_file():
        raise PruningError(f"{directory} is a file; expected the folder that lit_prune.save_pruned wrote.")
    if (old := leftover(directory)) is not None:
        raise FileNotFoundError(
            f"There is no folder {directory}: a process was killed while it replaced it. What was there is whole, in {old};"
            " rename it, or save again, which puts it back first."
        )
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json; expected a folder written by lit_prune.save_pruned.")


def _checked_fields(directory: str | os.PathLike[str], file: Path) -> Mapping[str, Any]:
    """What a ``config.json`` holds.

    Raises:
        PruningError: If it is not a JSON object, or has no known data type.
        UnsupportedModelError: If transformers does not know the type of model.
    """
    fields = read_json(file)
    if not isinstance(fields, Mapping):
        raise PruningError(f"{file} is damaged: expected a JSON object; found {type(fields).__name__}.")
    check_dtype(fields)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in modeling_pruned.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{directory}/config.json has model_type {kind!r}, which transformers {transformers.__version__} does not know;"
            " expected that of a folder written by lit_prune.save_pruned. Code from the folder is not run."
        )
    return fields


def _config(directory: str | os.PathLike[str], hub: Mapping[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, **hub)
    except PrunedModelError:
        raise
    except _REFUSALS as error:
        raise PruningError(
            f"{directory}/config.json is damaged: transformers {transformers.__version__} refuses it:"
            f" {type(error).__name__}: {error}."
        ) from error


def _check_pruned(
    directory: str | os.PathLike[str],
    fields: Mapping[str, Any],
    config: Any,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Refuse a model without a plan, and say how that came about.

    Raises:
        PruningError: If there is none.
    """
    if isinstance(fields.get("pruning"), Mapping):
        return
    found = f"{directory}/config.json has no pruning entry"
    base = model_class(config.architectures, type(config))
    if base is not None and (different := _other_shape(base, config, headers)) is not None:
        name, expected = different
        raise PruningError(
            f"{found}, and the weights do not fit it: {name!r} has shape {headers[name][1]}, and the config says {expected}."
            " Was a pruned model saved by its own save_pretrained? That writes no plan, and no program can load the folder."
            " Save the model again with lit_prune.save_pruned, or convert a checkpoint of the run with lit-prune convert."
        )
    raise PruningError(
        f"{found}: it is the config of a {config.model_type!r} model that was not pruned by lit_prune. Load it with"
        " transformers."
    )


def _other_shape(
    cls: type[PreTrainedModel], config: Any, headers: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[str, tuple[int, ...]] | None:
    """A weight with another shape than the model that the config describes has, and the shape that it has there.

    Raises:
        PruningError: If no model can be built from the config.
    """
    try:
        with torch.device("meta"):
            # without a plan, what it says of single layers was not written by us
            built = cls._from_config(config if isinstance(config, PrunedConfig) else same_in_all_layers(config))
    except (PrunedModelError, PruningError):
        raise
    except _REFUSALS as error:
        raise PruningError(
            f"config.json is damaged: no {cls.__name__} can be built from it: {type(error).__name__}: {error}."
        ) from error
    for name, tensor in built.state_dict().items():
        if name in headers and headers[name][1] != tuple(tensor.shape):
            return name, tuple(tensor.shape)
    return None


def _check_shapes(
    directory: str | os.PathLike[str],
    cls: type[PreTrainedModel],
    config: Any,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Refuse weights that do not fit the plan.

    Raises:
        PlanError: If one has another shape.
    """
    if (different := _other_shape(cls, config, headers)) is not None:
        name, expected = different
        raise PlanError(
            f"The weights in {directory} do not fit the plan in its config.json: {name!r} has shape {headers[name][1]};"
            f" expected {expected}."
        )


def _check_plan(directory: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Refuse a model that has other groups than its plan keeps.

    Raises:
        PlanError: If it does.
    """
    plan = get_plan(model)
    assert plan is not None
    kept = {key: len(e.kept) for key, e in plan.entries_after().items()}
    for group_set in find_group_sets(model):
        if group_set.size != kept.get(group_set.key, group_set.size):
            raise PlanError(
                f"The weights in {directory} do not fit the plan in its config.json: {group_set.name!r} ({group_set.kind})"
                f" has {group_set.size} groups; the plan keeps {kept[group_set.key]}."
            )
