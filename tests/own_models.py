"""Models as users write them, with the descriptions that make them known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_prune import MLP, Architecture, Attention, Traced, register_architecture


class CausalAttention(nn.Module):
    """Attention with one projection for queries, keys and values, its sizes held as attributes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.head_size, self.n_attn = heads, width // heads, width
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part.view(batch, tokens, self.n_head, self.head_size).transpose(1, 2)
            for part in self.c_attn(x).split(self.n_attn, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, tokens, self.n_attn))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 24)
        self.c_proj = nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x)))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = CausalAttention(width, heads), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MyGPT(nn.Module):
    """A small GPT, its embedding tied to its head."""

    def __init__(self, vocabulary: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.h = nn.ModuleList(GPTBlock(width, heads) for _ in range(3))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if labels is None:
            return logits, None
        return logits, functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class MySharedGPT(MyGPT):
    """A GPT whose first layer is its last layer, too."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.h = nn.ModuleList([self.h[0], self.h[1], self.h[0]])


# docs/architectures.md shows this description
register_architecture(
    Architecture(
        name="my-gpt",
        models=("MyGPT",),
        components=(
            Attention(
                path="h.*.attn",
                fused="c_attn",
                output="c_proj",
                head_dim="head_size",
                attributes={"n_head": "query_heads", "n_attn": "query_features"},
            ),
            MLP(path="h.*.mlp", inputs=("c_fc",), output="c_proj"),
        ),
        depth=(),
    )
)


class TextClassifier(nn.Module):
    """An ``nn.TransformerEncoder`` with a head, as in many a tutorial."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=input_ids % 7 == 0)
        logits = self.head(hidden.mean(dim=1))
        return logits, None if labels is None else functional.cross_entropy(logits, labels)


class Translator(nn.Module):
    """An ``nn.Transformer`` between embeddings, with its batch along the second dimension."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 24, dropout=0.0)
        self.head = nn.Linear(32, vocabulary)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        target = labels[:, :-1]
        hidden = self.transformer(
            self.embedding(input_ids).transpose(0, 1),
            self.embedding(target).transpose(0, 1),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
            tgt_is_causal=True,
        )
        logits = self.head(hidden.transpose(0, 1))
        return logits, functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class MyResNet(nn.Module):
    """A residual network of three stages."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 12, 2), BasicBlock(12, 16, 2))
        self.fc = nn.Linear(16 * 2 * 2, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.fc(self.stages(self.stem(pixel_values)).flatten(1))
        return logits, None if labels is None else functional.cross_entropy(logits, labels)


register_architecture(
    Architecture(
        name="my-resnet",
        models=("MyResNet",),
        components=(Traced(example_inputs=lambda: (torch.randn(1, 3, 8, 8),)),),
    )
)
