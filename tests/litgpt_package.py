"""LitGPT from ``.venv/models``, where packages lie that the environment must not install as a whole.

``torchvision`` lies there, too, built for another torch: the folder is on the path only while litgpt is imported, and after
Lightning, which would import torchvision if it found it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401
import pytest
import torch
from local_assets import write_tokenizer
from torch import nn

from conftest import unsettled

FOLDER = Path(__file__).parent.parent / ".venv" / "models"


def import_litgpt() -> Any:
    """The package; the test module is skipped where there is none."""
    sys.path.append(str(FOLDER))
    try:
        return pytest.importorskip("litgpt")
    finally:
        sys.path.remove(str(FOLDER))


VOCABULARY = 64


def shrunk(config: Any, n_layer: int = 2) -> Any:
    """A tiny config with the options of a config of LitGPT: its norms, biases, kinds of attention and MLP, windows.

    Heads keep sharing keys and values as before if they did: one of several, or all of them one.
    """
    fields = {
        "n_layer": n_layer,
        "n_embd": 32,
        "n_head": 8,
        "head_size": 8,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": VOCABULARY,
        "block_size": 64,
        "intermediate_size": 24,
    }
    shared = config.n_query_groups
    fields["n_query_groups"] = 8 if shared == config.n_head else 1 if shared == 1 else 4
    for name in ("sliding_window_indices", "rope_indices"):
        if (layers := getattr(config, name)) is not None:
            # of the two kinds of layer one each
            fields[name] = ([0, 1] if len(set(layers)) == 2 else list(layers))[:n_layer] + [layers[0]] * (n_layer - 2)
    if config.sliding_window_size is not None:
        fields["sliding_window_size"] = 4
    if config.latent_attention is not None:
        ranks = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
        fields["latent_attention"] = ranks
    if config.n_expert:
        fields.update(n_expert=4, n_expert_per_token=2, moe_intermediate_size=12)
        if config.n_expert_groups:
            fields.update(n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
    if config.first_k_dense_replace is not None:
        fields["first_k_dense_replace"] = 1
    return replace(config, **fields)


def gpt(config: Any, seed: int = 0) -> nn.Module:
    """A random model of a config with every weight, bias and norm away from its initial constant, in eval mode."""
    torch.manual_seed(seed)
    model = import_litgpt().GPT(config)
    model.apply(model._init_weights)
    return unsettled(model)


def named(name: str, n_layer: int = 2, **fields: Any) -> nn.Module:
    """A tiny random model with the options of LitGPT's config of a name."""
    config = shrunk(import_litgpt().Config.from_name(name), n_layer)
    return gpt(replace(config, **fields))


def ids(seed: int = 0, batch: int = 2, tokens: int = 10) -> torch.Tensor:
    """Random token ids, shape ``(batch, tokens)``."""
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def write_folder(folder: Path) -> Path:
    """A LitGPT checkpoint folder with a tiny random model and a tokenizer."""
    import_litgpt()
    from litgpt.utils import save_config

    write_tokenizer(folder)
    model = named("Llama-3.2-1B")
    torch.save(model.state_dict(), folder / "lit_model.pth")
    save_config(model.config, folder)
    return folder
