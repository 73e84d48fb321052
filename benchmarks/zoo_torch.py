"""Rows of benchmarks/any_module.py: modules as users write them from what torch itself has."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from any_module_models import CLASSES, Row, call, cross_entropy, spread
from torch import Tensor, nn


class Translator(nn.Module):
    """Embeddings around ``nn.Transformer``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.position = nn.Parameter(torch.randn(1, 12, 32) * 0.1)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        source = self.embed(source) + self.position[:, : source.shape[1]]
        target = self.embed(target) + self.position[:, : target.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(source, target, tgt_mask=mask))


class TokenClassifier(nn.Module):
    """Embedding, ``nn.TransformerEncoder``, mean over tokens, linear layer."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(dim=1))


class UNet(nn.Module):
    """Three levels, skips by concatenation, transposed convolutions up."""

    def __init__(self, base: int = 16) -> None:
        super().__init__()
        widths = [base, 2 * base, 4 * base]
        self.down = nn.ModuleList(
            self._double(before, after) for before, after in zip([3, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, 2) for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.merge = nn.ModuleList(self._double(2 * width, width) for width in widths[-2::-1])
        self.out = nn.Conv2d(base, CLASSES, 1)

    def _double(self, before: int, after: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (before, after):
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.out(x)


class LSTMClassifier(nn.Module):
    """Embedding, two LSTM layers, the last hidden state to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class GRUTagger(nn.Module):
    """Embedding, a GRU in both directions, a label for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.gru = nn.GRU(24, 32, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.gru(self.embed(ids))[0]))


class Tabular(nn.Module):
    """Embeddings of categories beside numbers with batch norm, then an MLP with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.categories = nn.ModuleList(nn.Embedding(size, width) for size, width in ((7, 4), (12, 6), (5, 3)))
        self.numbers = nn.BatchNorm1d(9)
        widths = [22, 64, 48, 32]
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.layers += nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        embedded = [embed(categories[:, column]) for column, embed in enumerate(self.categories)]
        return self.head(self.layers(torch.cat([self.numbers(numbers), *embedded], dim=1)))


class Generator(nn.Sequential):
    """DCGAN's generator: transposed convolutions from noise to pictures of 32 x 32."""

    def __init__(self, noise: int = 16, base: int = 16) -> None:
        super().__init__()
        widths = [noise, 4 * base, 2 * base, base]
        for level, (before, after) in enumerate(itertools.pairwise(widths)):
            stride, padding = (1, 0) if level == 0 else (2, 1)
            self.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
            self.extend([nn.BatchNorm2d(after), nn.ReLU()])
        self.extend([nn.ConvTranspose2d(base, 3, 4, 2, 1), nn.Tanh()])


class Discriminator(nn.Sequential):
    """DCGAN's discriminator for pictures of 32 x 32."""

    def __init__(self, base: int = 16) -> None:
        super().__init__()
        for before, after in ((3, base), (base, 2 * base), (2 * base, 4 * base)):
            self.append(nn.Conv2d(before, after, 4, 2, 1, bias=before == 3))
            if before > 3:
                self.append(nn.BatchNorm2d(after))
            self.append(nn.LeakyReLU(0.2))
        self.extend([nn.Conv2d(4 * base, 1, 4), nn.Flatten()])


def _all_inputs(model: Any, batch: Any) -> Any:
    return model(*batch[0])


def _words() -> Any:
    return torch.randint(50, (2, 10)), torch.randint(CLASSES, (2,))


def _tags() -> Any:
    return torch.randint(50, (2, 10)), torch.randint(CLASSES, (2, 10))


def _pairs() -> Any:
    return (torch.randint(50, (2, 12)), torch.randint(50, (2, 8))), torch.randint(50, (2, 8))


def _table() -> Any:
    return (torch.randn(8, 9), torch.randint(5, (8, 3))), torch.randint(CLASSES, (8,))


def _pixel_loss(outputs: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def _real_or_not(outputs: Any, batch: Any) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, batch[1])


ROWS = (
    Row("torch", "nn.Transformer", Translator, _pairs, "translation", _all_inputs, cross_entropy),
    Row(
        "torch",
        "nn.TransformerEncoder",
        lambda: TokenClassifier(False),
        _words,
        "text",
        call,
        cross_entropy,
    ),
    Row(
        "torch",
        "nn.TransformerEncoder, norm first",
        lambda: TokenClassifier(True),
        _words,
        "text",
        call,
        cross_entropy,
    ),
    Row(
        "torch",
        "U-Net",
        UNet,
        lambda: (torch.randn(2, 3, 32, 32), torch.randint(CLASSES, (2, 32, 32))),
        "segmentation",
        call,
        _pixel_loss,
    ),
    Row("torch", "LSTM classifier", LSTMClassifier, _words, "text", call, cross_entropy),
    Row("torch", "GRU tagger", GRUTagger, _tags, "text", call, cross_entropy),
    Row("torch", "tabular MLP", Tabular, _table, "tabular", _all_inputs, cross_entropy),
    Row("torch", "DCGAN generator", Generator, lambda: (torch.randn(4, 16, 1, 1),), "GAN", call, spread),
    Row(
        "torch",
        "DCGAN discriminator",
        Discriminator,
        lambda: (torch.randn(4, 3, 32, 32), torch.rand(4, 1)),
        "GAN",
        call,
        _real_or_not,
    ),
)
