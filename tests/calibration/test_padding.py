"""Padding changes nothing: neither statistics, importances, shares nor refitted weights, whatever form a batch has."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architecture_cases import BART_SMALL, CASES, T5_SMALL, WHISPER_SMALL, encoder, hugging, random_ids
from own_models import MyGPT
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMultipleChoice, BatchEncoding, BertConfig, Wav2Vec2Config, Wav2Vec2ForCTC

from conftest import SMALL, uneven_kept, unsettled
from lit_prune import MLP, Architecture, Attention, find_group_sets, find_model, register_architecture
from lit_prune.architectures import Positions, architectures
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.mask_shapes import seen_positions, visible
from lit_prune.calibration.token_masks import TokenMasks, output_mask
from lit_prune.config import PruningConfig
from lit_prune.pipeline import prune
from lit_prune.plan import PruningPlan
from lit_prune.ranking.importance import group_importance
from lit_prune.ranking.registry import get_criterion
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import least_squares

LENGTHS = torch.tensor([12, 9, 11, 7, 12, 10])
TARGETS = torch.tensor([8, 12, 5, 9, 11, 12])


def sequences(lengths: Tensor, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, SMALL["vocab_size"], (int(n),), generator=generator) for n in lengths]


def padded(rows: list[Tensor], left: int = 0, right: int = 0, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths and their mask, with more padding at one end or the other; rows lie at the other end."""
    width = max(len(r) for r in rows) + left + right
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    return ids, mask


def causal(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    ids, mask = padded(sequences(LENGTHS), left, right, fill=3)
    labels = ids.masked_fill(mask == 0, -100)
    # the first token of a row would be predicted from padding
    labels[torch.arange(len(ids)), mask.argmax(1)] = -100
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def translated(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """Source and target are of one length, unless there is more padding."""
    ids, mask = padded(sequences(LENGTHS), left, right)
    targets, shown = padded(sequences(TARGETS, 1), left and 2, right and 2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": targets,
        "decoder_attention_mask": shown,
        "labels": targets.masked_fill(shown == 0, -100),
    }


class Tagger(nn.Module):
    """An ``nn.TransformerEncoder`` whose mask is of padding, and is made of that of tokens."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(SMALL["vocab_size"], 32)
        layer = nn.TransformerEncoderLayer(32, 4, 24, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(32, SMALL["vocab_size"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor) -> Any:
        hidden = self.embedding(input_ids)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        logits = self.head(hidden if self.batch_first else hidden.transpose(0, 1))
        return logits, functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Pair(nn.Module):
    """An ``nn.Transformer`` with its batch along the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SMALL["vocab_size"], 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 24, dropout=0.0)
        self.head = nn.Linear(32, SMALL["vocab_size"])

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels):
        hidden = self.transformer(
            self.embedding(input_ids).transpose(0, 1),
            self.embedding(decoder_input_ids).transpose(0, 1),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.shape[1]),
            src_key_padding_mask=attention_mask == 0,
            memory_key_padding_mask=attention_mask == 0,
            tgt_key_padding_mask=decoder_attention_mask == 0,
        )
        logits = self.head(hidden.transpose(0, 1))
        return logits, functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


BOTH = ({"left": 5}, {"right": 7})
RIGHT = ({"right": 7},)


@dataclasses.dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    paddings: tuple[dict[str, int], ...] = BOTH
    # sums of another length round differently
    dtype: torch.dtype = torch.float64


FAMILIES = {
    "llama": Family(lambda: hugging("llama")("sdpa"), causal),
    # its softmax is in float32
    "llama, eager": Family(lambda: hugging("llama")("eager"), causal, dtype=torch.float32),
    "mixtral": Family(
        lambda: hugging("mixtral", num_hidden_layers=2, num_experts_per_tok=2, num_local_experts=3)("sdpa"),
        causal,
        dtype=torch.float32,
    ),
    "bert": Family(lambda: encoder("bert", "AutoModelForMaskedLM")("sdpa"), causal),
    "bert, eager": Family(lambda: encoder("bert", "AutoModelForMaskedLM")("eager"), causal),
    "t5": Family(lambda: hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL)("sdpa"), translated),
    "t5, eager": Family(lambda: hugging("t5", "AutoModelForSeq2SeqLM", T5_SMALL)("eager"), translated),
    # its positions are absolute, and no argument
    "bart": Family(lambda: hugging("bart", "AutoModelForSeq2SeqLM", BART_SMALL)("sdpa"), translated, RIGHT),
    "nn.TransformerEncoder": Family(lambda: Tagger(True), causal),
    "nn.TransformerEncoder, positions first": Family(lambda: Tagger(False), causal),
    "nn.Transformer": Family(Pair, translated, RIGHT),
}


def made(family: Family) -> nn.Module:
    torch.manual_seed(0)
    return unsettled(family.build()).to(family.dtype)


def loss_of(result: Any) -> Tensor:
    return result.loss if hasattr(result, "loss") else result[1]


def measured(root: nn.Module, batches: list[Any], forward: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Everything that calibration says of a model, by name."""
    model = find_model(root)[1]
    group_sets = find_group_sets(model)
    criteria = [get_criterion(name) for name in ("fisher", "wanda")]
    terms = [t for c in criteria for t in c.terms]
    statistics = collect_statistics(
        model, group_sets, batches, lambda b: loss_of(forward(b)), terms, activations=True, root=root
    )
    found = {}
    for name, activation in statistics.activations.items():
        found[f"{name} count"] = torch.tensor(activation.count)
        found.update({f"{name} {key}": value / activation.count for key, value in activation.sums.items()})
    parameters = dict(model.named_parameters())
    for name, criterion in zip(("fisher", "wanda"), criteria, strict=True):
        scores = group_importance(criterion, parameters, group_sets, statistics)
        found.update({f"{name} {s.name} {s.kind}": i / i.mean() for s, i in zip(group_sets, scores, strict=True)})
    shares = unexplained_shares(model, group_sets, batches, forward, root=root)
    found.update({f"share {name}": value for name, value in shares.items()})
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    weights = least_squares(model, group_sets, plan, batches, forward, root=root)
    found.update({f"refit {name}": value for name, value in weights.items()})
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("count"):
            assert int(found[name]) == int(value), name
        else:
            scale = float(value.abs().max())
            torch.testing.assert_close(
                found[name] / scale, value / scale, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}"
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    family = FAMILIES[name]
    model = made(family)
    expected = measured(model, [family.batch()], lambda b: model(**b))
    assert any(key.startswith("refit") for key in expected)
    atol = 1e-5 if family.dtype == torch.float64 else 1e-3
    for padding in family.paddings:
        assert_same(measured(model, [family.batch(**padding)], lambda b: model(**b)), expected, atol)


def counts(root: nn.Module, batches: list[Any], forward: Callable[[Any], Any] | None = None) -> dict[str, int]:
    """How many tokens each observed module saw, by name."""
    model = find_model(root)[1]

    def loss(batch: Any) -> None:
        _ = root(**batch) if forward is None else forward(batch)

    statistics = collect_statistics(
        model, find_group_sets(model), batches, loss, get_criterion("wanda").terms, root=root
    )
    return {name: activation.count for name, activation in statistics.activations.items()}


@dataclasses.dataclass
class Example:
    ids: Tensor
    mask: Tensor
    extra: dict[str, Any]


FORMS = {
    "dict": (lambda b: b, lambda b: b),
    "BatchEncoding": (BatchEncoding, lambda b: dict(b)),
    "tuple": (lambda b: tuple(b.values()), lambda b: dict(zip(causal(), b, strict=True))),
    "dataclass": (
        lambda b: Example(b["input_ids"], b["attention_mask"], {k: b[k] for k in ("labels", "position_ids")}),
        lambda e: {"input_ids": e.ids, "attention_mask": e.mask, **e.extra},
    ),
    "nested": (
        lambda b: {"inputs": [{"ids": b["input_ids"], "real": b["attention_mask"]}], "rest": (b["labels"], b)},
        lambda n: {
            "input_ids": n["inputs"][0]["ids"],
            "attention_mask": n["inputs"][0]["real"].bool(),
            "labels": n["rest"][0],
            "position_ids": n["rest"][1]["position_ids"],
        },
    ),
}


@pytest.fixture(scope="module")
def bert():
    model = made(FAMILIES["bert"])
    return model, measured(model, [causal()], lambda b: model(**b))


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_batch_does_not_matter(bert, form):
    model, expected = bert
    pack, unpack = FORMS[form]

    def forward(batch: Any) -> Any:
        given = unpack(batch)
        if form == "tuple":
            return model(
                given["input_ids"], given["attention_mask"], None, given["position_ids"], labels=given["labels"]
            )
        return model(**given)

    for padding in BOTH:
        assert_same(measured(model, [pack(causal(**padding))], forward), expected)


@pytest.mark.parametrize("importance", ["fisher", "wanda"])
def test_plan_and_weights_are_the_same_with_30_tokens_of_padding_in_tuples(importance):
    results = []
    for right in (0, 30):
        model = made(FAMILIES["bert"])
        batch = tuple(causal(right=right).values())
        config = PruningConfig(importance=importance, pruning_ratio=0.1)
        _, plan = prune(model, [batch], lambda b: model(b[0], b[1], None, b[3], labels=b[2]).loss, config)
        results.append((plan.entries, model.state_dict()))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [c for c in CASES if not c.slow], ids=lambda c: c.name)
def test_every_architecture_counts_the_real_tokens_of_each_sequence(case):
    """Source and target are of one length, so that no mask can be told by its shape."""
    batch = dict(case.batch(0))
    root = case.build()
    if "input_ids" not in batch or not {"attention_mask"} & set(_arguments(root)):
        pytest.skip("takes no mask of tokens")
    model = find_model(root)[1]
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, 9:] = 0
    batch["attention_mask"] = mask
    if "decoder_input_ids" in _arguments(root):
        batch["labels"] = random_ids(1)
    batch = {k: v for k, v in batch.items() if k in _arguments(root)}
    two = any(s.kind == "cross_attention" for s in find_group_sets(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = counts(root, [batch])
        shown = counts(root, [{**batch, "decoder_attention_mask": mask[[1, 0]]}]) if two else found
    images = ids.shape[0] * 5
    # one layer, run three times
    calls = 3 if case.name == "ALBERT" else 1
    for name, count in found.items():
        if "vision" in name:
            assert count == images, name
        elif not two or "encoder." in name.removeprefix("model.")[:8]:
            assert count == calls * int(mask.sum()), name
        else:
            of_source = "EncDecAttention" in name or "encoder_attn" in name
            of_source = of_source and name.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj")
            assert count == (int(mask.sum()) if of_source else ids.numel()), name
            assert shown[name] == int(mask.sum()), name


def _arguments(root: nn.Module) -> tuple[str, ...]:
    from lit_prune.calibration.token_masks import _parameters

    return _parameters(find_model(root)[1])


def test_t5_and_bart_count_the_decoders_tokens_as_the_issue_says():
    t5 = made(FAMILIES["t5"])
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 6:] = 0
    ids = random_ids(0, 1, 12)
    found = counts(t5, [{"input_ids": ids, "attention_mask": mask, "labels": random_ids(1, 1, 12)}])
    assert found["decoder.block.0.layer.2.DenseReluDense.wo"] == 12
    assert found["encoder.block.0.layer.1.DenseReluDense.wo"] == 6
    bart = made(FAMILIES["bart"])
    mask = (torch.arange(24) < 3).long().expand(16, -1)
    found = counts(
        bart, [{"input_ids": random_ids(0, 16, 24), "attention_mask": mask, "labels": random_ids(1, 16, 24)}]
    )
    assert found["model.decoder.layers.1.fc2"] == 384
    assert found["model.encoder.layers.1.fc2"] == 48


def test_labels_of_minus_100_mask_nothing():
    model = made(FAMILIES["llama"])
    batch = causal()
    batch["labels"] = batch["labels"].masked_fill(torch.arange(12) < 6, -100)
    assert set(counts(model, [batch]).values()) == {int(LENGTHS.sum())}
    t5 = made(FAMILIES["t5"])
    batch = translated()
    del batch["decoder_input_ids"], batch["decoder_attention_mask"]
    assert counts(t5, [batch])["decoder.block.0.layer.2.DenseReluDense.wo"] == batch["labels"].numel()


def four_dimensional(batch: dict[str, Tensor], name: str, diagonal: bool) -> dict[str, Tensor]:
    """The batch with its mask as one of queries and keys, as transformers makes it of the other."""
    mask = batch["attention_mask"].bool()
    pairs = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1).clone()
    if "llama" in name:
        pairs &= torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    if diagonal:
        pairs |= torch.eye(mask.shape[1], dtype=torch.bool) & ~mask[:, None, :, None]
        pairs &= mask[:, None, :, None] | torch.eye(mask.shape[1], dtype=torch.bool)
    if "eager" in name:
        pairs = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": pairs}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama, eager", "bert", "bert, eager"])
def test_masks_of_queries_and_keys_are_the_same_as_masks_of_tokens(name, diagonal):
    model = made(dataclasses.replace(FAMILIES[name], dtype=torch.float32))
    batch = causal(**BOTH[diagonal])
    expected = measured(model, [batch], lambda b: model(**b))
    assert_same(measured(model, [four_dimensional(batch, name, diagonal)], lambda b: model(**b)), expected, 1e-3)


def test_which_positions_a_pattern_shows():
    causal_pattern = torch.ones(5, 5, dtype=torch.bool).tril()
    assert seen_positions(causal_pattern, 3).tolist() == [[True] * 5]
    left = causal_pattern & torch.tensor([0, 0, 1, 1, 1]).bool()
    assert seen_positions(left[None, None], 1).tolist() == [[False, False, True, True, True]]
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    assert seen_positions(blocks[None], 1).all()
    heads = torch.stack([left, causal_pattern, left, left])
    assert seen_positions(heads, 2).tolist() == [[True] * 5, [False, False, True, True, True]]
    assert seen_positions(torch.ones(1, 1, 1, 5, dtype=torch.bool), 1).shape == (1, 5)
    assert seen_positions(torch.ones(3, 5, 5, dtype=torch.bool), 2) is None
    assert seen_positions(torch.eye(4, dtype=torch.bool)[None], 1).all()
    for hidden in (-1e4, -65504.0, torch.finfo(torch.float32).min, float("-inf")):
        assert visible(torch.tensor([0.0, -30.0, hidden])).tolist() == [True, True, False]
    assert visible(torch.zeros(3)).all()
    assert visible(torch.tensor([1.0, 0.0])).tolist() == visible(torch.tensor([2, 0])).tolist() == [True, False]
    assert visible(torch.tensor([True, False]), inverted=True).tolist() == [False, True]
    assert visible(torch.tensor([0.0, float("-inf")]), inverted=True).tolist() == [True, False]


def test_packed_sequences_count_whole_and_so_do_those_with_numbers_in_the_mask():
    model = made(FAMILIES["llama"])
    ids = random_ids(0, 1, 14)
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    assert set(counts(model, [{"input_ids": ids, "position_ids": positions}]).values()) == {14}
    documents = torch.tensor([[1] * 6 + [2] * 5 + [0] * 3])
    assert set(counts(model, [{"input_ids": ids, "attention_mask": documents}]).values()) == {11}


def test_a_mask_that_covers_a_cache_counts_for_what_is_new():
    model = made(FAMILIES["llama"])
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 8:] = 0

    def forward(ids: Tensor) -> None:
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], attention_mask=mask, past_key_values=cache)

    assert set(counts(model, [random_ids(0)], forward).values()) == {2 * 4 + 12 - 2}


def test_images_have_no_padding_and_the_texts_mask_is_not_theirs():
    vit = next(c for c in CASES if c.name.startswith("ViT"))
    assert set(counts(vit.build(), [vit.batch(0)]).values()) == {2 * 5}
    clip = next(c for c in CASES if c.name == "CLIP")
    # as many tokens as patches
    batch = {**clip.batch(0), "input_ids": random_ids(0, 2, 5)}
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    for name, count in counts(clip.build(), [batch]).items():
        assert count == (10 if "vision" in name else 7), name


def test_whisper_counts_the_frames_of_the_audio_and_all_of_the_decoder():
    torch.manual_seed(0)
    model = unsettled(hugging("whisper", "AutoModelForSpeechSeq2Seq", WHISPER_SMALL)("sdpa"))
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    batch = {"input_features": features, "labels": random_ids(0, tokens=10)}
    assert set(counts(model, [batch]).values()) == {20}
    batch["attention_mask"] = (torch.arange(20) < torch.tensor([[20], [11]])).long()
    for name, count in counts(model, [batch]).items():
        of_source = "encoder." in name or ("encoder_attn" in name and name.endswith(("k_proj", "v_proj")))
        # two frames of the input to one
        assert count == (10 + 6 if of_source else 20), name


@pytest.fixture
def wav2vec2():
    """A description of wav2vec2, as a user registers one."""
    register_architecture(
        Architecture(
            name="wav2vec2-test",
            models=("Wav2Vec2PreTrainedModel",),
            components=(
                Attention(path="layers.*.attention", output="out_proj"),
                MLP(path="layers.*.feed_forward", inputs=("intermediate_dense",), output="output_dense"),
            ),
        )
    )


def test_speech_counts_frames_after_strides(wav2vec2):
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_stride=(4, 2),
            conv_kernel=(5, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
        )
    )
    model = unsettled(model)
    lengths = torch.tensor([200, 120])
    sound = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(200) < lengths[:, None]).long()
    frames = model._get_feat_extract_output_lengths(lengths)
    assert set(counts(model, [(sound * mask, mask)], lambda b: model(*b)).values()) == {int(frames.sum())}


def test_a_mask_that_nobody_takes_is_warned_of_once_and_the_batchs_own_serves_models_without_one():
    model = made(FAMILIES["llama"])
    with pytest.warns(UserWarning, match="LlamaForCausalLM was not called with one") as caught:
        found = counts(model, [causal(), causal()], lambda b: model(input_ids=b["input_ids"]))
    assert len(caught) == 1
    assert set(found.values()) == {2 * causal()["input_ids"].numel()}
    torch.manual_seed(0)
    gpt = MyGPT(SMALL["vocab_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = counts(gpt, [causal()], lambda b: gpt(b["input_ids"], b["labels"]))
    assert set(found.values()) == {int(LENGTHS.sum())}


def test_checkpointed_layers_count_once():
    model = made(FAMILIES["llama"])
    batch = causal()
    terms = [t for name in ("taylor_2nd", "wanda") for t in get_criterion(name).terms]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        statistics = collect_statistics(model, find_group_sets(model), [batch], lambda b: model(**b).loss, terms)
        found.append(statistics.activations)
    assert {a.count for a in found[1].values()} == {int(LENGTHS.sum())}
    for name, activation in found[0].items():
        for key, value in activation.sums.items():
            torch.testing.assert_close(found[1][name].sums[key], value)


def test_samples_are_those_of_the_batch_where_positions_come_first():
    """Fisher of channels is the same for either layout, whatever the padding."""
    found = []
    for batch_first in (True, False):
        root = made(Family(lambda first=batch_first: Tagger(first), causal))
        model = find_model(root)[1]
        group_sets = [s for s in find_group_sets(model) if s.kind == "mlp"]
        criterion = get_criterion("fisher")
        for padding in ({}, *BOTH):
            statistics = collect_statistics(
                model, group_sets, [causal(**padding)], lambda b: root(**b)[1], criterion.terms, root=root
            )
            found.append(group_importance(criterion, dict(model.named_parameters()), group_sets, statistics))
    for scores in found[1:]:
        for a, b in zip(scores, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def test_a_choice_of_several_has_the_mask_that_its_encoder_is_called_with():
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if not k.startswith(("num_key_value", "bos", "eos", "pad"))}
    model = unsettled(AutoModelForMultipleChoice.from_config(BertConfig(**small)))
    ids = random_ids(0, 6, 9).view(2, 3, 9)
    mask = torch.ones_like(ids)
    mask[:, 1, 5:] = 0
    assert set(counts(model, [(ids, mask)], lambda b: model(*b)).values()) == {int(mask.sum())}


def test_outputs_have_the_mask_of_the_sequence_that_they_are_for():
    t5, llama = made(FAMILIES["t5"]), made(FAMILIES["llama"])
    ids, mask = padded(sequences(LENGTHS), right=2)
    target = mask.flip(0)
    lead = ids.shape
    assert output_mask(t5, (ids, mask), {"labels": ids}, lead) is None
    assert torch.equal(output_mask(t5, (ids, mask, ids, target), {}, lead), target.bool())
    assert torch.equal(output_mask(llama, (ids, mask), {"labels": ids}, lead), mask.bool())
    assert output_mask(llama, (ids, mask), {}, (6,)) is None


def test_hooks_and_the_fast_path_of_torch_are_as_before_even_after_an_error():
    root = made(FAMILIES["nn.TransformerEncoder"])
    model = find_model(root)[1]

    def fails(_: Any) -> Any:
        root(**causal())
        raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        counts(root, [causal()], fails)
    assert torch.backends.mha.get_fastpath_enabled()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    masks = TokenMasks(model, ["layers.0.linear2"])
    with masks:
        masks.start_batch(None)
        assert masks.of(torch.zeros(2, 3, 4)) is None


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))


class ImageTower(Tower):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.block(pixel_values * 2)


class TextTower(Tower):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.block(functional.one_hot(input_ids, 4).float())


class Reader(nn.Module):
    """Attends to what an encoder gave; no name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, memory_bank: Tensor) -> Tensor:
        return self.own(x * 2) + self.other(memory_bank)


class Together(nn.Module):
    """Towers of text and of images beside each other, and a decoder that reads the text."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.decoder, self.reader = TextTower(), ImageTower(), TextTower(), Reader()

    def forward(self, input_ids, pixel_values, target, attention_mask=None, target_mask=None) -> None:
        memory = self.text(input_ids, attention_mask)
        self.image(pixel_values)
        self.reader(self.decoder(target, target_mask), memory)


@pytest.mark.parametrize("shown", [None, torch.tensor([[1, 1, 0], [1, 0, 0]])])
def test_sequences_of_one_length_within_one_module_keep_their_own_masks(shown):
    model = Together()
    names = ["text.block.0", "image.block.0", "decoder.block.0", "reader.own", "reader.other"]
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found: dict[str, Tensor | None] = {}
    with TokenMasks(model, names) as masks:
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: masks.of(args[0])})
            )
        masks.start_batch(None)
        model(torch.zeros(2, 3).long(), torch.zeros(2, 3, 4), torch.ones(2, 3).long(), mask, shown)
    assert torch.equal(found["text.block.0"], mask.bool())
    assert found["image.block.0"] is None
    assert torch.equal(found["reader.other"], mask.bool())
    target = None if shown is None else shown.bool()
    for name in ("decoder.block.0", "reader.own"):
        assert found[name] is None if target is None else torch.equal(found[name], target)


class MaskedGPT(MyGPT):
    """Its mask has a name of its own, and is True at padding."""

    def forward(self, idx: Tensor, ignored: Tensor) -> Tensor:
        return super().forward(idx)[0]


def test_a_description_says_how_masks_are_called():
    description = next(a for a in architectures() if a.name == "my-gpt")
    own = (Positions(("idx",), padding=("ignored",)),)
    register_architecture(dataclasses.replace(description, name="masked-gpt", models=("MaskedGPT",), arguments=own))
    batch = causal(right=2)
    found = counts(
        MaskedGPT(SMALL["vocab_size"]), [{"idx": batch["input_ids"], "ignored": batch["attention_mask"] == 0}]
    )
    assert set(found.values()) == {int(LENGTHS.sum())}
