"""What repair and recalibration are worth for a convolutional network, right after the cut and without any fine-tuning.

A residual network is trained on scikit-learn's digits (1,797 images of 8 x 8), pruned by each variant, and tested on the
third of the images that neither training nor calibration has seen. Needs scikit-learn and torch-pruning.

    python benchmarks/convolutions.py --output docs/convolutions.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from residual_network import ResidualNetwork
from results import write_json
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lit_prune import Architecture, PruningConfig, Traced, prune, register_architecture
from lit_prune._files import write_text
from lit_prune.groups import count_parameters

RATIOS = (0.3, 0.5, 0.7)
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {"repair": None, "recalibrate_batch_norm": False},
    "batch norms": {"repair": None},
    "bias": {"repair": "bias", "recalibrate_batch_norm": False},
    "bias, batch norms": {"repair": "bias"},
    "least squares": {"compensation": False, "recalibrate_batch_norm": False},
    "least squares, batch norms": {"compensation": False},
    "least squares, compensation": {"recalibrate_batch_norm": False},
    "least squares, compensation, batch norms (default)": {},
}


class DigitsResNet(ResidualNetwork):
    """A residual network of three stages with two blocks each, 175,000 parameters."""

    def __init__(self) -> None:
        super().__init__(16, stride=1, classes=10)


register_architecture(
    Architecture(
        name="digits-resnet",
        models=(DigitsResNet,),
        components=(Traced(example_inputs=lambda: (torch.zeros(1, 1, 8, 8),)),),
    )
)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def trained(images: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """A network trained with shifted images."""
    torch.manual_seed(seed)
    model = DigitsResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            padded = functional.pad(images[rows], (1, 1, 1, 1), value=-1.0)
            y, x = (int(i) for i in torch.randint(0, 3, (2,)))
            loss = functional.cross_entropy(model(padded[:, :, y : y + 8, x : x + 8]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images that are classified right."""
    return float((model(images).argmax(dim=1) == labels).float().mean()) * 100


def measure(seeds: int, epochs: int, output: Path) -> None:
    """Accuracies by variant and ratio, written after every seed."""
    results: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        images, labels, test_images, test_labels = digits(seed)
        dense = trained(images, labels, seed, epochs)
        batches = list(zip(images[:512].split(64), labels[:512].split(64), strict=True))
        of_dense = {"dense": {"variant": "dense", "ratio": 0.0, "parameters": [], "accuracy": []}}
        results = results or of_dense
        results["dense"]["accuracy"].append(accuracy(dense, test_images, test_labels))
        results["dense"]["parameters"].append(count_parameters(dense))
        for ratio in RATIOS:
            for name, options in VARIANTS.items():
                model = copy.deepcopy(dense)

                def loss(batch: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
                    return functional.cross_entropy(model(batch[0]), batch[1])

                prune(model, batches, loss, PruningConfig(pruning_ratio=ratio, **options))
                entry = results.setdefault(
                    f"{name} | {ratio}", {"variant": name, "ratio": ratio, "parameters": [], "accuracy": []}
                )
                entry["accuracy"].append(accuracy(model, test_images, test_labels))
                entry["parameters"].append(count_parameters(model))
                print(seed, ratio, name, round(entry["accuracy"][-1], 2), flush=True)
        write_json(output, results)
        write_text(output.with_suffix(".md"), table(results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Mean accuracies and their spread, as Markdown."""
    dense = results["dense"]["accuracy"]
    lines = [
        "# Pruning a convolutional network: what repair and recalibration are worth",
        "",
        "A ResNet of 175,000 parameters on digits of 8 x 8 pixels: accuracy in percent right after the cut, mean and standard"
        f" deviation of {len(dense)} seeds; dense {statistics.fmean(dense):.1f}. The damping of the refit was chosen at 80% and"
        " 90%. Made by `python benchmarks/convolutions.py`.",
        "",
        "| | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |",
        "|---" * (len(RATIOS) + 1) + "|",
    ]
    for name in VARIANTS:
        cells = [results[f"{name} | {ratio}"]["accuracy"] for ratio in RATIOS]
        lines.append(
            f"| {name} | " + " | ".join(f"{statistics.fmean(c):.1f} ± {statistics.pstdev(c):.1f}" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/convolutions.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    measure(options.seeds, options.epochs, options.output)


if __name__ == "__main__":
    main()
