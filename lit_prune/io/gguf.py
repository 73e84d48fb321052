"""Writing a pruned model as a GGUF file that unmodified llama.cpp runs, layers of different widths included.

llama.cpp's architecture ``deci`` takes head counts, key/value head counts and feed-forward lengths as arrays, a number a
layer. Everything else about it is a Llama layer, so the families that compute one can be written: see
:data:`lit_prune.architectures.families.gguf.DECI_MODEL_TYPES`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune._files import check_writable, replacing
from lit_prune.architectures.families.gguf import DECI_MODEL_TYPES
from lit_prune.errors import PruningError, UnsupportedModelError
from lit_prune.extras import missing

if TYPE_CHECKING:
    import gguf

ARCHITECTURE = "deci"
DTYPES = ("f32", "f16", "q8_0")
_BLOCK = 32  # q8_0 quantises so many neighbours of a row together

_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PARAMETER = re.compile(r"(?:model\.)?(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")

# what llama.cpp calls the ways in which byte-level BPE tokenizers split text first, by the splitting that tokenizer.json holds
_SPLITS: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "ByteLevel",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "ByteLevel",
    ): "qwen2",
}


def save_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    dtype: str = "f16",
    pre_tokenizer: str | None = None,
    name: str | None = None,
) -> Path:
    """Write a model as GGUF for llama.cpp.

    Args:
        model: A causal language model of transformers, pruned or not.
        path: The file.
        tokenizer: Its fast tokenizer (byte-level BPE), or the path of a GGUF file of the dense model to copy the
            vocabulary from.
        dtype: How matrices are stored, ``"f32"``, ``"f16"`` or ``"q8_0"``; norms and biases are float32. With ``q8_0``, MLPs
            are filled up with channels of zeros to a multiple of 32, and matrices whose rows are no multiple of 32 are f16.
        pre_tokenizer: llama.cpp's name for the way the tokenizer splits text first (``tokenizer.ggml.pre``); read from
            the tokenizer if ``None``.
        name: What the file says the model is called.

    Returns:
        The path.

    Raises:
        UnsupportedModelError: If llama.cpp cannot compute the model as transformers does, or the tokenizer cannot be
            expressed; the message says what stands in the way.
        PruningError: If ``path`` is a folder or a file that is not GGUF, or cannot be written; before any work.
        ValueError: If ``dtype`` is unknown, or a weight does not fit into float16.
        MissingPackageError: If the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise missing("gguf", "gguf", "Writing GGUF") from error
    if dtype not in DTYPES:
        raise ValueError(f"Unknown GGUF type {dtype!r}; expected one of {', '.join(DTYPES)}.")
    check_output(path)
    tensors = _tensors(model, pad_to=_BLOCK if dtype == "q8_0" else 1)
    vocabulary = _vocabulary(model, tokenizer, pre_tokenizer)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        _write_shape(writer, model, tensors, name or Path(path).stem)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[dtype])
        for key, value, kind, sub_type in vocabulary:
            writer.add_key_value(key, value, kind, sub_type)
        stored = {key: _stored(shape, dtype) for key, (shape, _) in tensors.items()}
        for key, (shape, _) in tensors.items():
            kind = stored[key]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            in_bytes = (*shape[:-1], shape[-1] // block * size) if kind == gguf.GGMLQuantizationType.Q8_0 else shape
            like = {0: np.float32, 1: np.float16}.get(int(kind), np.uint8)
            writer.add_tensor_info(key, in_bytes, np.dtype(like), int(np.prod(shape)) // block * size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, (_, values) in tensors.items():
            array = values().detach().to(torch.float32).cpu().contiguous().numpy()
            if int(stored[key]) == 1 and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
                raise ValueError(f"{key} holds {np.abs(array).max():g}, too much for float16. Export as f32.")
            writer.write_tensor_data(gguf.quants.quantize(array, stored[key]))
        writer.close()
    return Path(path)


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise an error unless a GGUF file can be written here without losing anything else.

    Raises:
        PruningError: If ``path`` is a folder, a file that is not GGUF, or cannot be written.
    """
    check_writable(path, file=True)
    file = Path(path)
    if file.is_file() and file.stat().st_size:
        with file.open("rb") as content:
            if content.read(4) != b"GGUF":
                raise PruningError(f"{path} is there and is no GGUF file; refusing to replace it. Name another file.")


def _stored(shape: tuple[int, ...], dtype: str) -> gguf.GGMLQuantizationType:
    from gguf import GGMLQuantizationType as Kind

    if len(shape) == 1 or dtype == "f32":
        return Kind.F32
    return Kind.Q8_0 if dtype == "q8_0" and shape[-1] % _BLOCK == 0 else Kind.F16


_Tensors = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def _tensors(model: nn.Module, pad_to: int) -> _Tensors:
    """By GGUF name, shape and a function that gives the values; a matrix has shape ``(out_features, in_features)``."""
    config: Any = getattr(model, "config", None)
    _check(model, config)
    tensors: _Tensors = {}
    for parameter, value in model.named_parameters():
        match = _PARAMETER.fullmatch(parameter)
        if match is None or match["module"] not in _NAMES:
            raise UnsupportedModelError(
                f"llama.cpp's architecture {ARCHITECTURE!r} has no place for {parameter!r} of shape {tuple(value.shape)}: the"
                f" model cannot be written as GGUF. It takes {', '.join(_NAMES)}."
            )
        layer, module, kind = match["layer"], match["module"], match["kind"]
        name = f"{'' if layer is None else f'blk.{layer}.'}{_NAMES[module]}.{kind}"
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensors[name] = (tuple(value.shape), lambda v=value: _interleaved(v, config.head_dim))  # type: ignore[misc]
        elif module.startswith("mlp."):
            # llama.cpp skips the attention, too, of a layer without MLP
            dim = 1 if module == "mlp.down_proj" and kind == "weight" else 0
            length = value.shape[dim]
            fills = not (module == "mlp.down_proj" and kind == "bias")
            wanted = max(pad_to, -(-length // pad_to) * pad_to, 1) if fills else length
            shape = tuple(wanted if d == dim and fills else s for d, s in enumerate(value.shape))
            tensors[name] = (shape, lambda v=value, d=dim, n=wanted: _filled_up(v, d, n))  # type: ignore[misc]
        else:
            tensors[name] = (tuple(value.shape), lambda v=value: v)  # type: ignore[misc]
    factors = _rope_factors(model, config)
    if factors is not None:
        tensors["rope_freqs.weight"] = (tuple(factors.shape), lambda: factors)
    return tensors


def _interleaved(value: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection from transformers' order (halves of a head rotate together) to llama.cpp's (neighbours)."""
    return value.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _filled_up(value: Tensor, dim: int, length: int) -> Tensor:
    shape = list(value.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([value, value.new_zeros(shape)], dim)


def _check(model: nn.Module, config: Any) -> None:
    model_type = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    if model_type not in DECI_MODEL_TYPES:
        raise UnsupportedModelError(
            f"{type(model).__name__} is of the type {model_type!r}; llama.cpp runs layers of different widths only for what its"
            f" architecture {ARCHITECTURE!r} computes: {', '.join(DECI_MODEL_TYPES)}."
        )
    if not hasattr(model, "lm_head"):
        raise UnsupportedModelError(f"{type(model).__name__} has no lm_head; expected a causal language model.")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise UnsupportedModelError(
            f"The model attends to a sliding window of {window} tokens, which llama.cpp's architecture {ARCHITECTURE!r} does"
            " not. Set config.sliding_window = None if the contexts to come are shorter."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"The MLP's activation is {config.hidden_act!r}; {ARCHITECTURE!r} has SiLU.")


def _rope(model: nn.Module) -> Any:
    return next(m for n, m in model.named_modules() if n.rpartition(".")[2] == "rotary_emb")


def _theta(config: Any) -> float:
    return float(config.rope_parameters["rope_theta"])


def _rope_factors(model: nn.Module, config: Any) -> Tensor | None:
    """What divides each rotary frequency, shape ``(head_dim / 2,)``; ``None`` if nothing does."""
    rope, head_dim = _rope(model), config.head_dim
    kind = config.rope_parameters.get("rope_type", "default")
    plain = _theta(config) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind in ("dynamic", "longrope") or float(rope.attention_scaling) != 1 or len(rope.inv_freq) != len(plain):
        raise UnsupportedModelError(
            f"The model's rotary positions (rope_type {kind!r}) change with the context, scale the attention or leave a part of"
            f" the head alone; llama.cpp's architecture {ARCHITECTURE!r} can be given frequencies alone."
        )
    factors = plain / rope.inv_freq.double().cpu()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def _write_shape(writer: gguf.GGUFWriter, model: nn.Module, tensors: _Tensors, name: str) -> None:
    config: Any = model.config
    layers, head_dim = config.num_hidden_layers, config.head_dim
    writer.add_name(name)
    writer.add_type("model")
    writer.add_vocab_size(tensors["token_embd.weight"][0][0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(tensors["token_embd.weight"][0][1])
    writer.add_block_count(layers)
    for add, part in (
        (writer.add_head_count, "attn_q"),
        (writer.add_head_count_kv, "attn_k"),
        (writer.add_feed_forward_length, "ffn_up"),
    ):
        rows = [tensors[f"blk.{layer}.{part}.weight"][0][0] for layer in range(layers)]
        add([r if part == "ffn_up" else r // head_dim for r in rows])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(2)


def _vocabulary(model: nn.Module, tokenizer: Any, pre_tokenizer: str | None) -> list[tuple[str, Any, Any, Any]]:
    """The metadata under ``tokenizer.``: key, value, type and, for arrays, type of the elements."""
    from gguf import GGUFValueType as Kind

    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if isinstance(tokenizer, (str, os.PathLike)):
        return list(_copied_vocabulary(Path(tokenizer), size))
    entries = _converted_vocabulary(tokenizer, size, pre_tokenizer)
    kinds = {str: Kind.STRING, bool: Kind.BOOL, int: Kind.UINT32}
    result: list[tuple[str, Any, Any, Any]] = []
    for key, value in entries.items():
        if isinstance(value, list):
            element = Kind.STRING if value and isinstance(value[0], str) else Kind.INT32
            if value:
                result.append((key, value, Kind.ARRAY, element))
        else:
            result.append((key, value, kinds[type(value)], None))
    return result


def _copied_vocabulary(path: Path, size: int) -> Iterator[tuple[str, Any, Any, Any]]:
    from gguf import GGUFReader

    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}; expected a GGUF file to copy the vocabulary from.")
    fields = GGUFReader(path).fields
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None or len(tokens.data) != size:
        raise UnsupportedModelError(
            f"{path} has {0 if tokens is None else len(tokens.data)} tokens; the model's embedding has {size}."
        )
    for key, item in fields.items():
        if key.startswith("tokenizer."):
            yield key, item.contents(), item.types[0], item.types[1] if len(item.types) > 1 else None


def _converted_vocabulary(tokenizer: Any, size: int, pre_tokenizer: str | None) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Mapping[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = content.get("model", {}).get("type")
    if kind != "BPE" or content["model"].get("byte_fallback"):
        raise UnsupportedModelError(
            f"The tokenizer ({type(tokenizer).__name__}) is a {kind or 'slow'} model; only byte-level BPE is converted. Give the"
            " GGUF file of the dense model as the tokenizer, and its vocabulary is copied."
        )
    pre = pre_tokenizer or _SPLITS.get(_splits(content.get("pre_tokenizer")))
    if pre is None:
        raise UnsupportedModelError(
            f"llama.cpp's name for how this tokenizer splits text is not known: {content.get('pre_tokenizer')}. Give it as"
            " pre_tokenizer, or the GGUF file of the dense model as the tokenizer."
        )
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise UnsupportedModelError(
            f"The tokenizer has the token id {max(ids.values())}; the embedding has {size} rows."
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [5] * size  # unused
    added = tokenizer.added_tokens_decoder
    for token, index in ids.items():
        tokens[index] = token
        types[index] = 1 if index not in added else 3 if added[index].special else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    for key, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (index := getattr(tokenizer, f"{attribute}_token_id")) is not None:
            entries[f"tokenizer.ggml.{key}_token_id"] = index
    encoded = tokenizer("a")["input_ids"]
    entries["tokenizer.ggml.add_bos_token"] = bool(encoded) and encoded[0] == tokenizer.bos_token_id
    if tokenizer.chat_template:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _splits(pre_tokenizer: Any) -> tuple[str, ...]:
    if not pre_tokenizer:
        return ()
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return tuple(p["pattern"].get("Regex", "") if p["type"] == "Split" else p["type"] for p in parts)
