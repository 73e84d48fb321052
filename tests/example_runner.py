"""Run an example as ``python FILE`` would, with timm, torchvision and LitGPT from ``.venv/models`` where they are not installed.

python tests/example_runner.py examples/images.py [arguments]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the file that the first argument names; the rest are its own arguments."""
    file = Path(sys.argv[1])
    source = file.read_text(encoding="utf-8")
    if "import timm" in source:
        from vision_packages import vision_package

        vision_package("timm")
    if "import litgpt" in source:
        from litgpt_package import import_litgpt

        import_litgpt()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(file.parent)
    runpy.run_path(str(file), run_name="__main__")


if __name__ == "__main__":
    main()
