"""What pruning costs: time and memory of calibration, planning and cutting, and how fast the smaller model really is.

Every row runs in a process of its own and is added to a JSON file as it comes; rows that are in it are not measured again.
Ratios are between cases that take turns within one row. The models are Llamas with random weights.

    python benchmarks/cost.py --output docs/cost.json               # all of it, and docs/cost.md beside it
    python benchmarks/cost.py --sections memory speed --device cuda --dtype bfloat16 --output outputs/cost_gpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peers import cut_by_torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, prune
from lit_prune.files import write_text
from lit_prune.groups import GroupSet, count_bytes, count_parameters
from lit_prune.importance import get_criterion
from lit_prune.plan import PruningPlan
from lit_prune.selection import Limits
from lit_prune.statistics import Statistics, collect_statistics

# hidden size, MLP width, layers, heads, key/value heads, vocabulary; 135M is SmolLM2's shape, the large ones are Llama 3's
SHAPES = {
    "100M": (768, 2048, 12, 12, 4, 32000),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "700M": (1536, 4608, 24, 24, 8, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
SIZES = ("100M", "700M")
LARGE = ("8B", "70B")
RATIOS = (0.1, 0.2, 0.3, 0.5)
MULTIPLES = (1, 16, 64)
BACKWARD = ("taylor", "taylor_2nd", "taylor_batch", "second_order", "fisher")
FORWARD = ("wanda", "output_wanda")
BARE = "forward and backward"
BARE_ALL = "forward and backward, all weights"
BARE_FORWARD = "forward"
DROPPED = "forward and backward, gradients dropped"
SEED = "taylor_2nd, h and g on the CPU (seed)"
OFFLOADED = "taylor, gradients offloaded"
GIGABYTE = 1e9


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/cost.json"), help="JSON file; added to")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case, after one that warms up")
    parser.add_argument("--batches", type=int, default=3, help="calibration batches")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a calibration batch")
    parser.add_argument("--row", nargs=2, metavar=("SECTION", "KEY"), help="measure one row and print it; used inside")
    return parser.parse_args()


# what the sections share


def build(size: str, options: argparse.Namespace) -> nn.Module:
    """A model with random weights; of the large sizes only the shapes, on the meta device."""
    torch.manual_seed(0)
    hidden, width, layers, heads, kv_heads, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=size not in LARGE,
        max_position_embeddings=4096,
    )
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
        return psutil.Process().memory_info().rss

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


def seed_way(model: nn.Module, group_sets: Sequence[GroupSet], data: Sequence[Tensor]) -> None:
    """The elementwise way: g and the mean of squares of every weight as whole float32 tensors in CPU memory."""
    scored = {part.parameter for s in group_sets for part in s.slices}
    g = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if n in scored}
    h = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if n in scored}
    for ids in data:
        model.zero_grad()
        loss_of(model)(ids).backward()
        for name, parameter in model.named_parameters():
            if name in scored:
                gradient = parameter.grad.detach().float()  # type: ignore[union-attr]
                g[name] += gradient.cpu() / len(data)
                h[name] += (gradient**2).cpu() / len(data)
    model.zero_grad()


def gather(model: nn.Module, group_sets: Sequence[GroupSet], data: Sequence[Tensor], name: str, **options: Any) -> None:
    collect_statistics(model, group_sets, data, loss_of(model), get_criterion(name).terms, **options)


def random_statistics(group_sets: Sequence[GroupSet]) -> Statistics:
    """As calibration for ``second_order`` leaves them, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    term = get_criterion("second_order").terms[0]
    numbers = {
        (term, s.key, position): torch.rand(s.size, generator=generator)
        for s in group_sets
        for position in range(len(s.slices))
    }
    return Statistics(batches=1, reduced=numbers)


# the sections: each row is a function of its key


def calibration(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of gathering the statistics of each criterion, beside the bare passes over the same batches."""
    model = build(size, options)
    group_sets = find_group_sets(model)
    data = make_batches(options, options.batches, options.tokens)
    cases: dict[str, Callable[[], object]] = {
        BARE: lambda: bare(model, group_sets, data),
        BARE_ALL: lambda: bare_all(model, data),
        BARE_FORWARD: lambda: bare_forward(model, data),
        SEED: lambda: seed_way(model, group_sets, data),
    }
    for name in (*BACKWARD, *FORWARD):
        cases[name] = lambda name=name: gather(model, group_sets, data, name)
    seconds = interleaved(cases, options)
    return {
        "batches": options.batches,
        "tokens": options.tokens,
        "cases": {
            name: {
                "seconds": statistics.median(values),
                **ratio(values, seconds[BARE_FORWARD if name in (*FORWARD, BARE_FORWARD) else BARE]),
            }
            for name, values in seconds.items()
        },
        "seed_over_streaming": ratio(seconds[SEED], seconds["taylor_2nd"]),
    }


MEMORY_CASES: dict[str, Callable[[nn.Module, Sequence[GroupSet], Sequence[Tensor]], None]] = {
    DROPPED: lambda model, sets, data: bare(model, sets, data, drop=True),
    BARE: bare,
    **{name: lambda model, sets, data, name=name: gather(model, sets, data, name) for name in BACKWARD},  # type: ignore[misc]
    "taylor, bfloat16": lambda model, sets, data: gather(model, sets, data, "taylor", gradient_dtype="bfloat16"),
    OFFLOADED: lambda model, sets, data: gather(model, sets, data, "taylor", offload_gradients=True),
    SEED: seed_way,
    BARE_FORWARD: lambda model, sets, data: bare_forward(model, data),
    **{name: lambda model, sets, data, name=name: gather(model, sets, data, name) for name in FORWARD},  # type: ignore[misc]
}


def memory(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of one case, over those of the model."""
    size, _, case = key.partition(": ")
    model = build(size, options)
    group_sets = find_group_sets(model)
    data = make_batches(options, 2, 256 if size == "100M" else 128)
    # what the first pass leaves behind for good (kernels, buffers of the allocator) is not the case's
    bare_forward(model, data[:1])
    peak = Peak(options)
    before = peak.start()
    MEMORY_CASES[case](model, group_sets, data)
    weights = count_bytes(model)
    return {"weights": weights, "peak": peak.bytes() - before + weights}


def planning(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the statistics to a plan, of writing and reading it, and of cutting the model."""
    model = build(size, options)
    weights = count_bytes(model)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        synchronize(options)
        seconds[name] = time.perf_counter() - start
        return result

    group_sets = timed("find", lambda: find_group_sets(model))
    numbers = random_statistics(group_sets)
    config = PruningConfig(importance="second_order", pruning_ratio=0.2)
    timed("check", lambda: config.check(model, group_sets))
    table, plan = timed("plan", lambda: make_plan(model, group_sets, numbers, config))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        timed("write", lambda: plan.save(path))
        read = timed("read", lambda: PruningPlan.load(path))
    assert read == plan
    result: dict[str, Any] = {"groups": len(table), "parameters": count_parameters(model), "seconds": seconds}
    if size not in LARGE:
        peak = Peak(options)
        before = peak.start()
        timed("cut", lambda: apply_plan(model, plan))
        result["cut_peak_over_weights"] = (peak.bytes() - before + weights) / weights
        result["parameters_after"] = count_parameters(model)
    return result


def peer(which: str, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and prune the 100M model, by this library or by torch-pruning; 20% of what can be pruned."""
    eager = which == "torch-pruning"
    model = build("100M", options)
    if eager:
        model.set_attn_implementation("eager")  # type: ignore[operator]
        model.config.use_cache = False  # type: ignore[union-attr]
    data = make_batches(options, options.batches, options.tokens)
    bare_forward(model, data[:1])
    before = count_parameters(model)
    peak = Peak(options)
    base = peak.start()
    start = time.perf_counter()
    seconds = {}
    if eager:
        _torch_pruning(model, data, seconds)
    else:
        config = PruningConfig(importance="taylor", pruning_ratio=0.2, ratio_of="prunable", repair=None)
        group_sets = find_group_sets(model)
        collected = calibrate(model, group_sets, data, loss_of(model), config)
        synchronize(options)
        seconds["calibrate"] = time.perf_counter() - start
        _, plan = make_plan(model, group_sets, collected, config)
        apply_plan(model, plan)
    synchronize(options)
    seconds["total"] = time.perf_counter() - start
    seconds["prune"] = seconds["total"] - seconds["calibrate"]
    weights = before * next(model.parameters()).element_size()
    bare_forward(model, data[:1])
    return {
        "seconds": seconds,
        "peak_over_weights": (peak.bytes() - base + weights) / weights,
        "parameters_before": before,
        "parameters_after": count_parameters(model),
    }


def _torch_pruning(model: nn.Module, data: Sequence[Tensor], seconds: dict[str, float]) -> None:
    """First-order Taylor of torch-pruning: heads and MLP channels."""
    start = time.perf_counter()
    for ids in data:
        loss_of(model)(ids).backward()
    seconds["calibrate"] = time.perf_counter() - start
    cut_by_torch_pruning(model, data[0][:1, :16], "taylor", 0.2)


WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "one iteration": {"iterations": 1},
    "one iteration, no compensation": {"iterations": 1, "compensation": False},
    "one iteration, no repair": {"iterations": 1, "repair": None},
    "taylor, one iteration, no repair": {"importance": "taylor", "iterations": 1, "repair": None},
}
WHOLE_BATCHES = 8


def pruning(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of all of ``prune``, beside a bare forward and backward pass over the same batches."""
    model = build("100M", options)
    group_sets = find_group_sets(model)
    data = make_batches(options, WHOLE_BATCHES, options.tokens)
    dropped = functools.partial(bare, model, group_sets, data, drop=True)
    peak = Peak(options)
    before = peak.start()
    base = interleaved({BARE: dropped}, options, 2)[BARE]
    weights = count_bytes(model)
    base_peak = peak.bytes() - before + weights
    before = peak.start()
    start = time.perf_counter()
    prune(model, data, loss_of(model), PruningConfig(**WHOLE[case], pruning_ratio=0.2))
    synchronize(options)
    seconds = time.perf_counter() - start
    return {
        "tokens": WHOLE_BATCHES * options.tokens,
        "seconds": seconds,
        "bare_seconds": base,
        "peak": peak.bytes() - before + weights,
        "bare_peak": base_peak,
        "weights": weights,
        "parameters_after": count_parameters(model),
    }


def speed(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the 100M model pruned by a ratio, beside the dense one: prefill, decoding, a training step."""
    share = float(key.rstrip("%")) / 100
    dense = build("100M", options)
    group_sets = find_group_sets(dense)
    data = make_batches(options, 1, 256)
    config = PruningConfig(importance="second_order", pruning_ratio=share, repair=None)
    collected = calibrate(dense, group_sets, data, loss_of(dense), config)
    models = {"dense": dense}
    for multiple in MULTIPLES:
        limits = Limits(multiple_of={"mlp": multiple}, min_fraction=0.05)
        config = PruningConfig(importance="second_order", pruning_ratio=share, repair=None, limits=limits)
        _, plan = make_plan(dense, group_sets, collected, config)
        model = build("100M", options)
        apply_plan(model, plan)
        models[f"multiples of {multiple}"] = model
    return speeds(models, options)


def depth(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """As ``speed``, of a deep and narrow model that loses widths or whole blocks."""
    share = float(key.rstrip("%")) / 100
    models = {"dense": build("135M", options)}
    data = make_batches(options, 1, 256)
    for name, kinds in {"widths": ("attention", "mlp"), "whole blocks": ("block",)}.items():
        model = build("135M", options)
        config = PruningConfig(pruning_ratio=share, repair=None, iterations=1, limits=Limits(kinds=kinds))
        prune(model, data, loss_of(model), config)
        models[name] = model
    return speeds(models, options)


def speeds(models: Mapping[str, nn.Module], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each model, and how much more than ``dense`` that is."""
    prompt = make_batches(options, 1, 512, 256)[0]
    flops = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=prompt, use_cache=False)
        flops[name] = counter.get_total_flops()
    tasks = {"prefill": (prefill, 512), "decode": (decode, 24), "train": (train_step, 512)}
    result: dict[str, Any] = {
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "flops": flops,
        "ideal": {name: flops["dense"] / value for name, value in flops.items()},
    }
    for task, (function, tokens) in tasks.items():
        cases = {name: functools.partial(function, model, prompt, tokens) for name, model in models.items()}
        seconds = interleaved(cases, options, options.repeats + 2)
        result[task] = {
            name: {
                "tokens_per_second": tokens / statistics.median(values),
                **ratio(seconds["dense"], values),
            }
            for name, values in seconds.items()
        }
    return result


@torch.inference_mode()
def prefill(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    del tokens
    model(input_ids=prompt, use_cache=False)


@torch.inference_mode()
def decode(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    """Greedy decoding with a cache after a short prompt; the prompt's forward is a small part of the time."""
    output = model(input_ids=prompt[:1, :32], use_cache=True)
    for _ in range(tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def train_step(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    del tokens
    loss_of(model)(prompt).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-1e-6)
                parameter.grad = None


def widths(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a multiplication of one MLP block whose width is off the hardware's multiples, over width 1536."""
    tokens = int(key.split()[0])
    hidden = SHAPES["100M"][0]
    dtype = getattr(torch, options.dtype)
    x = torch.randn(tokens, hidden, device=options.device, dtype=dtype)
    cases: dict[str, Callable[[], object]] = {}
    # the name says the largest power of two that divides the width
    chosen = {"512": 1536, "1": 1531, "2": 1530, "4": 1532, "8": 1528, "16": 1520, "32": 1504, "64": 1472, "128": 1408}
    rounds = max(1, 2048 // tokens)
    for name, width in chosen.items():
        up, down = (
            torch.randn(a, b, device=options.device, dtype=dtype) for a, b in ((width, hidden), (hidden, width))
        )

        def run(up: Tensor = up, down: Tensor = down) -> None:
            with torch.inference_mode():
                for _ in range(rounds):
                    nn.functional.linear(nn.functional.linear(x, up), down)

        cases[name] = run
    seconds = interleaved(cases, options, 8 * options.repeats)
    each = {name: [s / chosen[name] for s in values] for name, values in seconds.items()}
    return {name: {"width": chosen[name], **ratio(values, each["512"])} for name, values in each.items()}


SECTIONS: dict[str, tuple[Callable[[str, argparse.Namespace], dict[str, Any]], list[str]]] = {
    "calibration": (calibration, ["100M"]),
    "memory": (memory, [f"{size}: {case}" for size in SIZES for case in MEMORY_CASES]),
    "planning": (planning, [*SIZES, *LARGE]),
    "pruning": (pruning, list(WHOLE)),
    "peer": (peer, ["lit_prune", "torch-pruning"]),
    "speed": (speed, [f"{r:.0%}" for r in RATIOS]),
    "depth": (depth, ["20%", "30%"]),
    "widths": (widths, ["512 tokens", "1 token"]),
}
# bytes that have to be free before a row begins
NEEDS = {"700M": 14 * GIGABYTE}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.row:
        section, key = options.row
        print(json.dumps(SECTIONS[section][0](key, options)))
        return
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    results.setdefault("machine", machine(options))
    left = []
    for section in options.sections:
        rows = results.setdefault(section, {})
        for key in SECTIONS[section][1]:
            # a CPU has nowhere to offload gradients to
            if key in rows or (options.device == "cpu" and key.endswith(OFFLOADED)):
                continue
            start = time.perf_counter()
            row = measure(section, key, options)
            if row is None:
                left.append(f"{section} | {key}")
                continue
            rows[key] = {**row, "row_seconds": time.perf_counter() - start}
            write_text(options.output, json.dumps(results, indent=1) + "\n")
            print(f"{section} | {key}: {rows[key]['row_seconds']:.0f} s", flush=True)
    text = report(results)
    write_text(options.output.with_suffix(".md"), text)
    print(text)
    if left:
        sys.exit(f"Not measured: {', '.join(left)}. Run again; what is there stays.")


def measure(section: str, key: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure a row in a process of its own; ``None`` if it could not be."""
    needed = NEEDS.get(key.partition(":")[0], 0)
    free = psutil.virtual_memory().available
    if options.device == "cpu" and free < needed:
        print(f"{section} | {key}: {free / GIGABYTE:.0f} GB are free, {needed / GIGABYTE:.0f} are needed", flush=True)
        return None
    command = [sys.executable, __file__, "--row", section, key]
    for name in ("device", "dtype", "threads", "repeats", "batches", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(options.threads)}
    if section in ("memory", "planning", "pruning", "peer"):
        # freed tensors go back to the system at once, so that the resident set is what is in use
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{section} | {key} failed:\n{done.stderr[-2000:]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def machine(options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    return {
        "device": f"{options.device} ({name})",
        "dtype": options.dtype,
        "threads": options.threads,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


# the report


def report(results: Mapping[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    parts = [
        "# What pruning costs\n",
        f"Made by `python benchmarks/cost.py --output docs/cost.json`: {about}. Llamas with random weights, a process for"
        " each row. Ratios are medians of rounds in which the cases take turns; in brackets the lowest and highest. With"
        " `--device cuda` the same command measures a GPU; none of these figures"
        + (" was run on one.\n" if "cuda" not in results["machine"]["device"] else " is of a CPU.\n"),
    ]
    writers = {
        "calibration": report_calibration,
        "memory": report_memory,
        "planning": report_planning,
        "pruning": report_pruning,
        "peer": report_peer,
        "speed": report_speed,
        "depth": report_depth,
        "widths": report_widths,
    }
    for section, write in writers.items():
        if results.get(section):
            parts.append(write(results[section]))
    return "\n".join(parts)


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


def report_calibration(rows: Mapping[str, Any]) -> str:
    targets = {"taylor": 1.05, "taylor_2nd": 1.05, "wanda": 1.10}
    text = "## Time of calibration\n\n"
    for size, row in rows.items():
        text += (
            f"{size}, {row['batches']} batches of {row['tokens']} tokens. Of the forward and backward pass for criteria"
            f" with gradients (those of the groups' weights), of the forward pass for the others.\n\n"
        )
        table = [
            (name, f"{case['seconds']:.2f}", spread(case), verdict(case["ratio"], targets.get(name)))
            for name, case in row["cases"].items()
        ]
        text += markdown(("case", "seconds", "of the bare pass", "target"), table)
        text += (
            f"\nThe seed's way takes {spread(row['seed_over_streaming'])} times what streaming `taylor_2nd` takes.\n"
        )
    return text


def report_memory(rows: Mapping[str, Any]) -> str:
    text = (
        "## Peak memory of calibration\n\nPeak of the process over what it held before, plus the weights; 2 batches, of 256"
        " tokens (100M) and 128 tokens (700M). `"
        + DROPPED
        + "` is weights and activations, with each gradient freed the"
        " moment it is there. `taylor` and `taylor_2nd` are the absolute value of a mean over batches, weight by weight, so by"
        " their definition they keep the mean gradient of every weight of the groups: these cannot stream. `bfloat16` halves"
        " that, and `offload_gradients` moves it off a GPU.\n\n"
    )
    table = []
    for key, row in rows.items():
        size, _, case = key.partition(": ")
        base = rows.get(f"{size}: {BARE_FORWARD if case in (*FORWARD, BARE_FORWARD) else DROPPED}")
        over = row["peak"] / base["peak"] if base else float("nan")
        target = None if case in (DROPPED, BARE, BARE_FORWARD, SEED) else 1.05
        table.append(
            (key, f"{row['weights'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}", f"{over:.3f}", verdict(over, target))
        )
    return text + markdown(("case", "weights, MB", "peak, MB", "of weights and activations", "target"), table)


def report_planning(rows: Mapping[str, Any]) -> str:
    text = (
        "## Planning and cutting\n\nSeconds; 8B and 70B have their shapes only (`meta`), and are planned, not cut.\n\n"
    )
    steps = ("find", "check", "plan", "write", "read", "cut")
    table = [
        (
            size,
            f"{row['groups']:,}",
            *(f"{row['seconds'][step]:.2f}" if step in row["seconds"] else "" for step in steps),
            f"{1e6 * row['seconds']['plan'] / row['groups']:.2f}",
            f"{row['cut_peak_over_weights']:.2f}" if "cut_peak_over_weights" in row else "",
        )
        for size, row in rows.items()
    ]
    return text + markdown(("model", "groups", *steps, "plan, µs a group", "peak of the cut, of the weights"), table)


def report_pruning(rows: Mapping[str, Any]) -> str:
    tokens = next(iter(rows.values()))["tokens"]
    text = (
        f"## All of a pruning\n\n100M, 20% of all parameters, {tokens:,} calibration tokens: calibration, ranking, repair and"
        " surgery. Bare: a forward and backward pass over the same batches with gradients of the groups' weights, and its"
        " peak memory, each gradient freed the moment it is there. Solving for the repair takes the same time however"
        " many tokens there are.\n\n"
    )
    table = []
    for case, row in rows.items():
        bare = statistics.median(row["bare_seconds"])
        table.append(
            (
                case,
                f"{row['seconds']:.1f}",
                f"{row['seconds'] / bare:.2f}",
                f"{row['peak'] / 1e6:.0f}",
                f"{row['peak'] / row['bare_peak']:.2f}",
            )
        )
    return text + markdown(("", "seconds", "of the bare pass", "peak, MB", "of the bare pass's peak"), table)


def report_peer(rows: Mapping[str, Any]) -> str:
    text = (
        "## Beside torch-pruning\n\n100M, first-order Taylor, 20% of what can be pruned, the same batches; torch-pruning 1.6.1"
        " accumulates the gradients of all weights, needs eager attention to trace the model, and is given queries and keys that"
        " are not rotated while it does (the groups of transformers' rotation do not come to an end).\n\n"
    )
    table = [
        (
            name,
            *(f"{row['seconds'][step]:.2f}" for step in ("calibrate", "prune", "total")),
            f"{row['peak_over_weights']:.2f}",
            f"{row['parameters_after']:,}",
        )
        for name, row in rows.items()
    ]
    return text + markdown(
        ("", "calibrate, s", "prune, s", "total, s", "peak, of the weights", "parameters after"), table
    )


def report_speed(rows: Mapping[str, Any]) -> str:
    text = (
        "## Speed of the pruned model\n\n100M; ratio of all parameters, embeddings included. Ideal: FLOPs of the dense model"
        " over the pruned one's, in prefill. Achieved: speed-up over ideal. Prefill 2 x 256 tokens, decoding one"
        " sequence with a cache, training 2 x 256 tokens.\n\n"
    )
    return text + speed_table(rows)


def report_depth(rows: Mapping[str, Any]) -> str:
    text = (
        "## Widths or whole blocks\n\nThe same on SmolLM2's shape, 30 narrow layers: widths or whole blocks leave."
        " What either costs in quality is in [quality.md](quality.md).\n\n"
    )
    return text + speed_table(rows)


def speed_table(rows: Mapping[str, Any]) -> str:
    table = []
    for share, row in rows.items():
        for name in (n for n in row["prefill"] if n != "dense"):
            ideal = row["ideal"][name]
            achieved = row["prefill"][name]["ratio"] / ideal
            table.append(
                (
                    f"{share}, {name}",
                    f"{ideal:.3f}",
                    spread(row["prefill"][name], 2),
                    f"{achieved:.3f}",
                    verdict(achieved, 0.9, least=True),
                    spread(row["decode"][name], 2),
                    spread(row["train"][name], 2),
                )
            )
    dense = next(iter(rows.values()))
    rates = ", ".join(
        f"{task} {dense[task]['dense']['tokens_per_second']:.0f}" for task in ("prefill", "decode", "train")
    )
    head = ("pruned by", "ideal", "prefill, speed-up", "achieved", "target", "decode, speed-up", "train, speed-up")
    return markdown(head, table) + f"\nDense, tokens per second: {rates}.\n"


def report_widths(rows: Mapping[str, Any]) -> str:
    text = (
        "## What an uneven width costs\n\nTime for each column of two multiplications (768 to the width and back), over that"
        " of width 1536, by the largest power of two that divides the width.\n\n"
    )
    cases = list(next(iter(rows.values())))
    cases = [c for c in cases if c != "row_seconds"]
    table = [
        (f"{case} ({next(iter(rows.values()))[case]['width']})", *(spread(row[case], 2) for row in rows.values()))
        for case in cases
    ]
    return text + markdown(("multiple of (width)", *rows), table)


if __name__ == "__main__":
    main()
