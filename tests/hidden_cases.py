"""Models whose hidden size is pruned, and what they are compared with: the dense model, masked by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import SMALL, tiny, unsettled
from lit_prune import PruningPlan, find_group_sets
from lit_prune.groups import HIDDEN

# the family, and how many channels of 32 stay
HEADS = {"head_dim": 8}
ENCODER = {k: v for k, v in SMALL.items() if not k.startswith(("num_key_value", "bos", "eos", "pad"))}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["bert"](**ENCODER, **NO_DROPOUT, **overrides)
    return unsettled(AutoModelForMaskedLM.from_config(config))


def vit(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = CONFIG_MAPPING["vit"](**sizes, **NO_DROPOUT, image_size=8, patch_size=4, num_labels=3, **overrides)
    return unsettled(AutoModelForImageClassification.from_config(config))


def untied(name: str, **overrides: Any) -> nn.Module:
    return tiny(name, tie_word_embeddings=False, **overrides)


MODELS = {
    "llama": lambda: tiny("llama", tie_word_embeddings=False),
    "llama-tied": lambda: tiny("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: tiny("qwen2"),
    "qwen3": lambda: tiny("qwen3", **HEADS),
    "gemma": lambda: tiny("gemma", **HEADS),
    "gemma2": lambda: tiny("gemma2", "eager", **HEADS),
    "gemma3_text": lambda: tiny("gemma3_text", **HEADS),
    "olmo2": lambda: tiny("olmo2"),
    "phi3": lambda: tiny("phi3"),
    "gpt2": lambda: tiny("gpt2", hidden_size=32),
    "bert": bert,
    "vit": vit,
}


def inputs(model: nn.Module, seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "patch_size"):
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(1, 64, (batch, 10), generator=generator)}


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    return model(**inputs(model, seed)).logits


class MaskedNorm(nn.Module):
    """A norm of some channels of its input alone, by its formula; the others stay zero."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.eps = next(getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n))
        self.bias = getattr(norm, "bias", None)
        self.centred = isinstance(norm, nn.LayerNorm)
        self.scale = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
        self.mask = torch.zeros_like(norm.weight)
        self.mask[kept] = 1

    def forward(self, x: Tensor) -> Tensor:
        count = self.mask.sum()
        if self.centred:
            x = x - (x * self.mask).sum(-1, keepdim=True) / count
        mean_square = (x.square() * self.mask).sum(-1, keepdim=True) / count
        normed = x * torch.rsqrt(mean_square + self.eps) * self.scale
        return (normed if self.bias is None else normed + self.bias) * self.mask


def masked_by_hand(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of full size that computes what the narrower model does.

    All weights that hold removed channels are zero, and a norm over hidden channels, recognised by its width, counts the
    kept ones alone, as a narrower norm does.
    """
    model = copy.deepcopy(model)
    channels = find_group_sets(model, hidden=True)[0]
    removed = sorted(set(range(channels.size)) - set(kept))
    inside = {p.module for s in find_group_sets(model) for p in s.slices}
    with torch.no_grad():
        for part in channels.slices:
            model.get_parameter(part.parameter).index_fill_(part.dim, torch.tensor(removed), 0.0)
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        is_norm = "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.shape == (channels.size,)
        if is_norm and name not in inside:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, MaskedNorm(module, torch.tensor(list(kept))))
    return model


def hidden_plan(model: nn.Module, kept: Sequence[int], others: Sequence[Sequence[int]] | None = None) -> PruningPlan:
    group_sets = find_group_sets(model, hidden=True)
    assert group_sets[0].kind == HIDDEN
    rest = [range(s.size) for s in group_sets[1:]] if others is None else others
    return PruningPlan.from_kept(group_sets, [list(kept), *map(list, rest)])


def some(size: int, count: int, seed: int = 3) -> list[int]:
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist())
