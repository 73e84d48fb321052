"""How much experts add to their layer: router weight times the norm of the output, over the tokens that go to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.calibration.evaluation import is_observed
from lit_prune.calibration.token_masks import TokenMasks, recomputing
from lit_prune.errors import CalibrationError
from lit_prune.groups import BLOCK, GroupSet

Key = tuple[str, str]


def expert_modules(model: nn.Module, group_sets: Sequence[GroupSet]) -> dict[Key, str]:
    """Return, by key of the sets whose groups are whole experts of a fused module, the path of that module."""
    found: dict[Key, str] = {}
    for group_set in group_sets:
        if group_set.kind == BLOCK or group_set.consumers:
            continue
        fused = [part.module for part in group_set.slices if model.get_parameter(part.parameter).dim() == 3]
        if fused:
            found[group_set.key] = fused[0]
    return found


class RoutedOutputs:
    r"""Observes, for each expert, :math:`\sum_{x\in X_j} g_j(x)\,\|f_j(x)\|_2` and the number of tokens :math:`|X_j|`.

    :math:`X_j` are the real tokens that the router sends to expert j, :math:`g_j` the weight that it gives the expert there,
    and :math:`f_j` the expert's output. A module of experts gives only their sum; so it is run again for each of a token's
    experts, with that one alone and a weight of 1, whichever implementation it has. That costs one more run of the experts.

    Where the router's weight multiplies the inputs of the experts (every expert reads all tokens, those that are not sent to
    it as zeros), it is :math:`\|f_j(g_j(x)\,x)\|_2`.

    Args:
        model: The model.
        group_sets: Its group sets; those of other groups than experts get 0.
        token_masks: Tells which tokens are real; it has to be entered first.
    """

    def __init__(self, model: nn.Module, group_sets: Sequence[GroupSet], token_masks: TokenMasks) -> None:
        self._model, self._group_sets, self._token_masks = model, group_sets, token_masks
        self._paths = expert_modules(model, group_sets)
        self._sums = {s.key: torch.zeros(s.size, dtype=torch.float64) for s in group_sets}
        # one token for groups that are no experts
        counted = {s.key: float(s.key not in self._paths) for s in group_sets}
        self._tokens = {s.key: torch.full((s.size,), counted[s.key], dtype=torch.float64) for s in group_sets}
        self._batch: list[tuple[Key, Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RoutedOutputs:
        for key, path in self._paths.items():
            hook = self._observe(key, path)
            self._handles.append(self._model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def end_batch(self) -> None:
        """Add up what the batch's forward pass has left."""
        for key, sums, tokens in self._batch:
            self._sums[key] += sums.cpu()
            self._tokens[key] += tokens.cpu()
        self._batch.clear()

    def skip_batch(self) -> None:
        """Drop what the batch's forward pass has left."""
        self._batch.clear()

    def finish(self) -> dict[Key, Tensor]:
        """Return the sums over the tokens of each expert, by key, tensors of shape ``(groups,)``."""
        return self._sums

    def counts(self) -> dict[Key, Tensor]:
        """Return the number of tokens of each expert, likewise."""
        return self._tokens

    def _observe(self, key: Key, path: str) -> Callable[..., None]:
        size = next(s.size for s in self._group_sets if s.key == key)

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not is_observed() or recomputing():
                return
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if len(tensors) == 1 and isinstance(output, Tensor) and len(tensors[0]) % size == 0:
                experts, norms = self._of_all(tensors[0], output, size)
            elif len(tensors) == 3 and sum(t.is_floating_point() for t in tensors) == 2:
                experts, norms = self._of_chosen(module, args, kwargs, tensors, size)
            else:
                shapes = [tuple(t.shape) for t in tensors]
                raise CalibrationError(
                    f"{path} ({type(module).__name__}) was called with tensors of the shapes {shapes}; expected hidden"
                    " states, indices of experts and router weights. Rank its experts by another criterion (fisher)."
                )
            sums, tokens = (torch.zeros(size, dtype=torch.float64, device=norms.device) for _ in range(2))
            sums.index_add_(0, experts, norms.double())
            tokens.index_add_(0, experts, torch.ones_like(norms, dtype=torch.float64))
            self._batch.append((key, sums, tokens))

        return hook

    def _real(self, hidden: Tensor) -> Tensor:
        """Whether each of the tokens is real, shape ``(tokens,)``."""
        mask = self._token_masks.of(hidden)
        return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device) if mask is None else mask.flatten()

    def _of_chosen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor], size: int
    ) -> tuple[Tensor, Tensor]:
        """For every token and choice of it that counts, the expert and the weighted norm of its output."""
        index = next(t for t in tensors if not t.is_floating_point())
        hidden, weights = (t for t in tensors if t.is_floating_point())
        real = self._real(hidden)
        experts, norms = [], []
        for slot in range(index.shape[1]):
            alone = {id(index): index[:, slot : slot + 1], id(weights): torch.ones_like(weights[:, :1])}
            output = module.forward(
                *(alone.get(id(a), a) for a in args), **{name: alone.get(id(a), a) for name, a in kwargs.items()}
            )
            # an index beyond the experts is one that another process holds
            counts = real & (index[:, slot] < size)
            norm = weights[:, slot].float() * output.float().norm(dim=-1)
            experts.append(index[counts, slot])
            norms.append(norm[counts])
        return torch.cat(experts), torch.cat(norms)

    def _of_all(self, inputs: Tensor, output: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The same where every expert is given all tokens, as zeros where they are not sent to it."""
        by_expert = inputs.view(size, -1, inputs.shape[-1])
        sent = (by_expert != 0).any(dim=-1) & self._real(by_expert[0])
        experts = torch.arange(size, device=inputs.device)[:, None].expand_as(sent)
        norms = output.reshape(size, -1, output.shape[-1]).float().norm(dim=-1)
        return experts[sent], norms[sent]
