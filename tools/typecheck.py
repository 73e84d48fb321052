"""Run mypy as if the package were installed: mypy does not follow the mapping of ``callbacks/`` to ``lit_prune.callbacks``."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what torch's modules cannot say of their attributes; names and arguments of our own are checked in benchmarks as well
LOOSE = (
    "arg-type",
    "assignment",
    "call-overload",
    "index",
    "misc",
    "operator",
    "override",
    "union-attr",
    "var-annotated",
)


def main() -> int:
    """Lay the package out in a temporary folder, with the scripts beside it, and check it there."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "lit_prune"
        shutil.copytree(ROOT / "lit_prune", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "callbacks", package / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train.py", folder)
        benchmarks = [shutil.copy(script, folder) for script in sorted((ROOT / "benchmarks").glob("*.py"))]
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache")]
        strict = subprocess.call([*command, "lit_prune", "train.py"], cwd=folder)
        loose = ["--no-warn-unused-ignores", *(f"--disable-error-code={code}" for code in LOOSE)]
        return strict | subprocess.call([*command, *loose, *benchmarks], cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
