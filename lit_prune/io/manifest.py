"""The list of files that lit_prune wrote into a folder, with checksums of the weights: what may be replaced, and verified."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lit_prune._files import read_json, write_text
from lit_prune.errors import PruningError

MANIFEST = "lit_prune_files.json"
FORMAT = "lit_prune._files"
VERSION = 1
WEIGHTS = (".safetensors", ".pth")


def entries(folder: Path) -> Iterator[str]:
    """The files and links in a folder and those below it, by their paths in it."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(place) / name).relative_to(folder).as_posix()


def write_manifest(folder: Path) -> None:
    """Write into a folder the list of what is in it: the size of every file, and the SHA-256 of those with weights."""
    files: dict[str, dict[str, int | str]] = {}
    for name in sorted(set(entries(folder)) - {MANIFEST}):
        files[name] = {"size": (folder / name).stat().st_size}
        if name.endswith(WEIGHTS):
            files[name]["sha256"] = sha256(folder / name)
    content = {"format": FORMAT, "version": VERSION, "files": files}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(file: Path) -> dict[str, Mapping[str, Any]]:
    """The files that a manifest names, with their sizes and, of weights, checksums.

    Raises:
        FileNotFoundError: If there is no such file.
        PruningError: If it is damaged, of an unknown version, or names a file outside its folder.
    """
    content = read_json(file)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise PruningError(
            f"{file} is damaged, or of another version of lit_prune: expected format {FORMAT!r} and version {VERSION}."
        )
    files = content.get("files")
    if not isinstance(files, Mapping) or not all(isinstance(value, Mapping) for value in files.values()):
        raise PruningError(f"{file} is damaged: expected a mapping of file names to sizes and checksums.")
    for name in files:
        check_inside(name, file)
    return dict(files)


def check_inside(name: object, named_by: Path) -> None:
    """Refuse a file name that leads out of its folder.

    Raises:
        PruningError: If it is not text, absolute, or has ``..`` in it.
    """
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or not path.parts or path.is_absolute() or ".." in path.parts or "\\" in str(name):
        raise PruningError(f"{named_by} is damaged: it names {name!r}; expected the name of a file in its folder.")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def verify_weights(folder: Path) -> None:
    """Compare the files with weights in a folder with the checksums that were noted when they were written.

    Raises:
        FileNotFoundError: If one of them is missing.
        PruningError: If there are no checksums, a file has another content, or there are weights that the list lacks.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise PruningError(
            f"{folder} has no {MANIFEST}, so its weights cannot be verified: it was written by an earlier lit_prune, or by"
            " save_pretrained or push_to_hub. Load it without verify=True, and save it with lit_prune.save_pruned."
        )
    noted = {name: value for name, value in read_manifest(file).items() if name.endswith(WEIGHTS)}
    for name, value in noted.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no file {name}, which {MANIFEST} names.")
        found = sha256(folder / name)
        if found != value.get("sha256"):
            raise PruningError(
                f"{folder / name} is not the file that was saved: its SHA-256 is {found[:12]}...; {MANIFEST} says"
                f" {str(value.get('sha256'))[:12]}... Copy the folder again from where it was saved."
            )
    unknown = sorted(p.name for p in folder.iterdir() if p.name.endswith(WEIGHTS) and p.name not in noted)
    if unknown:
        raise PruningError(f"{folder} holds weights that {MANIFEST} does not name: {unknown[:3]}.")
