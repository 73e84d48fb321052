"""The JSON files that benchmarks write."""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path
from typing import Any

from lit_prune._files import write_text


def write_json(path: Path, value: Any) -> None:
    """Write a value, lists of numbers in one line each."""
    text = json.dumps(value, indent=1)
    # a string holds no line break in JSON, so that what is found is a list
    text = re.sub(
        r"\[\n[-+.\dEe,\s]+\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )
    write_text(path, text + "\n")


class Results:
    """A JSON file that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"protocol": {}, "dense": {}, "looks": [], "runs": {}}
        return json.loads(self.path.read_text()) if self.path.exists() else empty

    def add(self, field: str, key: str | None, value: Any) -> None:
        """Set ``field[key]``, or append to the list ``field``."""
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = self.read()
            if key is None:
                results[field].append(value)
            else:
                results[field][key] = value
            write_json(self.path, results)
