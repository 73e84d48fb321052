"""Rows of benchmarks/any_module.py: LitGPT's ``GPT`` with a dozen distinct sets of options, tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from any_module_models import Row, call, cross_entropy
from torch import nn

_VOCABULARY = 96
_SIZES: dict[str, Any] = {
    "block_size": 32,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 8,
    "padded_vocab_size": _VOCABULARY,
    "vocab_size": _VOCABULARY,
    "intermediate_size": 128,
}
_LLAMA: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
}
_GEMMA: dict[str, Any] = {**_LLAMA, "mlp_class_name": "GemmaMLP", "scale_embeddings": True}
_EXPERTS: dict[str, Any] = {
    **_LLAMA,
    "mlp_class_name": "LLaMAMoE",
    "n_expert": 4,
    "n_expert_per_token": 2,
    "moe_intermediate_size": 64,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "pythia": {},
    "falcon (multi-query, shared norm)": {"n_query_groups": 1, "shared_attention_norm": True, "bias": False},
    "stablelm (sequential, partial rotary)": {"parallel_residual": False, "rotary_percentage": 0.5, "bias": False},
    "phi (lm_head bias)": {"lm_head_bias": True, "shared_attention_norm": True, "rotary_percentage": 0.5},
    "llama": _LLAMA,
    "llama (grouped queries)": {**_LLAMA, "n_query_groups": 2},
    "llama (head size of its own)": {**_LLAMA, "n_query_groups": 2, "head_size": 16},
    "qwen2 (attention bias)": {**_LLAMA, "n_query_groups": 4, "attn_bias": True},
    "qwen3 (norms of queries and keys)": {**_LLAMA, "n_query_groups": 2, "norm_qk": True},
    "olmo2 (norms after)": {
        **_LLAMA,
        "norm_qk": True,
        "norm_qk_type": "olmo2",
        "norm_1": False,
        "norm_2": False,
        "post_attention_norm": True,
        "post_mlp_norm": True,
    },
    "gemma": {**_GEMMA, "n_query_groups": 1, "head_size": 16},
    "gemma2 (sliding window, soft caps)": {
        **_GEMMA,
        "n_query_groups": 2,
        "sliding_window_size": 8,
        "sliding_window_indices": [1, 0],
        "attention_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention_scores_scalar": 16,
        "post_attention_norm": True,
        "post_mlp_norm": True,
    },
    "mixtral": {**_EXPERTS, "n_query_groups": 2},
    "mixtral (shared expert, first layer dense)": {**_EXPERTS, "n_shared_expert": 1, "first_k_dense_replace": 1},
}


def _build(options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from litgpt import GPT, Config

        return GPT(Config(**{**_SIZES, **options}))

    return build


def _tokens() -> Any:
    ids = torch.randint(_VOCABULARY, (2, 17))
    return ids[:, :-1], ids[:, 1:]


ROWS = tuple(Row("litgpt", name, _build(o), _tokens, "language", call, cross_entropy) for name, o in _OPTIONS.items())
