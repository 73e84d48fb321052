"""Reading JSON, and writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_prune.errors import PruningError

# bytes of a name, on every common file system
LONGEST_NAME = 255
# what tempfile puts behind a prefix
_RANDOM = 8


def check_names(path: str | os.PathLike[str]) -> None:
    """Raise an error if a name in a path is longer than file systems allow.

    Raises:
        PruningError: With the name.
    """
    for name in Path(path).parts:
        if (found := len(os.fsencode(name))) > LONGEST_NAME:
            raise PruningError(
                f"{path} cannot be written: {name[:20]!r}... has {found} bytes; expected names of {LONGEST_NAME} at most."
            )


def beginning(name: str, most: int) -> str:
    """The beginning of a name that has so many bytes at most."""
    while len(os.fsencode(name)) > most:
        name = name[:-1]
    return name


def check_writable(path: str | os.PathLike[str], *, file: bool = False) -> None:
    """Raise an error unless a folder, or a file, can be written at ``path``; leaves nothing behind.

    A small file is written and removed: where the folder is there, in it; otherwise in the nearest folder above it that is.

    Args:
        path: What is to be written later. It need not exist, nor need the folders above it.
        file: Whether it is a file, and not a folder to write files into.

    Raises:
        PruningError: If there is something else at ``path``, a folder on the way is a file, a name is too long, or the disk
            refuses.
    """
    check_names(path)
    target = Path(path).absolute()
    if os.path.lexists(target) and target.is_dir() == file:
        raise PruningError(
            f"{path} is {'a folder; expected the name of a file' if file else 'not a folder'}. Name another output."
        )
    folder = target.parent if file else target
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise PruningError(f"{path} cannot be written: {folder} is not a folder. Name another output.")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lit_prune-test-") as trial:
            trial.write(b"x")
            trial.flush()
    except OSError as error:
        raise PruningError(
            f"{path} cannot be written: creating a file in {folder} failed ({error.strerror or error}). Name another output,"
            " or change the permissions."
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: If there is no file.
        PruningError: If it cannot be read, or is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    except OSError as error:
        raise PruningError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise PruningError(f"{path} is damaged: its brackets are nested too deeply.") from error
    except ValueError as error:
        raise PruningError(f"{path} is damaged: it is not JSON ({error}).") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` at the end, or remove it on an error.

    Raises:
        PruningError: If there is a folder, a device or the like at ``path``.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise PruningError(f"{path} is there and is no ordinary file, so it cannot be replaced. Name another output.")
    # a link stays, and the file that it leads to is replaced
    path = Path(os.path.realpath(path))
    with _folder(path.parent):
        room = LONGEST_NAME - _RANDOM - len(os.fsencode(f"..{path.suffix}"))
        prefix = f".{beginning(path.name, room)}."
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        os.close(handle)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def replacing_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to write files to; move them all into ``folder`` at the end, or none of them on an error.

    Files of other names that are in ``folder`` stay. Folders that an error made needless are removed.
    """
    folder = Path(folder)
    with _folder(folder):
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".lit_prune-new-"))
        try:
            yield temporary
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on an error, remove those that were made here and are empty."""
    missing = []
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            break
        missing.append(place)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
