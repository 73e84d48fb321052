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
from results import write_json
from torch import Tensor, nn
from torch.nn import functional
from vision_quality_models import RECIPES, Images, Recipe, accuracy, fine_tuned, fit, flops, load

from lit_prune import PruningConfig, prune
from lit_prune._files import write_text
from lit_prune.groups import count_parameters

RATIOS = (0.3, 0.5, 0.7)
REFERENCE = "lit_prune"
OURS: dict[str, dict[str, Any]] = {REFERENCE: {}, "lit_prune, no repair": {"repair": None}}
Row = dict[str, Any]


def measure(seeds: int, output: Path) -> None:
    """Run everything, and write after every method; what the file holds already is not run again."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"settings": {}, "rows": []}
    for seed in range(seeds):
        images = load(seed)
        for network, recipe in RECIPES.items():
            Run(network, recipe, images, seed).carry_out(results, output)


class Run:
    """One network with one seed."""

    def __init__(self, network: str, recipe: Recipe, images: Images, seed: int) -> None:
        # torch-pruning is needed to measure, not to report
        from vision_quality_peer import CANDIDATES

        self.network, self.recipe, self.images, self.seed = network, recipe, images, seed
        self.candidates = CANDIDATES[network]

    def carry_out(self, results: dict[str, Any], output: Path) -> None:
        """Add the rows of the dense model, of lit_prune and of torch-pruning to the results, without those that are there."""
        rows: list[Row] = results["rows"]
        done = {row["method"] for row in rows if (row["network"], row["seed"]) == (self.network, self.seed)}
        if done.issuperset(["dense", *OURS, *self.candidates]):
            return
        torch.manual_seed(self.seed)
        dense = self.recipe.make()
        fit(dense, self.recipe, self.images, self.seed, tuning=False)
        if "dense" not in done:
            rows.append(self.row(dense, "dense", "parameters", 0.0))
        for method in (m for m in OURS if m not in done):
            for ratio in RATIOS:
                model = pruned(dense, self.images, ratio, OURS[method])
                rows.append(self.row(model, method, "parameters", ratio))
                if method == REFERENCE:
                    rows.append({**rows[-1], "equal": "flops"})
            write(results, output)
        targets = self.targets(rows, dense)
        for method in (m for m in self.candidates if m not in done):
            for (equal, ratio, _), model in self.peer(dense, method, results["settings"], targets).items():
                rows.append(self.row(model, method, equal, ratio))
            write(results, output)

    def targets(self, rows: list[Row], dense: nn.Module) -> list[tuple[str, float, float]]:
        """What torch-pruning is to reach: a measure, lit_prune's ratio, and the share of the measure that lit_prune removed."""
        whole = {"parameters": count_parameters(dense), "flops": flops(dense)}
        wanted = (self.network, self.seed, REFERENCE)
        ours = [row for row in rows if (row["network"], row["seed"], row["method"]) == wanted]
        return [(row["equal"], row["ratio"], 1 - row[row["equal"]] / whole[row["equal"]]) for row in ours]

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
            right = (
                statistics.fmean(accuracy(model, self.images.validation) for model in found.values()) if found else 0.0
            )
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
    write_json(output, results)


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
