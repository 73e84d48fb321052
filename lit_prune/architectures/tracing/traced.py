"""Convolutional networks: torch-pruning's dependency graph finds which channels are coupled; the rest is as everywhere.

Needs the package ``torch-pruning`` (``pip install lit_prune[cnn]``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.architectures.components import Block
from lit_prune.architectures.plain_modules import CONVOLUTIONS, check_plain
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, GroupSet, Slice, group_cost

# where a norm remembers which channels it still has of those before the last cut
_CHANNELS = "_lit_prune_channels"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Traced(Block):
    """A network of convolutions, linear layers, norms and whatever has no parameters, described by tracing it.

    One group is one output channel with everything that is coupled to it: the same channel of all layers that are added
    to each other, of their norms, and the weights that read it. Groups that nothing in the network reads are its
    outputs, and stay.

    Args:
        example_inputs: Gives the positional arguments to trace the network with, on the model's device.
        ignored: Names of modules whose output channels stay.
        kind: What the group table calls these groups.

    Reference: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023.
    """

    example_inputs: Callable[[], Sequence[Any]]
    ignored: tuple[str, ...] = ()
    kind: str = "channel"
    path: str = ""
    having: str | None = None
    optional: bool = True

    def group_sets(self, model: nn.Module, pruned: Collection[tuple[str, str]]) -> Iterator[GroupSet]:
        """Trace the model and describe its channels.

        Raises:
            UnsupportedModelError: If torch-pruning is not installed, or a coupled module is of a type that cannot be cut.
        """
        try:
            import torch_pruning
        except ImportError as error:
            raise UnsupportedModelError(
                f"Tracing {type(model).__name__} needs torch-pruning: pip install 'lit_prune[cnn]'."
            ) from error
        graph = torch_pruning.DependencyGraph()
        with _traceable(model):
            graph.build_dependency(
                model, example_inputs=tuple(self.example_inputs()), output_transform=_differentiable, verbose=False
            )
        ignored = [model.get_submodule(name) for name in self.ignored]
        names = {module: name for name, module in model.named_modules()}
        for layer, coupled in enumerate(graph.get_all_groups(ignored)):
            found = self._group_set(model, names, layer, coupled, graph)
            if found is not None:
                yield found

    def group_set(self, model: nn.Module, name: str, layer: int, pruned: Collection[tuple[str, str]]) -> GroupSet:
        """The channels whose root is the module ``name``.

        Raises:
            UnsupportedModelError: If no channels have that root.
        """
        for found in self.group_sets(model, pruned):
            if found.name == name:
                return found
        raise UnsupportedModelError(f"No channels of {type(model).__name__} are rooted at {name!r}.")

    def _group_set(
        self, model: nn.Module, names: dict[nn.Module, str], layer: int, coupled: Any, graph: Any
    ) -> GroupSet | None:
        root = names[coupled[0].dep.target.module]
        size = len(coupled[0].idxs)
        slices: list[Slice] = []
        adaptations: list[Adaptation] = []
        for item in coupled:
            module = item.dep.target.module
            if not _has_parameters(module):
                continue
            name = names.get(module)
            if name is None:
                raise UnsupportedModelError(
                    f"The channels of {root!r} are coupled to a parameter outside of any layer, of shape"
                    f" {tuple(module.shape)}, which cannot be cut. Add {root!r} to `ignored`."
                )
            index = _by_group(item, size, name, root)
            produces = graph.is_out_channel_pruning_fn(item.dep.handler)
            slices.extend(_slices(module, name, index, produces, root))
            if isinstance(module, _NORMS) and module.running_mean is not None:
                adaptations.append(Adaptation(name, _running_statistics(index, len(module.running_mean))))
        if not any(s.consumes for s in slices):
            return None
        parts = tuple(slices)
        return GroupSet(
            root, layer, self.kind, size, group_cost(model, parts), parts, minimum=1, adaptations=tuple(adaptations)
        )


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients of everything: tracing follows them."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of a forward's output that have a gradient."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Parameter) or next(module.parameters(recurse=False), None) is not None


def _by_group(item: Any, size: int, name: str, root: str) -> Tensor:
    """Positions in a module by group, shape ``(groups, width)``."""
    positions: list[list[int]] = [[] for _ in range(size)]
    for position, group in zip(item.idxs, item.root_idxs, strict=True):
        positions[group].append(position)
    widths = {len(p) for p in positions}
    if len(widths) != 1:
        raise UnsupportedModelError(
            f"{name!r} has {sorted(widths)} channels for each channel of {root!r}; expected the same number for all of"
            f" them. Add {root!r} to `ignored`."
        )
    return torch.tensor(positions)


def _slices(module: nn.Module, name: str, index: Tensor, produces: bool, root: str) -> Iterator[Slice]:
    check_plain(module, name)
    if isinstance(module, CONVOLUTIONS) and module.groups != 1:
        raise UnsupportedModelError(
            f"{name!r} is a convolution in {module.groups} groups of channels, which cannot be cut. Add {root!r} to"
            " `ignored`."
        )
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        yield Slice(f"{name}.weight", 0 if produces else 1, index, 1)
        if produces and module.bias is not None:
            yield Slice(f"{name}.bias", 0, index)
    elif isinstance(module, (*_NORMS, nn.LayerNorm)) and module.weight is not None and module.weight.dim() == 1:
        yield Slice(f"{name}.weight", 0, index)
        if module.bias is not None:
            yield Slice(f"{name}.bias", 0, index)
    else:
        raise UnsupportedModelError(
            f"{name!r} is a {type(module).__name__}; expected a convolution, a linear layer or a norm over its channels."
            f" Add {root!r} to `ignored`."
        )


def _running_statistics(index: Tensor, length: int) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    """The adaptation of a batch norm: its running statistics follow its channels.

    Several sets may have channels of one norm (behind a concatenation). Each counts them as they were before the cut; the
    norm remembers which of those it still has.

    Args:
        index: The channels of every group of the set.
        length: Number of the norm's channels before the cut.
    """

    def apply(module: nn.Module, kept: Tensor) -> Callable[[], None]:
        names = ("running_mean", "running_var", "num_features")
        before = {n: getattr(module, n) for n in names}
        remembered = vars(module).get(_CHANNELS)
        # as many as before the cut: no other set was here yet
        channels = range(length) if remembered is None or len(before["running_mean"]) == length else remembered
        gone = set(index.flatten().tolist()) - set(index[kept].flatten().tolist())
        stay = [position for position, channel in enumerate(channels) if channel not in gone]
        positions = torch.tensor(stay, dtype=torch.long, device=before["running_mean"].device)
        module.running_mean = before["running_mean"][positions]
        module.running_var = before["running_var"][positions]
        module.num_features = len(stay)  # type: ignore[assignment]
        vars(module)[_CHANNELS] = [channels[position] for position in stay]

        def undo() -> None:
            for name, value in before.items():
                setattr(module, name, value)
            if remembered is None:
                del vars(module)[_CHANNELS]
            else:
                vars(module)[_CHANNELS] = remembered

        return undo

    return apply
