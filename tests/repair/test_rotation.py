"""Turning hidden states to their principal directions changes no output, and what trails can leave."""

from __future__ import annotations

import copy

import pytest
import torch
from hidden_cases import MODELS, hidden_plan, inputs, logits, untied

from lit_prune import UnsupportedModelError, apply_plan, find_group_sets, rotate_hidden
from lit_prune.groups import count_parameters
from lit_prune.repair.stream import scaled_norms

ROTATABLE = ["llama", "llama-tied", "qwen2", "qwen3", "gemma", "phi3"]


def batches(model, count=3):
    return [inputs(model, seed, batch=8) for seed in range(10, 10 + count)]


def rotated(model, optimizers=()):
    undo = rotate_hidden(model, batches(model), lambda b: model(**b), optimizers)
    return model, undo


@pytest.mark.parametrize("name", ROTATABLE)
def test_rotated_and_nothing_removed_gives_the_same(name):
    dense = MODELS[name]()
    model, undo = rotated(copy.deepcopy(dense))
    for seed in (0, 1):
        torch.testing.assert_close(logits(model, seed), logits(dense, seed), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.model.embed_tokens.weight, dense.model.embed_tokens.weight, atol=1e-2)
    # the scales of the norms are elsewhere
    for path in ("layers.0.input_layernorm", "norm"):
        weight = model.model.get_submodule(path).weight
        assert torch.equal(weight, torch.full_like(weight, 0.0 if name == "gemma" else 1.0))
    undo()
    for (key, a), (_, b) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert model.config.tie_word_embeddings == dense.config.tie_word_embeddings
    assert count_parameters(model) == count_parameters(dense)


@torch.no_grad()
def test_channels_are_the_principal_directions():
    """What the norms read, divided by its root mean square, has uncorrelated channels, the strongest first."""
    model, _ = rotated(MODELS["qwen3"]())
    seen = []
    norms = [m for n, m in model.named_modules() if n.endswith(("layernorm", "model.norm"))]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in batches(model):
        model(**batch)
    x = torch.cat(seen).double()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    moments = x.T @ x / len(x)
    off = moments - moments.diagonal().diag()
    assert float(off.abs().max()) < 1e-4 * float(moments.diagonal().max())
    assert bool((moments.diagonal().diff() < 1e-6).all())


@torch.no_grad()
def test_a_stream_in_a_subspace_is_cut_without_loss():
    """Hidden states that lie in 20 of 32 dimensions, none of which is a channel."""
    dense = untied("llama", rms_norm_eps=1e-9)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 20, generator=generator)).Q
    for part in find_group_sets(dense, hidden=True)[0].slices:
        if not part.consumes and "norm" not in part.parameter:
            weight = dense.get_parameter(part.parameter)
            weight.copy_(basis @ basis.T @ weight if part.dim == 0 else weight @ basis @ basis.T)
    model, _ = rotated(copy.deepcopy(dense))
    plan = hidden_plan(model, range(20))
    weights = scaled_norms(model, plan)
    apply_plan(model, plan, weights=weights)
    assert model.config.hidden_size == 20
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


def test_adams_state_is_turned():
    """The turned model takes the step that turned gradients take, and second moments keep their size."""
    model = MODELS["llama"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        model(**inputs(model, seed)).logits.square().mean().backward()
        optimizer.step()
    writer = model.model.embed_tokens.weight
    reader = model.model.layers[1].mlp.up_proj.weight
    scale = model.model.layers[1].post_attention_layernorm.weight.detach().clone()
    before = {w: (w.detach().clone(), {k: v.clone() for k, v in optimizer.state[w].items()}) for w in (writer, reader)}
    rotated(model, [optimizer])
    # the rotation, from a writer before and after
    q = torch.linalg.lstsq(before[writer][0], writer.detach()).solution
    torch.testing.assert_close(q.T @ q, torch.eye(32), atol=1e-3, rtol=0)
    first, second = optimizer.state[writer]["exp_avg"], optimizer.state[writer]["exp_avg_sq"]
    torch.testing.assert_close(first, before[writer][1]["exp_avg"] @ q, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(second.sum(), before[writer][1]["exp_avg_sq"].sum(), rtol=1e-3, atol=0)
    assert bool((second >= 0).all())
    torch.testing.assert_close(
        optimizer.state[reader]["exp_avg"], before[reader][1]["exp_avg"] / scale @ q, atol=1e-5, rtol=1e-3
    )
    assert optimizer.state[writer]["step"] == 3
    optimizer.zero_grad()
    model(**inputs(model)).logits.square().mean().backward()
    optimizer.step()


def test_an_untied_head_is_trained():
    model = MODELS["llama-tied"]()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 1e-2}])
    _, undo = rotated(model, [optimizer])
    head = model.lm_head.weight
    assert any(p is head for p in optimizer.param_groups[0]["params"])
    before = head.detach().clone()
    model(**inputs(model)).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(head, before)
    undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p is head for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("name", "says"), [("gpt2", "subtracts the mean"), ("bert", "mean"), ("gemma2", "added"), ("olmo2", "added")]
)
def test_refused_where_norms_stand_in_the_way(name, says):
    model = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=says):
        rotated(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=False))
