"""Rows of benchmarks/any_module.py: five odd modules, each a mix of what no library's model has together."""

from __future__ import annotations

from typing import Any

import torch
from any_module_models import CLASSES, Row, call, cross_entropy, spread
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class SharedWeights(nn.Module):
    """An autoencoder whose decoder is the encoder transposed, with weight norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(20, 48))
        self.encoder = nn.Linear(48, 32)
        self.bias = nn.Parameter(torch.randn(48) * 0.1)
        self.last = weight_norm(nn.Linear(48, 20))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(torch.relu(self.first(x))))
        return self.last(torch.relu(nn.functional.linear(code, self.encoder.weight.t(), self.bias)))


class CalledTwice(nn.Module):
    """One block that runs twice on a residual stream, and one projection read by two heads."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(width, 40, 3, padding=1), nn.BatchNorm2d(40), nn.SiLU(), nn.Conv2d(40, width, 1)
        )
        self.first = nn.Linear(width, CLASSES)
        self.second = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.block(x)
        x = (x + self.block(x)).mean(dim=(2, 3))
        return self.first(x), self.second(x)


class ManyInputs(nn.Module):
    """A dictionary of a picture, numbers and tokens in; a dictionary of three outputs out."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.GELU(), nn.Conv2d(16, 32, 3, 2), nn.GELU())
        self.numbers = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 24))
        self.tokens = nn.EmbeddingBag(40, 16)
        self.joint = nn.Linear(32 + 24 + 16, 64)
        self.heads = nn.ModuleDict({"label": nn.Linear(64, CLASSES), "value": nn.Linear(64, 1)})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        picture = self.picture(batch["picture"]).amax(dim=(2, 3))
        parts = [picture, self.numbers(batch["numbers"]), self.tokens(batch["tokens"])]
        joint = torch.relu(self.joint(torch.cat(parts, dim=1)))
        return {
            **{name: head(joint) for name, head in self.heads.items()},
            "score": (parts[0][:, :24] * parts[1]).sum(1),
        }


class SuperResolution(nn.Module):
    """Channels last, residual blocks, and pixels from channels twice."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.head = nn.Conv2d(3 * 4, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1), nn.PReLU(2 * width), nn.Conv2d(2 * width, width, 1)
            )
            for _ in range(2)
        )
        self.up = nn.Conv2d(width, 4 * 12, 3, padding=1)
        self.tail = nn.Conv2d(12, 3 * 4, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(nn.functional.pixel_unshuffle(x.to(memory_format=torch.channels_last), 2))
        for block in self.body:
            x = x + 0.2 * block(x)
        x = torch.relu(nn.functional.pixel_shuffle(self.up(x), 2))
        return nn.functional.pixel_shuffle(self.tail(x), 2)


class OwnRMSNorm(nn.Module):
    """A norm of the user's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * self.gain


class GatedMixer(nn.Module):
    """A norm of its own, gates by chunks, squeeze and excite over features, and depthwise convolutions over time."""

    def __init__(self, width: int = 24, inner: int = 40) -> None:
        super().__init__()
        self.stem = nn.Linear(7, width)
        self.norms = nn.ModuleList(OwnRMSNorm(width) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(width, 2 * inner) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(inner, inner, 3, padding=1, groups=inner) for _ in range(2))
        self.squeeze = nn.ModuleList(nn.Linear(inner, 8) for _ in range(2))
        self.excite = nn.ModuleList(nn.Linear(8, inner) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(inner, width) for _ in range(2))
        self.scale = nn.Parameter(torch.full((2, width), 0.5))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for level, norm in enumerate(self.norms):
            value, gate = self.wide[level](norm(x)).chunk(2, dim=-1)
            y = self.local[level]((value * nn.functional.silu(gate)).transpose(1, 2)).transpose(1, 2)
            weight = torch.sigmoid(self.excite[level](torch.relu(self.squeeze[level](y.mean(dim=1)))))
            x = x + self.scale[level] * self.narrow[level](y * weight[:, None])
        return self.head(x.mean(dim=1))


def _dictionary() -> Any:
    picture, numbers = torch.randn(2, 3, 24, 24), torch.randn(2, 6)
    return ({"picture": picture, "numbers": numbers, "tokens": torch.randint(40, (2, 5))},)


ROWS = (
    Row("own", "shared weights, weight norm", SharedWeights, lambda: (torch.randn(4, 20),), "odd", call, spread),
    Row(
        "own", "module called twice, two heads", CalledTwice, lambda: (torch.randn(2, 3, 16, 16),), "odd", call, spread
    ),
    Row("own", "dictionary of inputs and outputs", ManyInputs, _dictionary, "odd", call, spread),
    Row(
        "own",
        "channels last, pixel shuffle",
        SuperResolution,
        lambda: (torch.randn(2, 3, 16, 16),),
        "odd",
        call,
        spread,
    ),
    Row(
        "own",
        "own RMSNorm, GLU, SE, depthwise",
        GatedMixer,
        lambda: (torch.randn(2, 9, 7), torch.randint(CLASSES, (2,))),
        "odd",
        call,
        cross_entropy,
    ),
)
