"""The table of benchmarks/any_module.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from any_module_models import Row
from common import markdown

from lit_prune._files import write_text

BEGIN, END = "<!-- made by: python benchmarks/any_module.py --report -->", "<!-- end of what is made -->"
RATIOS = ("20%", "50%")
# relative, in float32
TOLERANCE = 1e-4
# a ratio counts as reached that is missed by no more than this share of the parameters
NEAR = 0.05


def write_report(zoo: Mapping[str, Row], results: Mapping[str, Any], page: Path) -> None:
    """Write the summary and the tables into a page, in place of those between its markers, or at its end."""
    made = f"{BEGIN}\n\n{report(zoo, results)}\n{END}\n"
    text = page.read_text() if page.exists() else "# Any module\n\n"
    before, marker, rest = text.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\n") if marker else ""
    write_text(page, before.rstrip("\n") + "\n\n" + made + (f"\n{after}" if after else ""))


def report(zoo: Mapping[str, Row], results: Mapping[str, Any]) -> str:
    """Summary by source, and one table for each."""
    sources = list(dict.fromkeys(row.source for row in zoo.values()))
    by_source = {source: {k: r for k, r in zoo.items() if r.source == source} for source in sources}
    parts = ["Models that were pruned, of those tried:", "", summary(by_source, results)]
    for source, chosen in by_source.items():
        parts += [f"### {source}", "", table(chosen, results)]
    return "\n".join(parts)


def summary(by_source: Mapping[str, Mapping[str, Row]], results: Mapping[str, Any]) -> str:
    """How many rows of each source each tool pruned."""
    head = ["source", "models"]
    head += [f"lit_prune {r}" for r in RATIOS] + [f"torch-pruning {r}" for r in RATIOS] + ["its output differs"]
    rows = []
    for source, chosen in by_source.items():
        of_all = [results.get(key, {}) for key in chosen]
        counts = [sum(our_success(r.get("ours"), ratio) for r in of_all) for ratio in RATIOS]
        peers = [sum(peer_success(r.get("peer"), ratio) for r in of_all) for ratio in RATIOS]
        wrong = sum(any(peer_differs(r.get("peer"), ratio) for ratio in RATIOS) for r in of_all)
        rows.append([source, str(len(chosen)), *map(str, (*counts, *peers, wrong))])
    return markdown(head, rows)


def our_success(found: Mapping[str, Any] | None, ratio: str) -> bool:
    """Whether the ratio was reached and every check holds."""
    one = (found or {}).get(ratio, {})
    checks = one.get("step") and one.get("optimizer")
    exact = max(one.get("masked", 1.0), one.get("resumed", 1.0)) <= TOLERANCE
    return bool(checks) and exact and _near(one, ratio)


def peer_success(found: Mapping[str, Any] | None, ratio: str) -> bool:
    """Whether the model runs and trains after the cut, with about the number of parameters that was asked for."""
    one = (found or {}).get(ratio, {})
    return bool(one.get("ran")) and _near(one, ratio)


def peer_differs(found: Mapping[str, Any] | None, ratio: str) -> bool:
    """Whether the cut model's outputs are not those of the masked dense model, where they have to be."""
    masked = (found or {}).get(ratio, {}).get("masked", {})
    return bool(masked.get("comparable")) and not masked["error"] <= TOLERANCE


def _near(one: Mapping[str, Any], ratio: str) -> bool:
    return abs(one.get("removed", 0.0) - float(ratio.rstrip("%")) / 100) <= NEAR


def table(chosen: Mapping[str, Row], results: Mapping[str, Any]) -> str:
    """One line a model."""
    head = [
        "model",
        "parameters",
        "prunable",
        *(f"removed at {r}" for r in RATIOS),
        "pruned = masked",
        "step",
        "resume",
    ]
    head += [*(f"torch-pruning {r}" for r in RATIOS), "its pruned = masked"]
    rows = []
    for key, row in chosen.items():
        result = results.get(key, {})
        ours, peer = result.get("ours", {}), result.get("peer", {})
        size = ours.get("parameters", peer.get("parameters"))
        rows.append([row.name, f"{size:,}" if size else "?", *_ours(ours), *_peer(peer)])
    return markdown(head, rows)


def _ours(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return ["not run", *[""] * 5]
    if "error" in found:
        return [_failure(found["error"]), *[""] * 5]
    both = [found.get(ratio, {}) for ratio in RATIOS]
    prunable = f"{both[0]['prunable']:.0%}" if "prunable" in both[0] else "no"
    removed = [f"{one['removed']:.1%}" if "removed" in one else _failure(one.get("error", "not run")) for one in both]
    masked = [one.get("masked", float("inf")) for one in both]
    resumed = [one.get("resumed", float("inf")) for one in both]
    step = all(one.get("step") and one.get("optimizer") for one in both)
    return [prunable, *removed, _error(masked), "yes" if step else "NO", _error(resumed)]


def _peer(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return ["not run", "", ""]
    cells = []
    for ratio in RATIOS:
        one = found.get(ratio)
        if one is None:
            cells.append(_failure(found.get("error", "not run")))
        elif one["ran"]:
            cells.append(f"{one['removed']:.1%} ({one['setting']})")
        else:
            cells.append(_failure(next(iter(one["errors"].values()), "not run")))
    masked = [one["masked"] for ratio in RATIOS if (one := found.get(ratio)) and one["ran"]]
    if not masked:
        return [*cells, ""]
    if not all(m["comparable"] for m in masked):
        return [*cells, "cannot be compared"]
    return [*cells, _error([m["error"] for m in masked])]


def _error(errors: Sequence[float]) -> str:
    worst = max(errors)
    return f"{worst:.0e}" if worst <= TOLERANCE else f"NO: {worst:.0e}"


def _failure(message: str) -> str:
    return "fails: " + message.replace("|", "\\|")[:100]
