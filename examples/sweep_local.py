"""Run points of the sweep without a server: W&B's package ``sweeps`` checks the file and chooses them, as the server does.

    WANDB_MODE=offline python examples/sweep_local.py 2

The number says how many points to run; all of them without it.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import sweeps
import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def run_point(parameters: dict[str, object]) -> dict[str, float]:
    """Run the sweep's program with the parameters of a point, and give what it measured."""
    options = [f"--{name}={value}" for name, value in parameters.items()]
    subprocess.run([sys.executable, str(HERE / "sweep_train.py"), *options], check=True)
    folder = Path("outputs/sweep") / f"{parameters['importance']}-{parameters['pruning_ratio']}"
    return json.loads((folder / "point.json").read_text())


if __name__ == "__main__":
    sweep = yaml.safe_load((HERE / "sweep.yaml").read_text())
    if violations := sweeps.schema_violations_from_proposed_config(sweep):
        raise SystemExit(f"sweep.yaml is no sweep: {violations}")
    most = int(sys.argv[1]) if len(sys.argv) > 1 else None
    runs, points = [], []
    while (most is None or len(points) < most) and (chosen := sweeps.next_run(sweep, runs)) is not None:
        parameters = {name: setting["value"] for name, setting in chosen.config.items()}
        points.append(run_point(parameters))
        metric = sweep["metric"]["name"]
        runs.append(
            sweeps.SweepRun(config=chosen.config, state="finished", summaryMetrics={metric: points[-1][metric]})
        )
    table = Table("importance", "pruning_ratio", "parameters", "val_accuracy", title="sweep")
    for point in points:
        row = (
            point["importance"],
            f"{point['pruning_ratio']}",
            f"{point['parameters']:,.0f}",
            f"{point['val_accuracy']:.3f}",
        )
        table.add_row(*row)
    Console().print(table)
    figure, axis = plt.subplots(layout="constrained")
    for point in points:
        axis.scatter(
            point["parameters"], point["val_accuracy"], label=f"{point['importance']} {point['pruning_ratio']}"
        )
    axis.set(xlabel="parameters", ylabel="accuracy on held-out digits")
    axis.legend()
    figure.savefig("outputs/sweep/sweep.png")
