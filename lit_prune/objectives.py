"""The loss that the command line calibrates a model by, and what it measures on held-out inputs.

==========================  ====================================  ======================================
model                       loss                                  measured
==========================  ====================================  ======================================
causal language model       next token                            perplexity
masked language model       tokens that were masked               perplexity of those
classifier                  cross-entropy with the labels         loss and accuracy
classifier, no labels       cross-entropy with labels drawn from  agreement with the dense model's
                            what the dense model predicts         classes
no head, or a regression    squared error to the dense model's    relative error of the outputs
                            outputs plus normal noise
==========================  ====================================  ======================================

The mean squared gradient of a loss with drawn targets is the Fisher information itself, for which the gradients with labels
are a substitute (Kunstner et al., Limitations of the Empirical Fisher Approximation, NeurIPS 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LABELS, TARGET, DENSE = "labels", "target", "dense"
IGNORED = -100
# share of the tokens of a text that is masked
_MASKED = 0.15

Batch = dict[str, Tensor]


def causal_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        model: A causal language model.
        batch: ``"input_ids"`` of shape ``(batch, tokens)``.
    """
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy with the labels of a batch, or half the mean squared error to its target.

    Args:
        model: The model.
        batch: Its inputs, and ``"labels"`` or ``"target"``.
    """
    return _loss_of(_outputs(model, batch), batch)


def _loss_of(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    if TARGET in batch:
        return 0.5 * (outputs.float() - batch[TARGET]).square()[_counts(outputs, batch)].mean()
    return functional.cross_entropy(
        outputs.flatten(0, -2).float(), batch[LABELS].flatten(), ignore_index=IGNORED, reduction="mean"
    )


def forward_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model is called with: a batch without labels and targets."""
    return {name: value for name, value in batch.items() if name not in (LABELS, TARGET, DENSE)}


def _outputs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits, of shape ``(batch, [tokens,] classes)``, or the last hidden states of a model without a head."""
    output = model(**forward_inputs(batch))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _counts(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions are no padding, a mask of shape ``(batch,)`` or ``(batch, tokens)``."""
    mask = batch.get("attention_mask")
    shape = outputs.shape[:-1]
    return (
        torch.ones(shape, dtype=torch.bool, device=outputs.device) if mask is None or mask.shape != shape else mask > 0
    )


def masked_tokens(batch: Batch, special: Sequence[int], mask_id: int, generator: torch.Generator) -> Batch:
    """A batch in which some tokens are masked, with these as labels: 15% of those that are not special, at least one a text.

    Args:
        batch: ``"input_ids"`` of shape ``(batch, tokens)``.
        special: Ids of special tokens.
        mask_id: Id of the token that stands for a masked one.
        generator: Draws the tokens.
    """
    ids = batch["input_ids"]
    allowed = ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype))
    drawn = torch.rand(ids.shape, generator=generator).masked_fill(~allowed, 2.0)
    wanted = (allowed.sum(dim=1, keepdim=True) * _MASKED).ceil()
    chosen = (drawn.argsort(dim=1).argsort(dim=1) < wanted) & allowed
    return {**batch, "input_ids": ids.masked_fill(chosen, mask_id), LABELS: ids.masked_fill(~chosen, IGNORED)}


@torch.no_grad()
def with_drawn_targets(model: Any, batch: Batch, generator: torch.Generator) -> Batch:
    """A batch with what the dense model gives (``"dense"``), and labels or a target drawn from what it predicts.

    Args:
        model: The dense model.
        batch: Its inputs.
        generator: Draws on the CPU.
    """
    outputs = _outputs(model, batch).float()
    counts = _counts(outputs, batch)
    if _classifies(model, outputs):
        probabilities = outputs.softmax(dim=-1).flatten(0, -2).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator).view(outputs.shape[:-1]).to(outputs.device)
        return {**batch, LABELS: drawn.masked_fill(~counts, IGNORED), DENSE: outputs.argmax(dim=-1)}
    noise = torch.randn(outputs.shape, generator=generator).to(outputs.device)
    return {**batch, TARGET: outputs + outputs.std() * noise, DENSE: outputs}


def _classifies(model: Any, outputs: Tensor) -> bool:
    """Whether outputs are the logits of classes."""
    return (
        outputs.shape[-1] > 1
        and outputs.shape[-1] == getattr(model.config, "num_labels", None)
        and "For" in type(model).__name__
    )


@torch.inference_mode()
def measure(model: Any, batches: Sequence[Mapping[str, Tensor]], *, causal: bool, masked: bool) -> dict[str, float]:
    """Measure a model on held-out batches; see the table above.

    Args:
        model: The model.
        batches: The batches, read once.
        causal: Whether it is a causal language model.
        masked: Whether the labels are tokens that were masked.
    """
    losses, right, total, error, size = [], 0, 0, 0.0, 0.0
    drawn = target = False
    for batch in batches:
        if causal:
            losses.append(float(causal_loss(model, batch)))
            continue
        outputs = _outputs(model, batch).float()
        losses.append(float(_loss_of(outputs, batch)))
        if TARGET in batch:
            target, counts = True, _counts(outputs, batch)
            error += float((outputs - batch[DENSE])[counts].square().sum())
            size += float(batch[DENSE][counts].square().sum())
            continue
        counts = batch[LABELS] != IGNORED
        drawn = drawn or DENSE in batch
        right += int((outputs.argmax(dim=-1) == batch.get(DENSE, batch[LABELS]))[counts].sum())
        total += int(counts.sum())
    mean = sum(losses) / len(losses)
    if causal or masked:
        return {"perplexity" if causal else "masked_perplexity": math.exp(min(mean, 700.0))}
    if target:
        return {"relative_error": math.sqrt(error / max(size, 1e-30))}
    return {"agreement": right / max(1, total)} if drawn else {"loss": mean, "accuracy": right / max(1, total)}
