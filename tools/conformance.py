"""Run the conformance suite and write its table: ``python tools/conformance.py`` makes docs/conformance.md."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from lit_prune import find_group_sets  # noqa: E402
from lit_prune._files import write_text  # noqa: E402

EMPTY = "test_loses_whole_layers"
COLUMNS = {
    "test_equals_zeroed_dense_model": "= dense",
    "test_counts": "counts",
    "test_generates_with_cache": "generates",
    "test_survives_saving": "saved",
    "test_trains": "trains",
    "test_importance_is_that_of_autograd": "importance",
    "test_is_pruned_again": "again",
    EMPTY: "empty",
    "test_is_repaired": "repaired",
    "test_loses_blocks": "blocks",
}
MARKS = {"passed": "✓", "skipped": "–", "failed": "✗"}
EXPLANATION = """\
* **= dense**: the pruned model computes what the dense model does with the weights of the removed groups set to zero, under every
  listed attention implementation (norms over all heads count those that stay; routers give minus infinity to removed experts).
* **counts**: the cost of a group, and what a plan says it removes, are differences of `sum(p.numel())`.
* **generates**: `generate` with a cache gives the tokens that it gives without.
* **saved**: what is saved and loaded (or rebuilt from plan and state_dict) gives the same outputs, bit for bit.
* **trains**: two steps of AdamW with carried state are those of the zeroed dense model.
* **importance**: `taylor` of a group is what a cut takes away from a model that holds plain autograd's abs(θ·g) as its weights.
* **again**: two cuts are the one cut that their composed plan describes.
* **empty**: kinds of which a layer may lose every group; it is then skipped, and caches keep working. Of the other kinds a
  group has to stay in every layer (of experts, as many as a token goes to), which selection knows.
* **repaired**: calibration, plan, repair and cut; least squares brings the model nearer to the dense one (`no` under *refit*
  where nothing can be refitted).
* **blocks**: without its first block the model computes what the dense one does that passes it over, with a cache and without,
  and after saving; – where no block may leave.
"""


class _Results:
    """A pytest plugin that notes what became of every test."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name, _, case = report.nodeid.rpartition("::")[2].partition("[")
            if self.outcomes.get((name, case[:-1])) != "failed":
                self.outcomes[name, case[:-1]] = report.outcome


def main() -> int:
    """Run the suite, write the table, and say by the exit status whether everything passed."""
    results = _Results()
    status = pytest.main(
        [str(ROOT / "tests" / "architectures" / "test_conformance.py"), "-q", "-p", "no:cacheprovider", "-m", "slow or not slow"],
        [results],
    )
    from architecture_cases import CASES

    found = {name for name, _ in results.outcomes}
    assert found == set(COLUMNS), f"The columns of the table are {set(COLUMNS)}; the suite has {found}."
    header = ["architecture", "groups", "attention", *COLUMNS.values(), "refit", "special parts"]
    rows = [header, ["---"] * 3 + [":-:"] * (len(COLUMNS) + 1) + ["---"]]
    for case in CASES:
        marks = {name: MARKS[results.outcomes[name, case.name]] for name in COLUMNS}
        if marks[EMPTY] == MARKS["passed"]:
            marks[EMPTY] = ", ".join(sorted({s.kind for s in find_group_sets(case.build()) if not s.minimum}))
        kinds = ", ".join(kind.replace("_", " ") for kind in case.kinds)
        rows.append(
            [case.name, kinds, ", ".join(case.attentions), *marks.values(), "yes" if case.refits else "no", case.notes]
        )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    write_text(
        ROOT / "docs" / "conformance.md",
        f"# Conformance\n\nMade by `python tools/conformance.py` on {datetime.date.today()} with torch {torch.__version__} and"
        f" transformers {transformers.__version__}, on tiny random models. A new architecture is one more entry of `CASES` in"
        f" tests/architecture_cases.py.\n\n{table}\n\n{EXPLANATION}",
    )
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
