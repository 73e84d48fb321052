"""Run mypy as if the package were installed: mypy does not follow the mapping of ``callbacks/`` to ``lit_prune.callbacks``."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Lay the package out in a temporary folder and check it there."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "lit_prune"
        shutil.copytree(ROOT / "lit_prune", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "callbacks", package / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train.py", folder)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir"]
        return subprocess.call([*command, str(ROOT / ".mypy_cache"), "lit_prune", "train.py"], cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
