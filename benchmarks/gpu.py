"""All of a pruning on one GPU, phase by phase, and how fast the pruned model is: seconds and peak memory.

Random Llamas in bfloat16; a process for each size, and nothing is downloaded. An 8B shape takes an 80 GB card. Needs torch,
lightning and transformers, and runs from a checkout without an installation.

    python benchmarks/gpu.py --sizes 135M 8B --output docs/gpu.json
    python benchmarks/gpu.py --device cpu --tiny                       # the same code, in seconds
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from common import SHAPES, Peak, bare, llama_config, loss_of, machine, markdown, synchronize  # noqa: E402
from cost_speed import decode, prefill  # noqa: E402
from results import write_json  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from lit_prune import PruningConfig, find_group_sets  # noqa: E402
from lit_prune._files import write_text  # noqa: E402
from lit_prune.costs import Costs  # noqa: E402
from lit_prune.groups import count_bytes, count_parameters  # noqa: E402
from lit_prune.pipeline import prune_with  # noqa: E402

TINY = (64, 96, 2, 4, 2, 128)
# sequences, tokens of each, sequences a batch
TOKENS = {"135M": (128, 2048, 4), "8B": (128, 2048, 1), "tiny": (4, 32, 2)}
# from paper: to be beaten at 8B
GOAL = "8B: under 180 s and 40 GB."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu.json"), help="JSON file; added to")
    parser.add_argument("--sizes", nargs="+", default=["135M", "8B"], choices=["135M", "8B"])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights in place of the sizes")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--ratio", type=float, default=0.2, help="of all parameters")
    parser.add_argument("--iterations", type=int, default=PruningConfig.iterations)
    parser.add_argument("--decoded", type=int, default=64, help="tokens to decode")
    parser.add_argument("--row", metavar="SIZE", help="measure one size and print it; used inside")
    options = parser.parse_args()
    options.threads = torch.get_num_threads()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU was found; --device cpu --tiny tries the code without one")
    return options


def build(size: str, options: argparse.Namespace) -> Any:
    """A random Llama on the device; activations of the largest are recomputed."""
    torch.manual_seed(0)
    shape = TINY if size == "tiny" else SHAPES[size]
    config = llama_config(shape, tie_word_embeddings=size != "8B", max_position_embeddings=4096)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    if size != "135M":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def sequences(size: str, options: argparse.Namespace, vocabulary: int) -> list[Tensor]:
    count, length, together = TOKENS[size]
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return list(ids.to(options.device).split(together))


def seconds_of(run: Callable[[], object], options: argparse.Namespace, repeats: int = 1) -> float:
    """Median of some runs."""
    taken = []
    for _ in range(repeats):
        synchronize(options)
        start = time.perf_counter()
        run()
        synchronize(options)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def speed(model: nn.Module, prompt: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second in prefill and decoding."""
    was = model.training
    model.eval()
    found = {}
    for name, function, tokens in (("prefill", prefill, prompt.numel()), ("decode", decode, options.decoded)):
        run = functools.partial(function, model, prompt, tokens)
        run()
        found[name] = tokens / seconds_of(run, options, 5)
    model.train(was)
    return found


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune a model; seconds and peak bytes of each phase, of a bare forward and backward pass, and speed before and after."""
    model = build(size, options)
    data = sequences(size, options, model.config.vocab_size)
    loss = loss_of(model)
    result: dict[str, Any] = {"parameters": count_parameters(model), "weights_bytes": count_bytes(model)}
    result["tokens"] = sum(ids.numel() for ids in data)
    result["speed"] = {"dense": speed(model, data[0][:1], options)}
    sets = find_group_sets(model)
    bare(model, sets, data[:1], drop=True)
    peak = Peak(options)
    peak.start()
    pass_seconds = seconds_of(lambda: bare(model, sets, data, drop=True), options)
    result["bare"] = {"seconds": pass_seconds, "peak_bytes": peak.bytes()}
    costs = Costs()
    peak.start()
    config = PruningConfig(pruning_ratio=options.ratio, iterations=options.iterations)
    prune_with(model, lambda _: contextlib.nullcontext((data, loss)), config, costs=costs)
    result["phases"] = {name: vars(cost) for name, cost in costs.phases.items()}
    result["seconds"] = sum(cost.seconds for cost in costs.phases.values())
    result["peak_bytes"] = peak.bytes()
    result["parameters_after"] = count_parameters(model)
    result["speed"]["pruned"] = speed(model, data[0][:1], options)
    return result


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    text = f"# Pruning on one GPU\n\nMade by `python benchmarks/gpu.py`: {about}. Peaks are of all so far.\n\n"
    for size, row in results["sizes"].items():
        text += f"## {size}: {row['tokens']:,} tokens, {row['parameters']:,} parameters, {row['parameters_after']:,} after\n\n"
        rows = [(name, f"{c['seconds']:.2f}", f"{c['peak_bytes'] / 1e9:.2f}") for name, c in row["phases"].items()]
        rows.append(("all", f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}"))
        bare_pass = row["bare"]
        rows.append(("a bare pass", f"{bare_pass['seconds']:.2f}", f"{bare_pass['peak_bytes'] / 1e9:.2f}"))
        text += markdown(("phase", "seconds", "peak, GB"), rows) + "\n"
        dense, pruned = row["speed"]["dense"], row["speed"]["pruned"]
        rates = [(n, f"{dense[n]:,.0f}", f"{pruned[n]:,.0f}", f"{pruned[n] / dense[n]:.2f}") for n in dense]
        text += markdown(("tokens a second", "dense", "pruned", "speed-up"), rates) + "\n"
    return text + f"Goals: {GOAL}\n"


def main() -> None:
    options = arguments()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    results["machine"] = machine(options)
    failed = []
    for size in ["tiny"] if options.tiny else options.sizes:
        command = [sys.executable, __file__, "--row", size]
        for name in ("device", "dtype", "ratio", "iterations", "decoded"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(size)
            continue
        results.setdefault("sizes", {})[size] = json.loads(done.stdout.splitlines()[-1])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, results)
    if results.get("sizes"):
        text = report(results)
        write_text(options.output.with_suffix(".md"), text)
        print(text)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
