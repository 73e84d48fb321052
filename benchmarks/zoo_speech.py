"""Rows of benchmarks/any_module.py: speech encoders of transformers, tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from any_module_models import CLASSES, Row, cross_entropy
from torch import nn

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
    "num_labels": CLASSES,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
_STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}


def _build(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**_SIZES, **options})
        return getattr(transformers, f"{name}ForSequenceClassification")(config)

    return build


def _waves() -> Any:
    return torch.randn(2, 1600), torch.randint(CLASSES, (2,))


def _logits(model: Any, batch: Any) -> Any:
    return model(input_values=batch[0]).logits


_MODELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("wav2vec2", "Wav2Vec2", {}),
    ("wav2vec2, layer norms first", "Wav2Vec2", _STABLE),
    ("HuBERT", "Hubert", {}),
    ("HuBERT, layer norms first", "Hubert", _STABLE),
    ("WavLM", "WavLM", {"intermediate_size": 256}),
)
ROWS = tuple(
    Row("speech", label, _build(name, options), _waves, "speech", _logits, cross_entropy)
    for label, name, options in _MODELS
)
