"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lit_prune.errors import PruningError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise an error unless a file or a folder can be written at ``path``; leaves nothing behind.

    A small file is written and removed: where the folder is there, in it; otherwise in the nearest folder above it that is.

    Args:
        path: The file or folder that is to be written later. It need not exist, nor need the folders above it.

    Raises:
        PruningError: If a folder on the way is a file, or the file cannot be written.
    """
    target = Path(path).absolute()
    folder = target if target.is_dir() else target.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise PruningError(f"{path} cannot be written: {folder} is not a folder. Name another output.")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lit_prune-test-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise PruningError(
            f"{path} cannot be written: creating a file in {folder} failed ({error.strerror or error}). Name another output,"
            " or change the permissions."
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` at the end, or remove it on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
