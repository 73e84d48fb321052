"""How far a model whose gates are closed for some groups is from the whole one, on what it is trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.calibration.divergence import output_divergence, without_labels
from lit_prune.calibration.gates import Gates
from lit_prune.calibration.token_masks import output_mask
from lit_prune.errors import CalibrationError


class Agreement:
    r"""Measures :math:`\mathrm{KL}(p_\mathrm{whole}\,\|\,p_\mathrm{gated})` of every forward pass that goes through gates.

    Of logits that are numbers it is the squared error, see :func:`lit_prune.calibration.divergence.output_divergence`.
    The model is run once more for it, with all gates open and without gradients. Its gradient has far less noise than that
    of the loss: it is 0 for every sample where nothing is removed. A context manager, which sets a hook.

    Args:
        model: The model, whose outputs have ``logits``.
        gates: Its gates.
    """

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        self._model, self._gates = model, gates
        self._terms: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Agreement:
        self._handle = self._model.register_forward_hook(self._compare, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _compare(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._gates.is_open:
            return
        logits = getattr(output, "logits", None)
        if logits is None:
            raise CalibrationError(
                f"Gates that learn to agree with the whole model compare logits; the output of {type(model).__name__} is a"
                f" {type(output).__name__} without any. Learn them by the loss alone (distillation=0)."
            )
        with self._gates.closed(), torch.no_grad():
            whole = model.forward(*args, **without_labels(model, kwargs)).logits
        mask = output_mask(model, args, kwargs, logits.shape[:-1])
        self._terms.append(output_divergence(model, logits, whole, mask=mask))

    def forget(self) -> None:
        """Drop the passes since the last call of :meth:`take`."""
        self._terms.clear()

    def take(self) -> Tensor:
        """Return the mean over the passes since the last call.

        Raises:
            CalibrationError: If there was none.
        """
        terms, self._terms = self._terms, []
        if not terms:
            raise CalibrationError(
                "The step did not run the forward of the model whose gates are learned (it may call parts of it), so there"
                " are no logits to compare. Learn the gates by the loss alone (distillation=0)."
            )
        return torch.stack(terms).mean()
