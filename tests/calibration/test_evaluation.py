"""Running a model for what it computes: no dropout, also where activations are checkpointed."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from lit_prune.calibration.evaluation import evaluation_mode, only_trained

TOKENS = torch.arange(24).view(2, 12) % 60 + 3


def opt():
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    return OPTForCausalLM(config), {"input_ids": TOKENS, "labels": TOKENS}


def bart():
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BART_SIDE.items()}
    config = BartConfig(
        vocab_size=64, d_model=32, max_position_embeddings=64, dropout=0.5, activation_dropout=0.5, **sizes
    )
    return BartForConditionalGeneration(config), {"input_ids": TOKENS, "labels": TOKENS}


BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64, "layerdrop": 0.5}


def wav2vec2():
    config = Wav2Vec2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_kernel=(5, 3),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.5,
        hidden_dropout=0.5,
    )
    audio = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    return Wav2Vec2ForCTC(config), {"input_values": audio, "labels": TOKENS[:, :4]}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", [opt, bart, wav2vec2])
def test_checkpointed_layers_drop_nothing(build, reentrant):
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = [
        {k: v for k, v in vars(o).items() if isinstance(v, (bool, float))} for o in (*model.modules(), model.config)
    ]
    recomputed, layer = (
        [],
        next(m for n, m in model.named_modules() if n.endswith("layers.0.fc1") or "output_dense" in n),
    )
    for seed in (1, 2):
        torch.manual_seed(seed)
        with evaluation_mode(model):
            # within another one it is no different
            with evaluation_mode(model):
                output = model(**inputs)
            handle = layer.register_forward_pre_hook(lambda *_: recomputed.append(1))
            output.loss.backward()
            handle.remove()
        torch.testing.assert_close(output.logits, expected)
    assert recomputed
    after = [
        {k: v for k, v in vars(o).items() if isinstance(v, (bool, float))} for o in (*model.modules(), model.config)
    ]
    assert after == before


def test_graphs_are_built_for_some_parameters_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), only_trained(model, [model[0].bias]):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias"]
        with only_trained(model):
            assert not model(torch.ones(1, 2)).requires_grad
        assert model(torch.ones(1, 2)).requires_grad
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before
