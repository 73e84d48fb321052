"""What the benchmarks of cost share: random Llamas, batches, interleaved timing, peak memory, and tables in Markdown."""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune.calibration.collect import collect_statistics
from lit_prune.groups import GroupSet
from lit_prune.ranking.registry import get_criterion

# hidden size, MLP width, layers, heads, key/value heads, vocabulary; 135M is SmolLM2's shape, and 27M a fifth of its layers and
# vocabulary; the large ones are Llama 3's
SHAPES = {
    "100M": (768, 2048, 12, 12, 4, 32000),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "27M": (576, 1536, 6, 9, 3, 9830),
    "700M": (1536, 4608, 24, 24, 8, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}


LARGE = ("8B", "70B")


BARE = "forward and backward"


BARE_ALL = "forward and backward, all weights"


BARE_FORWARD = "forward"


DROPPED = "forward and backward, gradients dropped"


SEED = "taylor_2nd, h and g on the CPU (seed)"


GIGABYTE = 1e9


def llama_config(shape: Sequence[int], **fields: Any) -> LlamaConfig:
    """The config of a Llama of a shape as in :data:`SHAPES`, with other fields."""
    hidden, width, layers, heads, kv_heads, vocabulary = shape
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        **fields,
    )


def build(size: str, options: argparse.Namespace) -> nn.Module:
    """A model with random weights; of the large sizes only the shapes, on the meta device."""
    torch.manual_seed(0)
    config = llama_config(SHAPES[size], tie_word_embeddings=size not in LARGE, max_position_embeddings=4096)
    with torch.device("meta" if size in LARGE else options.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def make_batches(options: argparse.Namespace, batches: int, tokens: int, length: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, tokens // length), min(tokens, length))
    return [torch.randint(0, 32000, shape, generator=generator).to(options.device) for _ in range(batches)]


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def synchronize(options: argparse.Namespace) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    cases: Mapping[str, Callable[[], object]], options: argparse.Namespace, repeats: int | None = None
) -> dict[str, list[float]]:
    """Seconds of every case, the cases taking turns and each round beginning with another one."""
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range((repeats or options.repeats) + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            synchronize(options)
            start = time.perf_counter()
            cases[name]()
            synchronize(options)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios round by round."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


class Peak:
    """Peak memory of the device; on a CPU the process's peak resident set, which Linux lets a process set back."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cuda = options.device.startswith("cuda")

    def start(self) -> int:
        """Begin anew, and give the bytes in use."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        # in pages
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def bytes(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@contextlib.contextmanager
def gradients_of(model: nn.Module, group_sets: Sequence[GroupSet], *, drop: bool = False) -> Iterator[None]:
    """Only the weights of the groups have gradients; with ``drop`` each is freed the moment it is there."""
    scored = {part.parameter for s in group_sets for part in s.slices}
    handles = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in scored)
        if drop and name in scored:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
    yield
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None


def bare(model: nn.Module, group_sets: Sequence[GroupSet], data: Sequence[Tensor], *, drop: bool = False) -> None:
    with gradients_of(model, group_sets, drop=drop):
        for ids in data:
            loss_of(model)(ids).backward()


def bare_all(model: nn.Module, data: Sequence[Tensor]) -> None:
    for ids in data:
        loss_of(model)(ids).backward()
    for parameter in model.parameters():
        parameter.grad = None


@torch.no_grad()
def bare_forward(model: nn.Module, data: Sequence[Tensor]) -> None:
    for ids in data:
        loss_of(model)(ids)


def gather(model: nn.Module, group_sets: Sequence[GroupSet], data: Sequence[Tensor], name: str, **options: Any) -> None:
    collect_statistics(model, group_sets, data, loss_of(model), get_criterion(name).terms, **options)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    return {
        "device": f"{options.device} ({name})",
        "dtype": options.dtype,
        "threads": options.threads,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def spread(value: Mapping[str, float], digits: int = 3) -> str:
    return f"{value['ratio']:.{digits}f} ({value['lowest']:.{digits}f} to {value['highest']:.{digits}f})"


def verdict(value: float, target: float | None, *, least: bool = False) -> str:
    if target is None:
        return ""
    met = value >= target if least else value <= target
    return f"{'≥' if least else '≤'} {target:.2f} {'met' if met else 'MISSED'}"
