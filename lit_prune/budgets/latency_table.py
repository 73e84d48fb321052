"""Times of a model over the number of heads, channels and blocks that it keeps: cached, and carried to other machines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_prune._files import write_text
from lit_prune.budgets.inputs import inputs_of
from lit_prune.budgets.workloads import Workload
from lit_prune.errors import ArgumentValueError, PruningError
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.transformers_internals import implementations_of

FORMAT = "lit_prune-latency"
VERSION = 2


@dataclass(frozen=True)
class Times:
    """What the sets of one kind and size save, one set, when only some of their groups stay.

    Args:
        kind: Kind of the sets.
        size: Number of groups of each.
        sets: Names of the sets.
        kept: Numbers of groups that were measured, ascending; the last is ``size``.
        saved: Seconds that each number saves, against ``size``.
        multiple: The step that the measured times have: between multiples of it a set is no faster than at the next one.
    """

    kind: str
    size: int
    sets: tuple[str, ...]
    kept: tuple[int, ...]
    saved: tuple[float, ...]
    multiple: int = 1

    def at(self, kept: np.ndarray) -> np.ndarray:
        """Seconds that are saved where so many groups stay: interpolated, and extrapolated below the smallest number."""
        points, saved = np.array(self.kept, dtype=float), np.array(self.saved)
        result = np.interp(kept, points, saved)
        if len(points) > 1:
            slope = (saved[0] - saved[1]) / (points[1] - points[0])
            result = np.where(kept < points[0], saved[0] + slope * (points[0] - kept), result)
        return result


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of one phase of one model on one machine.

    Args:
        setting: What the times are of: ``device``, ``torch``, ``dtype``, ``autocast``, ``threads``, ``shapes`` (a digest of
            those of all parameters), ``blocks`` (whether they were measured), ``implementations`` (of attention and experts),
            ``phase``, ``batch``, ``length``, and ``digest`` (of the inputs of a model that takes no token ids).
        seconds: Of the model as it is.
        times: By kind and size of group sets.
    """

    setting: Mapping[str, Any]
    seconds: float
    times: tuple[Times, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {"setting": dict(self.setting), "seconds": self.seconds, "times": [asdict(t) for t in self.times]}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            PruningError: If the data are no table.
        """
        try:
            times = tuple(
                Times(
                    str(t["kind"]),
                    int(t["size"]),
                    tuple(map(str, t["sets"])),
                    tuple(map(int, t["kept"])),
                    tuple(map(float, t["saved"])),
                    int(t["multiple"]),
                )
                for t in data["times"]
            )
            table = cls(dict(data["setting"]), float(data["seconds"]), times)
        except (KeyError, TypeError, ValueError) as error:
            raise PruningError(f"A latency table is malformed: {type(error).__name__}: {error}.") from error
        if not table.seconds > 0 or any(len(t.kept) != len(t.saved) or not t.kept for t in times):
            raise PruningError(
                "A latency table is malformed: expected seconds above 0, and a saving for every number of groups."
            )
        return table


def setting_of(workload: Workload, group_sets: Sequence[GroupSet], phase: str) -> dict[str, Any]:
    """What the times of a model depend on, as plain data; a batch of the user's is run once, to see its shapes."""
    model = workload.model
    weight = next(model.parameters())
    described: list[list[Any]] = [[name, list(p.shape)] for name, p in model.named_parameters()]
    described += [[*s.key, s.size] for s in group_sets if s.kind != BLOCK]
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else _processor()
    return {
        "device": device,
        "torch": torch.__version__,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": None if weight.is_cuda else torch.get_num_threads(),
        "shapes": hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        "blocks": any(s.kind == BLOCK for s in group_sets),
        "implementations": implementations_of(model),
        **asdict(inputs_of(workload)),
        "phase": phase,
        "batch": workload.batch,
        "length": workload.length,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine if hasattr(os, "uname") else "cpu")


def save_tables(path: str | os.PathLike[str], tables: Sequence[LatencyTable]) -> None:
    """Write tables to one JSON file."""
    content = {"format": FORMAT, "version": VERSION, "tables": [table.to_dict() for table in tables]}
    write_text(Path(path), json.dumps(content, indent=1) + "\n")


def load_tables(path: str | os.PathLike[str]) -> list[LatencyTable]:
    """Read tables from a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        PruningError: If it is no file of tables.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise KeyError("format")
        return [LatencyTable.from_dict(table) for table in data["tables"]]
    except (ValueError, KeyError, TypeError, PruningError) as error:
        raise PruningError(
            f"{path} is no file of latency tables of version {VERSION}, as lit_prune.measure_latency writes them: {error}."
        ) from error


def find_table(path: str, setting: Mapping[str, Any]) -> LatencyTable:
    """The table of a file that is of a model with these shapes, and of the same phase, batch, length and inputs.

    Device, threads, data type, implementations and version of torch are those of the machine that it was measured on, and may
    be others. Of several tables, one with times of blocks is taken where blocks may be removed, and one of this data type.

    Raises:
        ArgumentValueError: If the file has none.
        FileNotFoundError: If there is no such file.
        PruningError: If it is no file of tables.
    """
    tables = load_tables(path)
    # those of a model that takes no token ids have a digest in place of a batch and a length
    wanted = ("phase", "batch", "length") if setting["digest"] is None else ("phase", "digest")
    fitting = [t for t in tables if all(t.setting.get(k) == setting[k] for k in (*wanted, "shapes"))]
    if fitting:
        return max(
            fitting,
            key=lambda t: (
                bool(t.setting.get("blocks")) or not setting["blocks"],
                t.setting.get("dtype") == setting["dtype"],
            ),
        )
    shapes = [t for t in tables if t.setting.get("shapes") == setting["shapes"]]
    held = [{k: t.setting.get(k) for k in wanted} for t in shapes]
    reason = (
        f"for a model of these shapes it holds {held}" if shapes else "none of its tables is of a model of these shapes"
    )
    raise ArgumentValueError(
        f"budget.latency_table must hold times of { ({k: setting[k] for k in wanted}) } for this model; in {path} {reason}."
        " Measure them with lit_prune.measure_latency."
    )


def cache_file(setting: Mapping[str, Any]) -> Path:
    """Where measured times of a setting are kept: in the folder that ``LIT_PRUNE_CACHE`` names, or the user's cache."""
    root = os.environ.get("LIT_PRUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lit_prune"
    key = hashlib.sha256(json.dumps(dict(setting), sort_keys=True).encode()).hexdigest()
    return Path(root).expanduser() / "latency" / f"{key[:32]}.json"
