"""Small real models that the tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune import find_group_sets, find_model
from lit_prune.architectures import registry as architectures
from lit_prune.calibration import statistic_registry
from lit_prune.groups import GroupSet
from lit_prune.ranking import registry as criteria

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny(model_type: str = "llama", attn: str = "sdpa", **overrides: object) -> nn.Module:
    """A tiny random model with every weight, bias and norm away from its initial constant."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **overrides})
    return unsettled(AutoModelForCausalLM.from_config(config, attn_implementation=attn))


def unsettled(model: nn.Module) -> nn.Module:
    """The model with every weight, bias and norm away from its initial constant, in eval mode.

    What is not trained (sinusoids) stays: some models do not save it.
    """
    for parameter in (p for p in model.parameters() if p.requires_grad):
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model.eval()


def uneven_kept(group_sets: Sequence[GroupSet]) -> list[list[int]]:
    """Kept groups that differ from set to set; the last one stays whole."""
    generator = torch.Generator().manual_seed(1)
    kept = []
    for position, group_set in enumerate(group_sets):
        least = max(1, group_set.minimum)
        count = group_set.size if position == len(group_sets) - 1 else max(least, group_set.size - 1 - position % 3)
        parts, size = group_set.equal_parts, group_set.size // group_set.equal_parts
        own = [torch.randperm(size, generator=generator)[: count // parts].tolist() for _ in range(parts)]
        kept.append(sorted(part * size + group for part, groups in enumerate(own) for group in groups))
    return kept


def zeroed(model: nn.Module, kept: Sequence[Sequence[int]]) -> nn.Module:
    """A dense copy with the weights of the removed groups set to zero: the oracle of surgery."""
    model = copy.deepcopy(model)
    parameters = dict(find_model(model)[1].named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group_set, keep in zip(find_group_sets(model), kept, strict=True):
            for group in set(range(group_set.size)) - set(keep):
                for part in group_set.slices:
                    parameters[part.parameter].index_fill_(part.dim, part.index[group], 0.0)
    return model


def skipping(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy whose modules of these names give the hidden states that they are called with: the oracle of blocks."""

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model = copy.deepcopy(model)
    for name in names:
        find_model(model)[1].get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids of shape (2, 12)."""
    return torch.randint(0, SMALL["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Three batches of token ids of shape (2, 10)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, SMALL["vocab_size"], (2, 10), generator=generator) for _ in range(3)]


@pytest.fixture
def loss_of() -> Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]:
    """The causal loss of a model as a function of a batch of token ids."""
    return lambda model: lambda ids: model(input_ids=ids, labels=ids).loss


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What any test registers (criteria, statistics, architectures) is forgotten after it."""
    known = [criteria._REGISTRY, statistic_registry._REGISTRY, statistic_registry.INPUT_SUMS]
    before, described = [dict(registry) for registry in known], list(architectures._REGISTRY)
    yield
    for registry, content in zip(known, before, strict=True):
        # the same objects, which others have imported
        registry.clear()
        registry.update(content)
    architectures._REGISTRY[:] = described
