"""Images from a folder, as a model's image processor wants them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_prune.errors import ArgumentValueError
from lit_prune.extras import missing
from lit_prune.user_errors import reading

try:
    from PIL import Image
except ImportError as error:
    raise missing("pillow", "cli", "Calibration on images") from error

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_files(folder: str | os.PathLike[str]) -> list[tuple[Path, str | None]]:
    """The images of a folder, each with the name of the folder within it that it lies in.

    Args:
        folder: Images, or a folder of images for each class.

    Returns:
        Paths in their order, and names of classes; ``None`` for an image that lies in no inner folder.

    Raises:
        ArgumentValueError: If there is none.
        FileNotFoundError: If there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(folder)!r}; expected one of images, or of a folder for each class."
        )
    found = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not found:
        raise ArgumentValueError(f"{str(folder)!r} holds no image; expected files that end in {', '.join(SUFFIXES)}.")
    return [(p, None if p.parent == root else p.relative_to(root).parts[0]) for p in found]


def read_images(files: Sequence[Path], processor: Any) -> Tensor:
    """Read images, and resize and normalise them.

    Args:
        files: The files.
        processor: An image processor of transformers.

    Returns:
        Tensor of shape ``(images, channels, height, width)``.

    Raises:
        ArgumentValueError: If one cannot be read.
    """
    images = []
    for file in files:
        with reading(f"The image {str(file)!r}"):
            try:
                with Image.open(file) as image:
                    images.append(image.convert("RGB"))
            except OSError as error:
                raise ValueError(str(error)) from error
    with reading(f"The images of {str(files[0].parent)!r}"):
        return processor(images, return_tensors="pt")["pixel_values"]
