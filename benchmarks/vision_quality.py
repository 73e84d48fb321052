"""Pruning of a ResNet and a ViT that are trained on real images: lit_prune against torch-pruning, with equal fine-tuning.

    python benchmarks/vision_quality.py --output docs/vision_quality.json
    python benchmarks/vision_quality.py --report

Images, networks and training are in ``vision_quality_models.py``, torch-pruning's side in ``vision_quality_peer.py``. lit_prune
prunes by its defaults, with no description, to shares of the parameters. torch-pruning is brought to the same number of
parameters, and, a second time, to the same number of floating point operations. On the first seed each of its methods runs with
every setting of :data:`CANDIDATES`; the one whose pruned models are best on validation images is its setting for all seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vision_quality_models import RECIPES, Images, Recipe, accuracy, fine_tuned, fit, flops, load

from lit_prune import PruningConfig, prune
from lit_prune._files import write_text
from lit_prune.groups import count_parameters

RATIOS = (0.3, 0.5, 0.7)
OURS: dict[str, dict[str, Any]] = {"lit_prune": {}, "lit_prune, no repair": {"repair": None}}
Row = dict[str, Any]


def measure(seeds: int, output: Path) -> None:
    """Run everything, and write after every method; what the file holds already is not run again."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"settings": {}, "rows": []}
    for seed in range(seeds):
        images = load(seed)
        for network, recipe in RECIPES.items():
            done = {row["method"] for row in results["rows"] if (row["network"], row["seed"]) == (network, seed)}
            run = Run(network, recipe, images, seed)
            if len(done) == 1 + len(OURS) + len(run.candidates):
                continue
            results["rows"] = [r for r in results["rows"] if (r["network"], r["seed"]) != (network, seed)]
            run.carry_out(results, output)


class Run:
    """One network with one seed."""

    def __init__(self, network: str, recipe: Recipe, images: Images, seed: int) -> None:
        # torch-pruning is needed to measure, not to report
        from vision_quality_peer import CANDIDATES

        self.network, self.recipe, self.images, self.seed = network, recipe, images, seed
        self.candidates = CANDIDATES[network]

    def carry_out(self, results: dict[str, Any], output: Path) -> None:
        """Add the rows of the dense model, of lit_prune and of torch-pruning to the results."""
        torch.manual_seed(self.seed)
        dense = self.recipe.make()
        fit(dense, self.recipe, self.images, self.seed, tuning=False)
        rows: list[Row] = results["rows"]
        rows.append(self.row(dense, "dense", "parameters", 0.0))
        targets: list[tuple[str, float, float]] = []
        for method, options in OURS.items():
            for ratio in RATIOS:
                model = pruned(dense, self.images, ratio, options)
                rows.append(self.row(model, method, "parameters", ratio))
                if not options:
                    rows.append({**rows[-1], "equal": "flops"})
                    targets.append(("parameters", ratio, 1 - count_parameters(model) / count_parameters(dense)))
                    targets.append(("flops", ratio, 1 - flops(model) / flops(dense)))
            write(results, output)
        for method in self.candidates:
            for (equal, ratio, _), model in self.peer(dense, method, results["settings"], targets).items():
                rows.append(self.row(model, method, equal, ratio))
            write(results, output)

    def peer(
        self, dense: nn.Module, method: str, settings: dict[str, str], targets: list[tuple[str, float, float]]
    ) -> dict[tuple[str, float, float], nn.Module]:
        """torch-pruning's models by target, with its best setting, which the first call finds."""
        from vision_quality_peer import sparse, walk

        known = settings.get(f"{self.network}: {method}")
        best: dict[tuple[str, float, float], nn.Module] = {}
        best_accuracy = -1.0
        for name, setting in self.candidates[method].items():
            if known not in (None, name):
                continue
            start = sparse(dense, setting, self.recipe, self.images, self.seed) if setting.regularization else dense
            found = walk(start, setting, self.images, targets)
            right = statistics.fmean(accuracy(model, self.images.validation) for model in found.values()) if found else 0.0
            print(self.network, self.seed, method, name, f"{right:.1f} on validation images", flush=True)
            if right > best_accuracy:
                best, best_accuracy, settings[f"{self.network}: {method}"] = found, right, name
        return best

    def row(self, model: nn.Module, method: str, equal: str, ratio: float) -> Row:
        """Sizes and accuracies of a model, as it is and fine-tuned."""
        tuned = fine_tuned(model, self.recipe, self.images, self.seed)
        found = {
            "network": self.network,
            "seed": self.seed,
            "method": method,
            "equal": equal,
            "ratio": ratio,
            "parameters": count_parameters(model),
            "flops": flops(model),
            "cut": accuracy(model, self.images.test),
            "tuned": accuracy(tuned, self.images.test),
        }
        print(*found.values(), flush=True)
        return found


def pruned(dense: nn.Module, images: Images, ratio: float, options: dict[str, Any]) -> nn.Module:
    """A copy that lit_prune has pruned."""
    model = copy.deepcopy(dense)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune(model, images.calibration, loss, PruningConfig(pruning_ratio=ratio, **options))
    return model


def write(results: dict[str, Any], output: Path) -> None:
    """Write the results."""
    write_text(output, json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Measure, or write the report of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/vision_quality.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write a table beside the measurements")
    options = parser.parse_args()
    if options.report:
        from vision_quality_report import report

        write_text(options.output.with_suffix(".md"), report(json.loads(options.output.read_text())))
    else:
        torch.set_num_threads(1)
        measure(options.seeds, options.output)


if __name__ == "__main__":
    main()
