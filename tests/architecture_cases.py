"""The architectures of the conformance suite, as data: a new one is one more :class:`Case` in :data:`CASES`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from own_models import MyGPT, MyResNet, MySharedGPT, TextClassifier, Translator
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import SMALL, unsettled, zeroed
from lit_prune.groups import GroupSet

VOCABULARY = SMALL["vocab_size"]
ENCODER = {k: v for k, v in SMALL.items() if not k.startswith(("num_key_value", "bos", "eos", "pad"))}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def random_ids(seed: int, batch: int = 2, tokens: int = 10) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def causal_batch(seed: int) -> dict[str, Tensor]:
    ids = random_ids(seed)
    return {"input_ids": ids, "labels": ids}


def classified_batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": random_ids(seed), "labels": torch.tensor([seed % 3, (seed + 1) % 3])}


def tagged_batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": random_ids(seed), "labels": random_ids(seed + 100) % 3}


def image_batch(seed: int) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": torch.tensor([seed % 3, (seed + 1) % 3])}


def translated_batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": random_ids(seed), "labels": random_ids(seed + 100, tokens=7)}


@contextlib.contextmanager
def nothing(model: nn.Module, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """Zeros are all it takes to make the dense model compute what the pruned one does."""
    yield


class _NormOverKept(nn.Module):
    """A root-mean-square norm that counts only some features."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.eps, self.kept = norm.weight, norm.variance_epsilon, kept

    def forward(self, x: Tensor) -> Tensor:
        mean = x[..., self.kept].float().square().sum(-1, keepdim=True) / max(len(self.kept), 1)
        return (self.weight * (x.float() * torch.rsqrt(mean + self.eps))).to(x.dtype)


@contextlib.contextmanager
def norms_over_kept(model: nn.Module, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """Norms over all heads do not count those that left."""
    for group_set, keep in zip(group_sets, kept, strict=True):
        for part in group_set.slices:
            owner, _, last = part.module.rpartition(".")
            if last in ("q_norm", "k_norm"):
                setattr(
                    model.get_submodule(owner),
                    last,
                    _NormOverKept(model.get_submodule(part.module), part.index[list(keep)].flatten()),
                )
    yield


class _MaskedRouters(TorchFunctionMode):
    """Routers give minus infinity to experts that left."""

    def __init__(self, removed: dict[int, Tensor]) -> None:
        super().__init__()
        self.removed = removed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is functional.linear and id(args[1]) in self.removed:
            return result.masked_fill(self.removed[id(args[1])], float("-inf"))
        return result


@contextlib.contextmanager
def routers_over_kept(
    model: nn.Module, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]]
) -> Iterator[None]:
    """No token goes to an expert that left."""
    removed = {}
    for group_set, keep in zip(group_sets, kept, strict=True):
        if group_set.kind == "expert":
            mask = torch.ones(group_set.size, dtype=torch.bool)
            mask[list(keep)] = False
            for part in group_set.slices:
                if part.parameter.endswith(("gate.weight", "router.weight")):
                    removed[id(model.get_parameter(part.parameter))] = mask
    with _MaskedRouters(removed):
        yield


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        name: What the table calls it.
        model: Builds a tiny random model for an attention implementation.
        batch: Gives the keyword arguments of a forward for a seed, with labels.
        generates: Whether the model generates text.
        saves: Whether ``save_pruned`` and ``load_pruned`` are for it (they are for transformers models); the others are
            rebuilt from plan and state_dict.
        attentions: The attention implementations to compare with the dense model.
        absent: What else the dense model needs to compute as the pruned one does, besides zeros.
        notes: For the table.
        kinds: The kinds of groups that it has.
        refits: Whether least-squares repair refits its blocks.
        blocks: Whether whole blocks may leave.
    """

    name: str
    model: Callable[[str], nn.Module]
    batch: Callable[[int], dict[str, Tensor]] = causal_batch
    generates: bool = True
    saves: bool = True
    attentions: tuple[str, ...] = ("eager", "sdpa")
    absent: Callable[..., contextlib.AbstractContextManager[None]] = nothing
    notes: str = ""
    kinds: tuple[str, ...] = ("attention", "mlp")
    refits: bool = True
    blocks: bool = True

    def build(self, attention: str | None = None) -> nn.Module:
        """The model, the same at every call."""
        torch.manual_seed(0)
        return unsettled(self.model(attention or self.attentions[-1]))

    @contextlib.contextmanager
    def oracle(
        self, model: nn.Module, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]]
    ) -> Iterator[nn.Module]:
        """A dense model that computes what the pruned one should, made by nobody's surgery."""
        dense = zeroed(model, kept)
        with self.absent(dense, group_sets, kept):
            yield dense


def output_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the model gives before its loss."""
    result = model(**batch)
    return result.logits if hasattr(result, "logits") else result[0]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch."""
    result = model(**batch)
    return result.loss if hasattr(result, "loss") else result[1]


def hugging(
    model_type: str, auto: str = "AutoModelForCausalLM", base: dict[str, Any] = SMALL, **overrides: Any
) -> Callable[[str], nn.Module]:
    """A transformers model from its config's defaults, made tiny."""

    def build(attention: str) -> nn.Module:
        config = CONFIG_MAPPING[model_type](**{**base, **overrides})
        return getattr(transformers, auto).from_config(config, attn_implementation=attention)

    return build


def encoder(model_type: str, auto: str, **overrides: Any) -> Callable[[str], nn.Module]:
    return hugging(model_type, auto, ENCODER, **{**NO_DROPOUT, **overrides})


class Classifier(pl.LightningModule):
    """A task head of transformers, nested in a LightningModule as a user has it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **batch: Tensor) -> Any:
        return self.network(**batch)


GPT2_SMALL = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 24,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
OPT_SMALL = {"ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": 32, "num_attention_heads": 4}
FALCON_SMALL = {"alibi": False, "num_attention_heads": 4, "num_kv_heads": None, "ffn_hidden_size": 24}
T5_SMALL = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE_SMALL = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "head_dim": 6}
VIT_SMALL = {"image_size": 8, "patch_size": 4, "num_labels": 3, "num_attention_heads": 4}

CASES = (
    Case("Llama", hugging("llama"), notes="grouped-query attention"),
    Case("Llama, multi-head", hugging("llama", num_key_value_heads=8)),
    Case(
        "Llama, multi-query",
        hugging("llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=6),
        notes="biases; head_dim ≠ hidden / heads; query heads are the groups",
        kinds=("query_head", "mlp"),
    ),
    Case("Llama, tied embeddings", hugging("llama", tie_word_embeddings=True)),
    Case("Mistral", hugging("mistral", sliding_window=4), notes="sliding window"),
    Case("Qwen2", hugging("qwen2"), notes="biases of queries, keys and values"),
    Case(
        "Qwen2, mixed layers",
        hugging("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        notes="full and sliding attention mixed",
    ),
    Case("Qwen3", hugging("qwen3", head_dim=6), notes="norms of queries and keys"),
    Case("Gemma", hugging("gemma", head_dim=6)),
    Case(
        "Gemma 2",
        hugging("gemma2", head_dim=6, sliding_window=4),
        attentions=("eager",),
        notes="softcapping (eager attention only), mixed layers, norms behind each branch",
    ),
    Case(
        "Gemma 3",
        hugging("gemma3_text", head_dim=6, sliding_window=4, sliding_window_pattern=2),
        notes="mixed layers, two rotary bases",
    ),
    Case("SmolLM3", hugging("smollm3", no_rope_layer_interval=2), notes="layers without positions"),
    Case(
        "OLMo 2",
        hugging("olmo2"),
        absent=norms_over_kept,
        notes="norms over all heads count those that stay",
    ),
    Case(
        "OLMo 3",
        hugging("olmo3", sliding_window=4),
        absent=norms_over_kept,
        notes="mixed layers, norms over all heads",
    ),
    Case("OPT", hugging("opt", **OPT_SMALL), notes="learned positions"),
    Case("OPT, norms behind", hugging("opt", **OPT_SMALL, do_layer_norm_before=False)),
    Case(
        "Phi-3 / Phi-4",
        hugging("phi3", original_max_position_embeddings=64),
        notes="fused qkv and gate/up; forward reads the config",
    ),
    Case("GPT-2", hugging("gpt2", **GPT2_SMALL), notes="Conv1D, fused c_attn"),
    Case(
        "GPT-NeoX / Pythia",
        hugging("gpt_neox", num_attention_heads=4),
        notes="interleaved fused qkv, parallel branches",
    ),
    Case(
        "GPT-NeoX, sequential",
        hugging("gpt_neox", num_attention_heads=4, use_parallel_residual=False, attention_bias=False),
    ),
    Case(
        "Falcon, multi-query",
        hugging("falcon", **FALCON_SMALL),
        notes="fused; query heads are the groups",
        kinds=("query_head", "mlp"),
    ),
    Case(
        "Falcon, multi-head",
        hugging("falcon", **FALCON_SMALL, multi_query=False, bias=True),
        notes="interleaved fused qkv",
    ),
    Case(
        "Falcon, new decoder",
        hugging("falcon", **{**FALCON_SMALL, "num_kv_heads": 2}, new_decoder_architecture=True),
        notes="grouped-query, interleaved fused",
    ),
    Case("BERT, masked language model", encoder("bert", "AutoModelForMaskedLM"), generates=False),
    Case(
        "BERT, sequence classification",
        encoder("bert", "AutoModelForSequenceClassification", num_labels=3),
        classified_batch,
        generates=False,
    ),
    Case(
        "RoBERTa, token classification",
        encoder("roberta", "AutoModelForTokenClassification", num_labels=3, pad_token_id=0),
        tagged_batch,
        generates=False,
    ),
    Case(
        "ALBERT",
        encoder("albert", "AutoModelForMaskedLM", embedding_size=16),
        generates=False,
        notes="one layer, run three times",
        blocks=False,
    ),
    Case(
        "ViT, image classification",
        encoder("vit", "AutoModelForImageClassification", **VIT_SMALL),
        image_batch,
        generates=False,
    ),
    Case(
        "T5",
        hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL),
        translated_batch,
        notes="relative biases of the first layer read by all",
        kinds=("attention", "cross_attention", "mlp"),
        blocks=False,
    ),
    Case(
        "T5, gated",
        hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        translated_batch,
        kinds=("attention", "cross_attention", "mlp"),
        blocks=False,
    ),
    Case(
        "Mixtral",
        hugging("mixtral", **MOE_SMALL, num_local_experts=5),
        absent=routers_over_kept,
        notes="fused experts",
        kinds=("attention", "mlp", "expert"),
    ),
    Case(
        "Qwen3-MoE",
        hugging(
            "qwen3_moe", **MOE_SMALL, num_experts=5, moe_intermediate_size=16, mlp_only_layers=[1], norm_topk_prob=True
        ),
        absent=routers_over_kept,
        notes="fused experts, one dense layer",
        kinds=("attention", "mlp", "expert"),
    ),
    Case(
        "gpt-oss",
        hugging("gpt_oss", **MOE_SMALL, num_local_experts=5, sliding_window=4),
        attentions=("eager",),
        absent=routers_over_kept,
        notes="attention sinks, interleaved fused experts with biases",
        kinds=("attention", "mlp", "expert"),
    ),
    Case(
        "Llama in a LightningModule",
        lambda attention: Classifier(
            hugging("llama", "AutoModelForSequenceClassification", num_labels=3, pad_token_id=0)(attention)
        ),
        classified_batch,
        generates=False,
        saves=False,
        notes="sequence classification",
    ),
    Case(
        "A module of one's own, nanoGPT-style",
        lambda _: MyGPT(VOCABULARY),
        generates=False,
        saves=False,
        attentions=("own",),
    ),
    Case(
        "The same layer at two positions",
        lambda _: MySharedGPT(VOCABULARY),
        generates=False,
        saves=False,
        attentions=("own",),
        notes="cut once; not refitted",
        refits=False,
        blocks=False,
    ),
    Case(
        "nn.TransformerEncoder",
        lambda _: TextClassifier(VOCABULARY),
        classified_batch,
        generates=False,
        saves=False,
        attentions=("own",),
        notes="nn.MultiheadAttention",
    ),
    Case(
        "nn.Transformer",
        lambda _: Translator(VOCABULARY),
        translated_batch,
        generates=False,
        saves=False,
        attentions=("own",),
        kinds=("attention", "cross_attention", "mlp"),
    ),
    Case(
        "ResNet",
        lambda _: MyResNet(),
        image_batch,
        generates=False,
        saves=False,
        attentions=("own",),
        notes="coupled by torch-pruning's dependency graph",
        kinds=("channel",),
        refits=False,
        blocks=False,
    ),
)
