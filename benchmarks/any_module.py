"""Any module: prunes a zoo of models with nothing but a batch and a loss, and with torch-pruning beside it.

Every row runs in a process of its own, bounded in time and memory. Results are added to a JSON file as they come, and what is
in it is not run again; ``--report`` writes the table from it.

    python benchmarks/any_module.py --column peer            # torch-pruning, all rows
    python benchmarks/any_module.py --only timm/swin         # rows whose key contains this
    python benchmarks/any_module.py --report
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import vision_packages
from any_module_models import Row, rows
from results import write_json

from lit_prune.errors import first_line

RATIOS = (0.2, 0.5)
COLUMNS = ("ours", "peer")
# of a row, a ratio, and the time of the monotonic clock when it should be done
Measure = Callable[[Row, float, float], dict[str, Any]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--column", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose key contains one of these")
    parser.add_argument("--again", action="store_true", help="run rows that are in the file, too")
    parser.add_argument("--retry", action="store_true", help="run rows again that ran out of time")
    parser.add_argument("--output", type=Path, default=Path("docs/any_module.json"), help="JSON file; added to")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a row and column")
    parser.add_argument("--memory", type=float, default=6.0, help="address space of a row's process, in GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the keys of the rows, and stop")
    parser.add_argument("--report", action="store_true", help="write the table, and run nothing")
    parser.add_argument("--page", type=Path, default=Path("docs/any_module.md"), help="page that the table is part of")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    vision_packages.install()
    zoo = rows()
    if options.list:
        print("\n".join(zoo))
    elif options.report:
        from any_module_report import write_report

        write_report(zoo, read(options.output), options.page)
    else:
        parent(zoo, options)


def parent(zoo: dict[str, Row], options: argparse.Namespace) -> None:
    """Run what is missing, each row in a process of its own."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for column in options.column:
        measure = measures(column)
        for key, row in zoo.items():
            if options.only and not any(part in key for part in options.only):
                continue
            earlier = read(options.output).get(key, {}).get(column)
            if earlier is not None and not options.again and not (options.retry and ran_out_of_time(earlier)):
                continue
            found = run(row, measure, options)
            results = read(options.output)
            results.setdefault(key, {})[column] = found
            write_json(options.output, results)
            print(key, column, json.dumps(found), flush=True)


def measures(column: str) -> Measure:
    """What a column measures of a row at a ratio; imports what it needs, before any process is forked."""
    for package in ("litgpt", "timm", "torchvision.models", "transformers.models.wav2vec2.modeling_wav2vec2"):
        importlib.import_module(package)
    if column == "ours":
        from any_module_ours import our_row

        return our_row
    from any_module_peer import peer_row

    return peer_row


def run(row: Row, measure: Measure, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds of a row, or what it found before it was ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    begin = time.monotonic()
    process = context.Process(target=child, args=(row, measure, options, sender))
    process.start()
    sender.close()
    found: dict[str, Any] = {}
    while receiver.poll(max(0.0, begin + options.seconds - time.monotonic())):
        try:
            found.update(receiver.recv())
        except EOFError:
            break
    else:
        process.kill()
        found["error"] = f"stopped after {options.seconds:.0f} s"
    process.join()
    if process.exitcode and "error" not in found:
        found["error"] = f"the process ended with exit code {process.exitcode}"
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def child(row: Row, measure: Measure, options: argparse.Namespace, sender: Connection) -> None:
    """Measure one row and send what is found as it is found."""
    limit = int(options.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    begin = time.monotonic()
    try:
        model, batch = row.make()
        with torch.no_grad():
            row.forward(model, batch)
    except Exception as error:
        sender.send({"error": f"cannot be built here: {first_line(error)}"})
        return
    sender.send({"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__})
    del model
    for position, ratio in enumerate(RATIOS, start=1):
        # the first ratio leaves time for the second
        sender.send({f"{ratio:.0%}": measure(row, ratio, begin + 0.4 * position * options.seconds)})


def ran_out_of_time(found: dict[str, Any]) -> bool:
    """Whether a result lacks something that a longer limit may give."""
    return any(text in json.dumps(found) for text in ("stopped after", "for want of time"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
