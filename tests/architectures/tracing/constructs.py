"""Small modules, each with one construct that projects use, as data: a new one is one more line in :data:`CONSTRUCTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Construct:
    """One construct.

    Args:
        build: Builds the model.
        inputs: Gives the positional arguments of its forward.
        sizes: Number of groups of every set, in the order of the run.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[object, ...]]
    sizes: tuple[int, ...]


class Apply(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., object], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: object) -> object:
        return self.function(self, *inputs)


def image(channels: int = 3) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, channels, 8, 8),)


def features(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


def ids() -> tuple[Tensor]:
    return (torch.randint(0, 11, (2, 5)),)


def pooled(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def between(*layers: nn.Module, channels: int = 8) -> Callable[[], nn.Module]:
    """Layers over channels between a convolution and a linear layer."""
    first, last = nn.Conv2d(3, channels, 3, padding=1), nn.LazyLinear(4)
    return lambda: nn.Sequential(first, *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), last)


class OwnRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(pooled(x * gate))


class Attention(nn.Module):
    """Heads of a fused projection; ``how`` they attend, and what is done to queries and keys."""

    def __init__(self, how: str, width: int = 12, heads: int = 4, inner: int = 16) -> None:
        super().__init__()
        self.how, self.num_heads, self.inner = how, heads, inner
        self.qkv, self.proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        self.bias_table = nn.Parameter(torch.randn(9, heads))
        self.register_buffer("bias_index", (torch.arange(5)[:, None] - torch.arange(5)[None]) + 4)
        self.q_norm = nn.LayerNorm(inner // heads)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "rotary":
            angles = torch.arange(n)[:, None] * torch.tensor([1.0, 0.1])
            cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
            q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
        if self.how == "normed":
            q, k = self.q_norm(q), self.q_norm(k)
        if self.how == "sdpa":
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "linear":
            out = q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)
        else:
            scores = q @ k.transpose(-2, -1)
            if self.how == "biased":
                scores = scores + self.bias_table[self.bias_index.view(-1)].view(n, n, -1).permute(2, 0, 1)
            out = scores.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, self.inner))


class ToInputWidth(Attention):
    """As in many vision transformers: the heads are reshaped to the width of the input."""

    def __init__(self) -> None:
        super().__init__("", 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = 4, 2, 4
        self.q, self.kv, self.o = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class SmallViT(nn.Module):
    """Patches, class and register tokens, position embeddings, layer scale, and parameters outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 1, 12))
        self.registers, self.positions = nn.Parameter(torch.randn(1, 2, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.norm, self.attention, self.gamma = (
            nn.LayerNorm(12),
            Attention("sdpa"),
            nn.Parameter(torch.full((12,), 1e-5)),
        )
        self.up, self.hidden_bias, self.down = nn.Linear(12, 10), nn.Parameter(torch.randn(10)), nn.Linear(10, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        x = x + self.gamma * self.attention(self.norm(x))
        x = x + self.gamma * self.down((self.up(x) + self.hidden_bias).relu())
        return self.head(self.norm(x)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: bool | int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


class Packed(nn.Module):
    """Sequences of several lengths, packed and padded again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(16, 3)
        self.rnn = nn.GRU(6, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), torch.tensor([5, 3, 2]), batch_first=True)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(padded.mean(1))


class FirstState(nn.Module):
    """A recurrent layer and a cell whose first states this module makes, by integers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.layers = 8, 2
        self.rnn, self.cell = nn.LSTM(5, 8, 2, batch_first=True), nn.GRUCell(8, 6)
        self.size, self.head = 6, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(self.layers, len(x), self.units)
        steps, _ = self.rnn(x, (state, torch.zeros_like(state)))
        hidden = x.new_zeros(len(x), self.size)
        for step in range(x.shape[1]):
            hidden = self.cell(steps[:, step], hidden)
        return self.head(hidden)


class RowsToImages(nn.Module):
    """As in a generator: what a linear layer gives becomes an image of so many channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.start, self.how, self.to_image = nn.Linear(6, 8 * 4), how, nn.Unflatten(1, (8, 2, 2))
        self.images = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.start(x)
        if self.how == "module":
            return self.images(self.to_image(rows))
        if self.how == "unflatten":
            return self.images(rows.unflatten(-1, (8, 2, 2)))
        return self.images(rows.view(-1 if self.how == "any batch" else len(x), 8, 2, 2))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.down(x).relu()
        return self.last(torch.cat([skipped, self.up(self.deep(skipped).relu())], 1))


class Shared(nn.Module):
    """Two layers with one weight, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out, self.twice = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu() + self.b(x.flip(0)).tanh()
        return self.out(self.twice(self.twice(hidden).relu()))


class WrittenInPlace(nn.Module):
    """Features that are written into a tensor of zeros, part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x), self.b(x)
        both = x.new_zeros(len(x), first.shape[1] + second.shape[1])
        both[:, : first.shape[1]] = first
        both[:, first.shape[1] :] = second.relu_()
        return self.out(both)


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out, self.other = (
            nn.Linear(6, 8),
            nn.Linear(4, 8),
            nn.Linear(8, 3),
            nn.Linear(8, 2),
        )

    def forward(self, batch: dict[str, Tensor], scale: float) -> dict[str, object]:
        hidden = self.left(batch["left"]) * self.right(batch["right"]) * scale
        return {"logits": self.out(hidden), "more": (self.other(hidden.relu()), scale)}


class Shuffled(nn.Module):
    """As in ShuffleNet: halves, a branch, a concatenation and a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, branched = self.stem(x).chunk(2, dim=1)
        x = torch.cat([kept, self.branch(branched).relu()], 1)
        b, c, h, w = x.shape
        return self.out(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


class GatedParts(nn.Module):
    """As in MambaOut: a gate, and a value whose last part goes through another layer; the widths stand in a tuple or list."""

    def __init__(self, kind: type = tuple) -> None:
        super().__init__()
        self.widths = kind((9, 5, 4))
        self.up, self.mix, self.down = nn.Linear(6, 18), nn.Linear(4, 4), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, kept, mixed = self.up(x).split(self.widths, dim=-1)
        return self.down(functional.silu(gate) * torch.cat([kept, self.mix(mixed)], dim=-1))


class MixedKernels(nn.Module):
    """As in MixNet: parts of the channels, of unequal sizes in a list, through kernels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [6, 2]
        self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.mixed = nn.ModuleList(
            nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in zip(self.splits, (3, 5), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.stem(x).relu().split(self.splits, dim=1)
        return self.out(torch.cat([layer(part) for layer, part in zip(self.mixed, parts, strict=True)], dim=1))


class WiderBehind(nn.Module):
    """As in ReXNet: the first channels of a wider layer get what comes before, and an integer counts these of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.out = (
            nn.Conv2d(a, b, 1) for a, b in ((3, 4), (4, 7), (7, 9), (9, 2))
        )
        self.shortcuts = (4, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer, width in zip((self.second, self.third), self.shortcuts, strict=True):
            x = self.first(x) if layer is self.second else x
            wider = layer(x)
            x = torch.cat([wider[:, :width] + x, wider[:, width:]], dim=1)
        return self.out(x.relu())


class UnlikeHeads(nn.Module):
    """As in CoaT: heads of several kinds, by a convolution of their own each, that one integer counts together."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.parts = 8, [6, 10]
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.near, self.far = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.Conv1d(10, 10, 5, padding=2, groups=10)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        near, far = v.transpose(-1, -2).reshape(b, -1, n).split(self.parts, dim=1)
        beside = torch.cat([self.near(near), self.far(far)], dim=1).reshape(*v.transpose(-1, -2).shape)
        mixed = functional.scaled_dot_product_attention(q, k, v) + q * beside.transpose(-1, -2)
        return self.out(mixed.transpose(1, 2).reshape(b, n, c))


class ShortenedKeys(nn.Module):
    """As in Twins and PVT: keys and values of fewer tokens, whose number is left to ``reshape``."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.kv, self.out, self.shorten = (
            nn.Linear(16, 16),
            nn.Linear(16, 32),
            nn.Linear(16, 16),
            nn.AvgPool1d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)
        short = self.shorten(x.transpose(1, 2)).transpose(1, 2)
        k, v = self.kv(short).reshape(b, -1, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class BiasOfPositions(nn.Module):
    """As in timm's ``RelPosMlp``: a module that makes a bias for each head, and holds its shape."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads, self.bias_shape = heads, (5, 5, heads)
        self.mlp = nn.Linear(2, heads)
        self.register_buffer("places", torch.randn(9, 2))
        self.register_buffer("which", torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4)

    def bias(self) -> Tensor:
        return (
            self.mlp(self.places).view(-1, self.num_heads)[self.which.flatten()].view(self.bias_shape).permute(2, 0, 1)
        )


class WithBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width = 4, 3
        self.qkv, self.out, self.positions = nn.Linear(12, 36), nn.Linear(12, 12), BiasOfPositions(4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.width).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.positions.bias()[None])
        return self.out(mixed.transpose(1, 2).reshape(b, n, c))


class Windows(nn.Module):
    """As in Swin and BEiT: windows whose sides, in a list, are as many as the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = 4, [4, 4], (2, 2)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.biases = nn.Parameter(torch.randn(49, 4))
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        apart = places[:, None] - places[None, :] + 3
        self.register_buffer("which", (apart[..., 0] * 7 + apart[..., 1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.roll(self.shift, dims=(1, 2))
        rows, columns = h // self.window[0], w // self.window[1]
        x = x.view(b, rows, self.window[0], columns, self.window[1], c).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        n, area, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, area, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.biases[self.which].view(area, area, -1).permute(2, 0, 1)[None]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.out(mixed.transpose(1, 2).reshape(n, area, c))
        return x.view(b, rows, columns, *self.window, c).transpose(2, 3).reshape(b, h, w, c)


class KeptBias(nn.Module):
    """As in LeViT and TinyViT: a bias for each head that evaluation gathers once, until the mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width = 4, 3
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.biases = nn.Parameter(torch.randn(4, 9))
        self.register_buffer("which", torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4)
        self.gathered: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.gathered = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.training:
            bias = self.biases[:, self.which]
        else:
            bias = self.gathered.setdefault(str(x.device), self.biases[:, self.which])
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.width).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.out(mixed.transpose(1, 2).reshape(b, n, -1))


class PaddedSame(nn.Conv2d):
    """As timm's ``Conv2dSame``: padding that forward works out from the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        reach = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        ]
        x = functional.pad(x, [reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2])
        return functional.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def batched(self: nn.Module, x: Tensor) -> Tensor:
    """As torchvision's detection models: images that are written into a tensor of zeros."""
    batch = x.new_zeros(x.shape)
    for number, image in enumerate(x):
        batch[number].copy_(image)
    return self.out(self.second(self.first(batch).relu()).relu())


def gated(self: nn.Module, x: Tensor) -> Tensor:
    gate, value = self.up(x).chunk(2, dim=-1)
    return self.down(functional.silu(gate) * value)


def split(self: nn.Module, x: Tensor) -> Tensor:
    a, b = self.up(x).split(self.up.out_features // 2, dim=-1)
    return self.down(a.relu() * b)


def residual(self: nn.Module, x: Tensor) -> Tensor:
    x = self.stem(x)
    return self.head(pooled(x + self.second(self.norm(self.first(x)).relu())))


def channels_last(self: nn.Module, x: Tensor) -> Tensor:
    return self.last(functional.pixel_shuffle(self.first(x.to(memory_format=torch.channels_last)), 2))


def multihead(self: nn.Module, x: Tensor) -> Tensor:
    return self.head(self.attention(x, x, x, need_weights=False)[0])


def padded(self: nn.Module, x: Tensor) -> Tensor:
    mask = torch.tensor([[False, False, False, False, True], [False] * 5])
    return self.head(self.attention(x, x, x, key_padding_mask=mask)[0])


CONSTRUCTS: dict[str, Construct] = {
    "strided and dilated": Construct(
        between(nn.Conv2d(8, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, dilation=2, padding=2)), image(), (8, 6, 8)
    ),
    "transposed": Construct(
        between(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)), image(), (8, 6, 5)
    ),
    "grouped": Construct(between(nn.Conv2d(8, 12, 3, groups=4)), image(), (4,)),
    "grouped transposed": Construct(between(nn.ConvTranspose2d(8, 12, 3, groups=4)), image(), (4,)),
    "depthwise with a multiplier": Construct(between(nn.Conv2d(8, 16, 3, groups=8)), image(), (8,)),
    "batch norm": Construct(between(nn.BatchNorm2d(8), nn.ReLU(inplace=True)), image(), (8,)),
    "group norm": Construct(between(nn.GroupNorm(4, 8)), image(), (4,)),
    "instance norm": Construct(between(nn.InstanceNorm2d(8, affine=True)), image(), (8,)),
    "layer norm": Construct(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 3)),
        features(2, 6),
        (10,),
    ),
    "own norm": Construct(
        lambda: nn.Sequential(nn.Linear(6, 8), OwnRMSNorm(8), nn.Linear(8, 10), nn.Linear(10, 3)), features(2, 6), (10,)
    ),
    "convolution of text": Construct(
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 3, 1)), features(2, 4, 9), (8,)
    ),
    "convolution of volumes": Construct(
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.MaxPool3d(2), nn.Conv3d(6, 3, 1)), features(1, 2, 6, 6, 6), (6,)
    ),
    "squeeze and excite": Construct(SqueezeExcite, image(), (8, 4)),
    "residual sum": Construct(
        lambda: Apply(
            residual,
            stem=nn.Conv2d(3, 8, 1),
            first=nn.Conv2d(8, 6, 3, padding=1),
            norm=nn.BatchNorm2d(6),
            second=nn.Conv2d(6, 8, 1),
            head=nn.Linear(8, 3),
        ),
        image(),
        (8, 6),
    ),
    "concatenation": Construct(UNet, image(), (6, 8, 4)),
    "channel shuffle": Construct(Shuffled, image(), (4,)),
    "pixel shuffle": Construct(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)), image(), (4,)
    ),
    "pixel unshuffle": Construct(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1)), image(), (4,)
    ),
    "flatten": Construct(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 3)), image(), (5,)),
    "chunk": Construct(lambda: Apply(gated, up=nn.Linear(6, 16), down=nn.Linear(8, 3)), features(2, 6), (8,)),
    "split": Construct(lambda: Apply(split, up=nn.Linear(6, 16), down=nn.Linear(8, 3)), features(2, 6), (8,)),
    **{
        f"attention, {how}": Construct(lambda how=how: Attention(how), features(2, 5, 12), (4,))  # type: ignore[misc]
        for how in ("eager", "sdpa", "rotary", "normed", "biased", "linear")
    },
    "attention to the input's width": Construct(ToInputWidth, features(2, 5, 16), (4,)),
    "grouped queries": Construct(GroupedQueries, features(2, 5, 12), (2,)),
    "tokens, positions, layer scale": Construct(SmallViT, image(), (4, 10)),
    "nn.MultiheadAttention": Construct(
        lambda: Apply(multihead, attention=nn.MultiheadAttention(12, 3, batch_first=True), head=nn.Linear(12, 2)),
        features(2, 5, 12),
        (3, 12),
    ),
    "nn.MultiheadAttention with padding": Construct(
        lambda: Apply(padded, attention=nn.MultiheadAttention(12, 3, batch_first=True), head=nn.Linear(12, 2)),
        features(2, 5, 12),
        (3, 12),
    ),
    "nn.LSTM": Construct(lambda: Recurrent(nn.LSTM), ids, (6, 8)),
    "nn.LSTM, two layers, both directions": Construct(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), ids, (6, 8)
    ),
    "nn.GRU": Construct(lambda: Recurrent(nn.GRU), ids, (6, 8)),
    "packed sequences": Construct(Packed, features(3, 5, 5), (6, 8)),
    "first states": Construct(FirstState, features(2, 4, 5), (8, 6)),
    **{
        f"rows to images, {how}": Construct(lambda how=how: RowsToImages(how), features(2, 6), (8, 4))  # type: ignore[misc]
        for how in ("module", "unflatten", "view", "any batch")
    },
    "shared weights, called twice": Construct(Shared, features(2, 6), (8,)),
    "weight norm": Construct(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 3))
        ),
        features(2, 6),
        (8,),
    ),
    "widths in a tuple": Construct(GatedParts, features(2, 6), (5, 4, 4)),
    "widths in a list": Construct(lambda: GatedParts(list), features(2, 6), (5, 4, 4)),
    "kernels for parts of the channels": Construct(MixedKernels, image(), (6, 2)),
    "an integer for channels of several layers": Construct(WiderBehind, image(), (4, 3, 2)),
    "heads of several kinds": Construct(UnlikeHeads, features(2, 5, 16), (3, 5)),
    "fewer keys": Construct(ShortenedKeys, features(2, 6, 16), (4,)),
    "shape of a bias": Construct(WithBias, features(2, 5, 12), (4,)),
    "windows as long as there are heads": Construct(Windows, features(1, 8, 8, 12), (4,)),
    "a bias that is kept": Construct(KeptBias, features(2, 5, 12), (4,)),
    "padding in forward": Construct(
        between(PaddedSame(8, 6, 3, 2), nn.ReLU(), PaddedSame(6, 6, 3, groups=6)), image(), (8, 6)
    ),
    "images in a batch of zeros": Construct(
        lambda: Apply(batched, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 6, 3), out=nn.Conv2d(6, 2, 1)),
        image(),
        (8, 6),
    ),
    "written in place": Construct(WrittenInPlace, features(2, 6), (4,)),
    "several inputs and outputs": Construct(
        SeveralInputs, lambda: ({"left": torch.randn(2, 6), "right": torch.randn(2, 4)}, 0.5), (8,)
    ),
    "channels last": Construct(
        lambda: Apply(channels_last, first=nn.Conv2d(3, 16, 1), last=nn.Conv2d(4, 2, 1)), image(), (4,)
    ),
}
