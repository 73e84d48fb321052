"""Small models of convolutions with their groups, named by hand: nothing here finds groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_prune.groups import GroupSet, Slice, group_cost


def singles(count: int) -> Tensor:
    """Groups of one position each."""
    return torch.arange(count)[:, None]


def group_set(model: nn.Module, name: str, parts: list[Slice], layer: int = 0) -> GroupSet:
    return GroupSet(name, layer, "channel", len(parts[0].index), group_cost(model, parts), tuple(parts), minimum=1)


class TwoReaders(nn.Module):
    """Channels of a stem that a convolution, a branch of another kernel and, after pooling, a linear layer read."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.first = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 5, 1, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Linear(5 * 4 * 4 + 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm2(self.first(x) + self.second(x)).relu()
        return self.head(torch.cat([y.flatten(1), x.mean(dim=(2, 3))], dim=1))

    def group_sets(self) -> list[GroupSet]:
        norm = [Slice(f"norm.{n}", 0, singles(6)) for n in ("weight", "bias") if isinstance(self.norm, nn.BatchNorm2d)]
        stem = [
            Slice("stem.weight", 0, singles(6), 1),
            Slice("stem.bias", 0, singles(6)),
            *norm,
            Slice("first.weight", 1, singles(6), 1),
            Slice("second.weight", 1, singles(6), 1),
            Slice("head.weight", 1, 80 + singles(6), 1),
        ]
        norm2 = [
            Slice(f"norm2.{n}", 0, singles(5)) for n in ("weight", "bias") if isinstance(self.norm2, nn.BatchNorm2d)
        ]
        flat = torch.arange(80).view(5, 16)
        middle = [
            Slice("first.weight", 0, singles(5), 1),
            Slice("first.bias", 0, singles(5)),
            Slice("second.weight", 0, singles(5), 1),
            *norm2,
            Slice("head.weight", 1, flat, 1),
        ]
        return [group_set(self, "stem", stem), group_set(self, "first", middle, 1)]


KINDS = {
    "1d, dilated": lambda: (nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2), (9,)),
    "2d, same": lambda: (nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), (5, 4)),
    "2d, no bias": lambda: (nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=(1, 0), bias=False), (5, 6)),
    "3d": lambda: (nn.Conv3d(6, 4, 2, stride=2), (4, 4, 4)),
    "1d, transposed": lambda: (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1), (6,)),
    "2d, transposed": lambda: (nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), dilation=(1, 2)), (4, 4)),
    "linear": lambda: (nn.Linear(6, 4), ()),
}


class Chain(nn.Module):
    """A layer that gives six channels, and a layer of a given kind that reads them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.read, self.spatial = KINDS[kind]()
        produce = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(self.spatial)]
        self.produce = produce(3, 6) if produce is nn.Linear else produce(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.produce(x).relu())

    def batches(self, count: int = 4, size: int = 8) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        dtype = self.read.weight.dtype
        return [torch.randn(size, 3, *self.spatial, generator=generator, dtype=dtype) for _ in range(count)]

    def group_sets(self) -> list[GroupSet]:
        dim = 0 if isinstance(self.read, nn.ConvTranspose1d | nn.ConvTranspose2d) else 1
        parts = [
            Slice("produce.weight", 0, singles(6), 1),
            Slice("produce.bias", 0, singles(6)),
            Slice("read.weight", dim, singles(6), dim),
        ]
        return [group_set(self, "produce", parts)]
