"""Small models that no description covers, as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 4


class ConvNet(nn.Module):
    """Convolutions with batch norms, one of them in a residual branch."""

    def __init__(self, classes: int = CLASSES, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(width, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, width, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.relu(self.norm(x + self.branch(x)))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Self-attention with one projection to queries, keys and values, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings and two layers."""

    def __init__(self, classes: int = CLASSES, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.layers = nn.ModuleList([Layer(width, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, classes: int = CLASSES, width: int = 12) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, 10), nn.ReLU(), nn.Linear(10, classes))

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x.transpose(1, 2).flatten(2))
        return self.head(hidden[:, -1])


class Perceptron(nn.Module):
    """Two hidden layers."""

    def __init__(self, classes: int = CLASSES, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": ConvNet,
    "vit": VisionTransformer,
    "lstm": Recurrent,
    "mlp": Perceptron,
}


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 8 by 8 and classes that can be told from them."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count,), generator=generator)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    x[torch.arange(count), 0, classes] += 2.0
    return x, classes


def built(name: str) -> nn.Module:
    """A model whose norms have run on data."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for step in range(3):
        model.train()(images(8, step)[0])
    return model


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and classes."""
    return [images(size, 10 + n) for n in range(count)]


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """The loss of a batch."""
    return lambda batch: functional.cross_entropy(model(batch[0]), batch[1])
