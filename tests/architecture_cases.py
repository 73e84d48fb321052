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


def speech_batch(seed: int) -> dict[str, Tensor]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(seed))
    return {"input_features": features, "labels": random_ids(seed + 100, tokens=7)}


def seen_batch(seed: int) -> dict[str, Tensor]:
    images = torch.zeros(2, 4, dtype=torch.long)
    ids = torch.cat([images, random_ids(seed)], dim=1)
    pixels = image_batch(seed)["pixel_values"]
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "token_type_ids": (ids == 0).long()}


def pair_batch(seed: int) -> dict[str, Any]:
    return {"input_ids": random_ids(seed), "pixel_values": image_batch(seed)["pixel_values"], "return_loss": True}


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


class _GatedNormOverKept(nn.Module):
    """Root-mean-square norms over equal parts of the features, which count only some features, with a gate."""

    def __init__(self, norm: nn.Module, kept: Tensor, parts: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.gate_first = not getattr(norm, "norm_before_gate", False)
        mask = torch.zeros(len(norm.weight))
        mask[kept] = 1.0
        self.part_of_feature = torch.arange(len(mask)) // (len(mask) // parts)
        # a row for each part: the mean over its kept features
        member = nn.functional.one_hot(self.part_of_feature, parts).T * mask
        self.means = member / member.sum(dim=1, keepdim=True)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x * nn.functional.silu(gate) if self.gate_first else x
        mean = (x.square() @ self.means.T)[..., self.part_of_feature]
        x = self.weight * x * torch.rsqrt(mean + self.variance_epsilon)
        return x if self.gate_first else x * nn.functional.silu(gate)


@contextlib.contextmanager
def gated_norms_over_kept(
    model: nn.Module, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]]
) -> Iterator[None]:
    """The norms of Mamba-2 mixers do not count heads that left."""
    for group_set, keep in zip(group_sets, kept, strict=True):
        for part in group_set.slices:
            if group_set.kind == "ssm_head" and part.parameter.endswith("norm.weight"):
                mixer = model.get_submodule(group_set.name)
                mixer.norm = _GatedNormOverKept(mixer.norm, part.index[list(keep)].flatten(), mixer.n_groups)
    yield


def all_of(*absent: Any) -> Any:
    """Several of the above at once."""

    @contextlib.contextmanager
    def together(model: nn.Module, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in absent:
                stack.enter_context(each(model, group_sets, kept))
            yield

    return together


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
        blocks: Whether whole blocks can be removed.
        slow: Whether it differs so little from others that it is run with the slow tests only.
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
    slow: bool = False

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
    for name in ("logits", "logits_per_text"):
        if hasattr(result, name):
            return getattr(result, name)
    return result[0]


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
HYBRID_SMALL = {
    "head_dim": 8,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
RECURRENT = ("eager",)
MAMBA_SMALL = {"state_size": 6, "time_step_rank": 4, "expand": 1}
MAMBA2_SMALL = {"state_size": 5, "expand": 2, "chunk_size": 4}
HYBRID_MAMBA_SMALL = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_chunk_size": 4}
KIMI_SMALL = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
NEMOTRON_H_SMALL = {
    "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "linear_attention"],
    "num_hidden_layers": 5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 5,
    "chunk_size": 4,
    "head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 12,
}
MROPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
QWEN_TOWER = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
TOWER_SMALL = {"depth": 1, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
MPT_SMALL = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 1}
GPTJ_SMALL = {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_inner": 24, "n_positions": 64}
GPTJ_SMALL |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEO_SMALL = {"num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": 4}
NEO_SMALL |= {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
DISTIL_SMALL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}
DEBERTA_SMALL = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}
BART_SMALL = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
WHISPER_SMALL = {**BART_SMALL, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
WHISPER_SMALL |= {"suppress_tokens": None, "begin_suppress_tokens": None}
CLIP_SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
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
    Case(
        "Gemma 3 with images",
        hugging(
            "gemma3",
            "AutoModelForImageTextToText",
            {},
            text_config={**SMALL, "head_dim": 6, "sliding_window": 4},
            vision_config={**CLIP_SMALL, "image_size": 8, "patch_size": 4},
            mm_tokens_per_image=4,
            image_token_index=0,
        ),
        seen_batch,
        notes="the tower of images stays whole",
        blocks=False,
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
    Case(
        "Qwen3.5",
        hugging("qwen3_5_text", **HYBRID_SMALL),
        notes="full and linear attention mixed, a gate behind each head's query",
        kinds=("attention", "linear_attention", "mlp"),
    ),
    *(
        Case(
            name,
            hugging(
                model_type,
                "AutoModelForImageTextToText",
                {},
                text_config={**SMALL, **text},
                vision_config={**TOWER_SMALL, **tower},
            ),
            notes="the tower of images stays whole",
            blocks=False,
            slow=True,
        )
        for name, model_type, text, tower in (
            ("Qwen2-VL", "qwen2_vl", MROPE, {"embed_dim": 16}),
            ("Qwen2.5-VL", "qwen2_5_vl", MROPE, QWEN_TOWER),
            ("Qwen3-VL", "qwen3_vl", {"head_dim": 8}, QWEN_TOWER),
        )
    ),
    Case(
        "Gemma 4, text",
        hugging(
            "gemma4_text",
            head_dim=8,
            global_head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
        notes="layers share keys and values: heads stay",
        kinds=("mlp",),
        blocks=False,
        slow=True,
    ),
    Case("Granite", hugging("granite", residual_multiplier=0.5), notes="scaled residuals", slow=True),
    Case("OLMo", hugging("olmo", clip_qkv=1.0), notes="clipped queries, keys and values", slow=True),
    Case("Helium", hugging("helium", head_dim=4), slow=True),
    Case("EXAONE 4", hugging("exaone4", sliding_window=4, sliding_window_pattern=2), notes="mixed layers", slow=True),
    Case("Seed-OSS", hugging("seed_oss", head_dim=6, residual_dropout=0.0, attention_dropout=0.0), slow=True),
    Case("ERNIE 4.5", hugging("ernie4_5", head_dim=6), slow=True),
    Case("Cohere", hugging("cohere", use_qk_norm=True), notes="parallel branches, norms with a scale for every head"),
    Case("Cohere 2", hugging("cohere2", sliding_window=4), notes="mixed layers", slow=True),
    Case("GLM", hugging("glm", head_dim=8), notes="fused gate/up", slow=True),
    Case("GLM 4", hugging("glm4", head_dim=8), notes="fused gate/up, norms behind each branch", slow=True),
    Case("Nemotron", hugging("nemotron"), notes="MLP without a gate"),
    Case("Apertus", hugging("apertus"), notes="MLP without a gate, norms of queries and keys", slow=True),
    Case("Ministral 3", hugging("ministral3", head_dim=6), slow=True),
    Case("BioGPT", hugging("biogpt", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), slow=True),
    Case("Arcee", hugging("arcee"), notes="MLP without a gate", slow=True),
    Case("StarCoder2", hugging("starcoder2", sliding_window=4, residual_dropout=0.0), slow=True),
    Case("StableLM", hugging("stablelm", use_parallel_residual=True), notes="parallel branches", slow=True),
    Case("Phi-1 / Phi-2", hugging("phi", qk_layernorm=True), notes="parallel branches, partly rotary"),
    Case("GPT-J", hugging("gptj", **GPTJ_SMALL), attentions=("eager",), notes="parallel branches, partly rotary"),
    Case(
        "GPT-Neo",
        hugging("gpt_neo", **NEO_SMALL),
        attentions=("eager",),
        notes="global and local attention mixed",
        slow=True,
    ),
    Case(
        "GPT-BigCode / StarCoder",
        hugging("gpt_bigcode", **GPT2_SMALL),
        notes="fused multi-query: query heads are the groups",
        kinds=("query_head", "mlp"),
        slow=True,
    ),
    Case("BLOOM", hugging("bloom", n_head=4), attentions=("eager",), notes="ALiBi, interleaved fused qkv"),
    Case("MPT", hugging("mpt", **MPT_SMALL), attentions=("eager",), notes="ALiBi, fused qkv"),
    Case(
        "Falcon, ALiBi",
        hugging("falcon", **{**FALCON_SMALL, "alibi": True}, multi_query=False, bias=True),
        notes="ALiBi within the mask",
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
    Case("XLM-RoBERTa", encoder("xlm-roberta", "AutoModelForMaskedLM", pad_token_id=0), generates=False, slow=True),
    Case(
        "ELECTRA",
        encoder("electra", "AutoModelForTokenClassification", num_labels=3, embedding_size=16),
        tagged_batch,
        generates=False,
        slow=True,
    ),
    Case(
        "DistilBERT",
        encoder(
            "distilbert", "AutoModelForSequenceClassification", **DISTIL_SMALL, seq_classif_dropout=0.0, num_labels=3
        ),
        classified_batch,
        generates=False,
    ),
    Case(
        "DeBERTa-v2",
        encoder("deberta-v2", "AutoModelForTokenClassification", **DEBERTA_SMALL, num_labels=3),
        tagged_batch,
        generates=False,
        attentions=("eager",),
        notes="projections of positions",
    ),
    Case(
        "DeBERTa-v3",
        encoder("deberta-v2", "AutoModelForTokenClassification", **DEBERTA_SMALL, share_att_key=True, num_labels=3),
        tagged_batch,
        generates=False,
        attentions=("eager",),
        notes="positions through the projections of words",
        slow=True,
    ),
    Case(
        "ModernBERT",
        encoder(
            "modernbert",
            "AutoModelForMaskedLM",
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=4,
            global_attn_every_n_layers=2,
        ),
        generates=False,
        notes="fused qkv and gate/up, mixed layers",
    ),
    Case(
        "ViT, image classification",
        encoder("vit", "AutoModelForImageClassification", **VIT_SMALL),
        image_batch,
        generates=False,
    ),
    Case(
        "DeiT, image classification",
        encoder("deit", "AutoModelForImageClassification", **VIT_SMALL, architectures=["DeiTForImageClassification"]),
        image_batch,
        generates=False,
        slow=True,
    ),
    Case(
        "DINOv2, image classification",
        encoder("dinov2", "AutoModelForImageClassification", **VIT_SMALL, mlp_ratio=1),
        image_batch,
        generates=False,
        slow=True,
        blocks=False,
    ),
    Case(
        "CLIP",
        hugging(
            "clip",
            "AutoModel",
            {},
            text_config={**CLIP_SMALL, "vocab_size": VOCABULARY, "eos_token_id": 2},
            vision_config={**CLIP_SMALL, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        ),
        pair_batch,
        generates=False,
        notes="two towers in one table",
        blocks=False,
    ),
    Case(
        "SigLIP",
        hugging(
            "siglip",
            "AutoModel",
            {},
            text_config={**CLIP_SMALL, "vocab_size": VOCABULARY, "projection_size": 32},
            vision_config={**CLIP_SMALL, "image_size": 8, "patch_size": 4},
        ),
        pair_batch,
        generates=False,
        slow=True,
        blocks=False,
    ),
    Case(
        "BART",
        hugging("bart", "AutoModelForSeq2SeqLM", BART_SMALL),
        translated_batch,
        kinds=("attention", "cross_attention", "mlp"),
        blocks=False,
    ),
    *(
        Case(
            name,
            hugging(model_type, "AutoModelForSeq2SeqLM", BART_SMALL),
            translated_batch,
            kinds=("attention", "cross_attention", "mlp"),
            slow=True,
            blocks=False,
        )
        for name, model_type in (
            ("mBART", "mbart"),
            ("Pegasus", "pegasus"),
            ("Marian", "marian"),
            ("M2M100 / NLLB", "m2m_100"),
        )
    ),
    Case(
        "Whisper",
        hugging("whisper", "AutoModelForSpeechSeq2Seq", WHISPER_SMALL),
        speech_batch,
        generates=False,
        kinds=("attention", "cross_attention", "mlp"),
        blocks=False,
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
        "mT5",
        hugging("mt5", "AutoModelForSeq2SeqLM", T5_SMALL),
        translated_batch,
        kinds=("attention", "cross_attention", "mlp"),
        slow=True,
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
        "Qwen2-MoE",
        hugging(
            "qwen2_moe",
            num_hidden_layers=2,
            num_experts_per_tok=2,
            num_experts=5,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=12,
        ),
        absent=routers_over_kept,
        notes="fused experts and a shared one",
        kinds=("attention", "mlp", "expert"),
    ),
    Case(
        "Qwen3-Next",
        hugging(
            "qwen3_next",
            **HYBRID_SMALL,
            num_experts_per_tok=2,
            num_experts=5,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=12,
        ),
        absent=routers_over_kept,
        notes="full and linear attention mixed, fused experts and a shared one",
        kinds=("attention", "linear_attention", "mlp", "expert"),
        blocks=False,
        slow=True,
    ),
    Case(
        "Qwen3.5-MoE",
        hugging(
            "qwen3_5_moe_text",
            **HYBRID_SMALL,
            num_experts_per_tok=2,
            num_experts=5,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=12,
        ),
        absent=routers_over_kept,
        notes="full and linear attention mixed, fused experts and a shared one",
        kinds=("attention", "linear_attention", "mlp", "expert"),
        blocks=False,
        slow=True,
    ),
    Case(
        "OLMoE",
        hugging("olmoe", num_hidden_layers=2, num_experts_per_tok=2, num_experts=5),
        absent=all_of(routers_over_kept, norms_over_kept),
        notes="fused experts, norms over all heads",
        kinds=("attention", "mlp", "expert"),
        slow=True,
    ),
    Case(
        "Granite-MoE",
        hugging("granitemoe", num_hidden_layers=2, num_experts_per_tok=2, num_local_experts=5),
        absent=routers_over_kept,
        notes="fused experts",
        kinds=("attention", "mlp", "expert"),
        slow=True,
    ),
    Case(
        "Llama 4, text",
        hugging(
            "llama4_text",
            num_hidden_layers=2,
            interleave_moe_layer_step=2,
            num_local_experts=4,
            intermediate_size_mlp=20,
            head_dim=8,
        ),
        absent=routers_over_kept,
        notes="fused experts and a shared one, every other layer",
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
    Case("Mamba", hugging("mamba", **MAMBA_SMALL), attentions=RECURRENT, kinds=("ssm_channel",)),
    Case(
        "Falcon-Mamba",
        hugging("falcon_mamba", **MAMBA_SMALL),
        attentions=RECURRENT,
        notes="norms of B, C and the time step",
        kinds=("ssm_channel",),
        slow=True,
    ),
    Case(
        "Mamba-2",
        hugging("mamba2", **MAMBA2_SMALL, num_heads=8, head_dim=8, n_groups=1),
        attentions=RECURRENT,
        absent=gated_norms_over_kept,
        notes="one norm over all heads counts those that stay",
        kinds=("ssm_head",),
        slow=True,
    ),
    Case(
        "Mamba-2, two groups",
        hugging("mamba2", **MAMBA2_SMALL, num_heads=8, head_dim=8, n_groups=2, use_bias=True),
        attentions=RECURRENT,
        absent=gated_norms_over_kept,
        notes="as many heads stay for each B and C",
        kinds=("ssm_head",),
    ),
    Case(
        "Nemotron-H",
        hugging("nemotron_h", **NEMOTRON_H_SMALL),
        absent=gated_norms_over_kept,
        notes="layers of state-space heads, attention, MLP and experts; whole experts stay",
        kinds=("ssm_head", "attention", "mlp"),
    ),
    Case(
        "Bamba",
        hugging("bamba", **HYBRID_MAMBA_SMALL, attn_layer_indices=[1]),
        absent=gated_norms_over_kept,
        notes="attention and state-space layers mixed",
        kinds=("ssm_head", "attention", "mlp"),
        blocks=False,
        slow=True,
    ),
    Case(
        "Granite 4 hybrid",
        hugging(
            "granitemoehybrid",
            **HYBRID_MAMBA_SMALL,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            num_local_experts=5,
            num_experts_per_tok=2,
            shared_intermediate_size=12,
        ),
        absent=all_of(gated_norms_over_kept, routers_over_kept),
        notes="attention and state-space layers mixed, fused experts and a shared one",
        kinds=("ssm_head", "attention", "mlp", "expert"),
        slow=True,
    ),
    *(
        Case(
            f"Falcon-H1{name}",
            hugging(
                "falcon_h1", **HYBRID_MAMBA_SMALL, **norm, mamba_d_ssm=64, ssm_multipliers=[0.5, 0.7, 1.1, 0.9, 1.3]
            ),
            absent=gated_norms_over_kept,
            notes="attention and state-space heads side by side, multipliers of sections",
            kinds=("ssm_head", "attention", "mlp"),
            slow=bool(name),
        )
        for name, norm in (
            ("", {}),
            (", norm", {"mamba_rms_norm": True}),
            (", norm behind the gate", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
        )
    ),
    Case(
        "Zamba2",
        hugging(
            "zamba2",
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
            num_hidden_layers=4,
            n_mamba_heads=8,
            mamba_ngroups=2,
            mamba_d_state=5,
        ),
        absent=gated_norms_over_kept,
        notes="transformer layers that share weights stay whole",
        kinds=("ssm_head",),
        blocks=False,
        slow=True,
    ),
    Case(
        "Zamba",
        hugging(
            "zamba",
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
            num_hidden_layers=4,
            n_mamba_heads=4,
            mamba_d_state=5,
            mamba_dt_rank=4,
        ),
        notes="heads with projections of their own; transformer layers that share weights stay whole",
        kinds=("ssm_head",),
        blocks=False,
        slow=True,
    ),
    Case(
        "Jamba",
        hugging(
            "jamba",
            attn_layer_period=3,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=5,
            mamba_d_state=6,
            mamba_dt_rank=4,
        ),
        absent=routers_over_kept,
        notes="attention and state-space layers mixed, every other one with experts",
        kinds=("ssm_channel", "attention", "mlp", "expert"),
        blocks=False,
        slow=True,
    ),
    Case(
        "LFM2",
        hugging("lfm2", layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
        notes="attention and short convolutions mixed",
        kinds=("convolution_channel", "attention", "mlp"),
    ),
    Case(
        "LFM2-MoE",
        hugging(
            "lfm2_moe",
            layer_types=["conv", "full_attention", "conv"],
            num_dense_layers=1,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        notes="whole experts stay",
        kinds=("convolution_channel", "attention", "mlp"),
        slow=True,
    ),
    Case(
        "OLMo Hybrid",
        hugging("olmo_hybrid", **HYBRID_SMALL),
        absent=norms_over_kept,
        notes="full and linear attention mixed, norms over all heads",
        kinds=("linear_attention", "attention", "mlp"),
        slow=True,
    ),
    Case(
        "Kimi Linear",
        hugging(
            "kimi_linear",
            **KIMI_SMALL,
            num_local_experts=4,
            linear_num_heads=3,
            linear_head_dim=8,
        ),
        notes="delta attention with decays of features; latent attention and whole experts stay",
        kinds=("linear_attention", "mlp"),
        slow=True,
    ),
    Case(
        "Bailing hybrid",
        hugging(
            "bailing_hybrid", **KIMI_SMALL, num_local_experts=4, n_group=1, topk_group=1, head_dim=8, num_mtp_layers=0
        ),
        notes="delta attention with decays of features; latent attention and whole experts stay",
        kinds=("linear_attention", "mlp"),
        slow=True,
    ),
    Case(
        "LFM3",
        hugging("lfm3", layer_types=["conv", "full_attention", "sliding_attention"], head_dim=8, sliding_window=4),
        notes="full and sliding attention and short convolutions mixed, a gate for each query head",
        kinds=("convolution_channel", "attention", "mlp"),
        slow=True,
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
        notes="cut once",
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
        notes="found by running it",
        kinds=("channel",),
        blocks=False,
    ),
)
