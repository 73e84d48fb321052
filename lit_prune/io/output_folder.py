"""Writing the folder of a saved model: it is there whole or not at all, and nothing that lit_prune did not write is replaced."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_prune._files import LONGEST_NAME, beginning, check_names, check_writable, read_json
from lit_prune.errors import PruningError
from lit_prune.io.manifest import MANIFEST, entries, read_manifest, write_manifest

# what earlier versions, which left no list of their files, wrote into the folder of a model
_WRITTEN_BEFORE = re.compile(
    r"""model\.safetensors | model-\d+-of-\d+\.safetensors | model\.safetensors\.index\.json | config\.json
    | generation_config\.json | README\.md | modeling_pruned\.py | tokenizer\.json | tokenizer_config\.json
    | special_tokens_map\.json | added_tokens\.json | vocab\.(json|txt) | merges\.txt | tokenizer\.model | spiece\.model
    | sentencepiece\.bpe\.model | chat_template\.jinja | additional_chat_templates/[^/]+\.jinja
    | pruning/((plan|report)\.json | report\.html | group_table\.csv | (kept|importance|scores|timeline)\.png)""",
    re.VERBOSE,
)
# what is random in the name of a folder beside the one that is written, in bytes and then in characters
_RANDOM = 4
_LONGEST = LONGEST_NAME - len("..new-") - 2 * _RANDOM


def check_replaceable(directory: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise an error unless a folder can be written here, or replaced, without losing anything; nothing is changed.

    A folder is replaced only if lit_prune wrote everything in it.

    Args:
        directory: The folder that is to be written later.
        sources: Files and folders that are read for it; names that are no local path (of a hub's repository) are fine.

    Raises:
        PruningError: If ``directory`` is a file, holds something that lit_prune did not write, is or contains the working
            directory or the home directory, is a source, inside one or around one, is a mount point that is not empty,
            or cannot be written.
    """
    check_names(directory)
    folder = resolved(directory)
    _check_place(folder, directory)
    for source in sources:
        place = resolved(source)
        if not place.exists():
            continue
        if place == folder or folder in place.parents or place in folder.parents:
            relation = "is" if place == folder else "contains" if folder in place.parents else "is inside"
            raise PruningError(
                f"The output {directory} {relation} {source}, which is read for it. Name a folder elsewhere; nothing was"
                " changed."
            )
    if os.path.lexists(folder):
        if not folder.is_dir():
            raise PruningError(
                f"{directory} exists and holds no saved model: it is not a folder. Name another one; nothing was changed."
            )
        _check_content(folder, directory)
    check_writable(folder if _in_place(folder) else folder.parent)


@contextmanager
def replacing_folder(
    directory: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """Give a temporary folder to write to, which takes the place of ``directory`` at the end, or is removed on an error.

    What was there is moved aside first and deleted last: if the process is killed, either it or the new folder is whole.
    If it is killed just between the two moves, the next call puts the old folder back.

    Args:
        directory: The folder to write; see :func:`check_replaceable`.
        sources: Files and folders that are read for it.

    Raises:
        PruningError: As :func:`check_replaceable` does, at the beginning, and again before anything is moved.
    """
    sources = list(sources)
    folder = resolved(directory)
    _restore(folder)
    check_replaceable(directory, sources)
    in_place = _in_place(folder)
    parent = folder if in_place else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = _made(parent, ".lit_prune-new-" if in_place else _prefix(folder, "new"))
    try:
        yield temporary
        write_manifest(temporary)
        _to_disk(temporary)
        if in_place:
            _fill(folder, temporary)
        else:
            check_replaceable(directory, sources)
            _swap(folder, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path, with links followed.

    Raises:
        PruningError: If its links lead in a circle.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise PruningError(f"{path} is a symbolic link that leads nowhere: {error}.") from error


def leftover(directory: str | os.PathLike[str]) -> Path | None:
    """The folder that was moved aside by a process that was killed before the new one took its place, if there is one."""
    folder = resolved(directory)
    if os.path.lexists(folder) or not folder.parent.is_dir():
        return None
    found = [p for p in _beside(folder, "old") if p.is_dir() and any(p.iterdir())]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def is_mount_point(folder: Path) -> bool:
    """Whether a file system is mounted at a folder, a folder of the same file system (a bind mount) among them."""
    if os.path.ismount(folder):
        return True
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        # the fifth field; blanks and the like are written in octal
        places = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split(" ")[4]) for line in lines)
        return str(folder) in places
    return False


def _check_place(folder: Path, directory: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be spared, whatever is in it."""
    places = {"the root of the file system": Path(folder.anchor)}
    with suppress(OSError):
        places["the working directory"] = Path.cwd().resolve()
    with suppress(OSError, RuntimeError):
        places["the home directory"] = Path.home().resolve()
    for what, place in places.items():
        if place == folder or folder in place.parents:
            raise PruningError(
                f"The output {directory} {'is' if place == folder else 'contains'} {what} ({place}); expected a folder of its"
                " own. Nothing was changed."
            )


def _check_content(folder: Path, directory: str | os.PathLike[str]) -> None:
    """Refuse a folder with anything in it that lit_prune did not write."""
    try:
        present = sorted(os.listdir(folder))
    except OSError as error:
        raise PruningError(f"{directory} cannot be read: {error.strerror}.") from error
    if present and is_mount_point(folder):
        raise PruningError(
            f"{directory} is a mount point, which cannot be replaced, and holds {present[:3]}. Name a folder inside it, or"
            " empty it first; nothing was changed."
        )
    for place, folders, _ in os.walk(folder):
        if inner := [Path(place) / name for name in folders if is_mount_point(Path(place) / name)]:
            raise PruningError(
                f"{directory} holds the mount point {inner[0]}. Name another folder; nothing was changed."
            )
    found = sorted(entries(folder))
    if not found:
        return
    unknown = _unknown(folder, found)
    if unknown is None:
        raise PruningError(
            f"{directory} exists and holds no saved model of lit_prune, but {found[:3]}; refusing to replace it. Name another"
            " folder; nothing was changed."
        )
    if unknown:
        raise PruningError(
            f"{directory} holds files that lit_prune did not write, which replacing the folder would delete: {unknown[:3]}"
            f" ({len(unknown)} of {len(found)}). Move them away, or name another folder; nothing was changed."
        )


def _unknown(folder: Path, found: Iterable[str]) -> list[str] | None:
    """Of the files in a folder, those that lit_prune did not write; ``None`` if it is not the folder of a saved model."""
    if (folder / MANIFEST).is_file():
        try:
            named = {*read_manifest(folder / MANIFEST), MANIFEST}
        except PruningError:
            return None
        return [name for name in found if name not in named]
    try:
        config = read_json(folder / "config.json")
    except (OSError, PruningError):
        return None
    pruning = config.get("pruning") if isinstance(config, Mapping) else None
    if not isinstance(pruning, Mapping) or not isinstance(pruning.get("digest"), str):
        return None
    return [name for name in found if _WRITTEN_BEFORE.fullmatch(name) is None]


def _in_place(folder: Path) -> bool:
    """Whether files have to be moved into the folder, as it is a mount point or no folder can be put in its place."""
    if not folder.is_dir():
        return False
    if is_mount_point(folder):
        return True
    return not any(folder.iterdir()) and not os.access(folder.parent, os.W_OK)


def _prefix(folder: Path, what: str) -> str:
    """What the name of a folder ``"new"`` or ``"old"`` beside another one begins with."""
    name = folder.name
    if len(os.fsencode(name)) > _LONGEST:
        # names that begin alike are told apart
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{beginning(name, _LONGEST - len(digest) - 1)}-{digest}"
    return f".{name}.{what}-"


def _made(parent: Path, prefix: str) -> Path:
    """A new folder with the permissions that any new one gets there, by umask, setgid bit and access lists.

    ``tempfile`` makes folders for the user alone, and a later ``chmod`` would have to know all of these.
    """
    while True:
        place = parent / f"{prefix}{secrets.token_hex(_RANDOM)}"
        with suppress(FileExistsError):
            place.mkdir()
            return place


def _beside(folder: Path, what: str) -> list[Path]:
    if not folder.parent.is_dir():
        return []
    prefix = _prefix(folder, what)
    # a dot behind it is in the name of another folder, "model.old-1" beside "model"
    return [p for p in folder.parent.iterdir() if p.name.startswith(prefix) and "." not in p.name.removeprefix(prefix)]


def _restore(folder: Path) -> None:
    """Finish what a process that was killed while it replaced the folder left undone."""
    old = leftover(folder)
    if old is not None:
        os.rename(old, folder)
        warnings.warn(
            f"{folder} was missing: a process was killed while it replaced the folder. It was put back from {old.name}.",
            stacklevel=4,
        )
    for place in _beside(folder, "old"):
        # the new folder took its place, so this one was to be deleted; nothing but what was checked then is
        if _unknown(place, entries(place)) == []:
            _delete(place)
        else:
            with suppress(OSError):
                place.rmdir()
    for place in _beside(folder, "new"):
        warnings.warn(
            f"{place} is what a process that was killed, or is still running, has written of {folder}. Delete it if none"
            " is running.",
            stacklevel=4,
        )


def _swap(folder: Path, new: Path) -> None:
    """Put a new folder in the place of an old one, which is moved aside first and deleted last."""
    if not folder.exists() or not any(folder.iterdir()):
        with _explained(folder):
            os.rename(new, folder)
        return
    old = _made(folder.parent, _prefix(folder, "old"))
    try:
        with _explained(folder):
            # takes the place of the empty folder
            os.rename(folder, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        with _explained(folder):
            os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    try:
        _delete(old)
    except OSError as error:
        warnings.warn(f"{folder} was written, but what it replaced is left at {old}: {error}.", stacklevel=4)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what it means that a folder cannot be moved."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise PruningError(
            f"{folder} cannot be replaced ({error.strerror}): it is a mount point, or another process uses it. Name another"
            " folder; what was there is unchanged."
        ) from error


def _fill(folder: Path, new: Path) -> None:
    """Move the files of a new folder into an empty one, the list of them last; on an error, take them out again."""
    present = [name for name in entries(folder) if name.partition("/")[0] != new.name]
    if present:
        raise PruningError(f"{folder} was empty and now holds {sorted(present)[:3]}; refusing to write among them.")
    moved: list[Path] = []
    try:
        for name in (*sorted(set(entries(new)) - {MANIFEST}), MANIFEST):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(new / name, target)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink()
            if target.parent != folder:
                with suppress(OSError):
                    target.parent.rmdir()
        raise
    shutil.rmtree(new)


def _delete(folder: Path) -> None:
    """Delete the folder of a saved model; what tells that it is one goes last, so that this can be finished later."""
    marks = ("config.json", MANIFEST)
    for name in (n for n in list(entries(folder)) if n not in marks):
        os.unlink(folder / name)
    for place, _, _ in list(os.walk(folder, topdown=False))[:-1]:
        os.rmdir(place)
    for name in marks:
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    os.rmdir(folder)


def _to_disk(folder: Path) -> None:
    """Have the system write the files to the disk before anything older is deleted for them."""
    for name in entries(folder):
        handle = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
