"""The models of a run, frozen by their bytes: where each lies, and what its files were.

A file of the Hugging Face cache is a link to a blob that is named after its content; any other is
hashed once. Later its size, time and inode are compared, and its bytes only where these differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alt_hpc.errors import InputError
from alt_hpc.run.files import sha256, write_atomically
from alt_hpc.run.folder import RunFolder

_READ = re.compile(r".*\.(json|txt|model|jinja|safetensors|bin)")  # what a model is loaded from
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def freeze(run: RunFolder, found: Mapping[str, Path]) -> None:
    """Write down models by their keys (see `key`); those that a run knows stay as they are."""
    known = _read(run) if run.exists() else {}
    fresh = {name: _described(place) for name, place in found.items() if name not in known}
    if fresh:
        write_atomically(run.layout.models, json.dumps({**known, **fresh}, indent=1))


def key(name: str, *, whole: bool = True) -> str:
    """What a model that the config names stands under; not whole: its config and tokenizer."""
    return name if whole else f"{name} (config and tokenizer)"


def known(run: RunFolder) -> dict[str, Path]:
    """The folders of all that is frozen, unchecked."""
    return {name: Path(about["place"]) for name, about in _read(run).items()}


def place(run: RunFolder, name: str, *, whole: bool = True) -> Path:
    """The folder of a model that the config names, its files as they were when it was frozen.

    Raises
    ------
    InputError
        A file was changed, added or removed since.
    """
    about = _read(run)[key(name, whole=whole)]
    folder = Path(about["place"])
    for file, was in about["files"].items():
        _check(folder / file, was)
    if whole:
        for added in {file.name for file in _files(folder)} - about["files"].keys():
            raise InputError(f"{folder / added}: was not there when the run began")
    return folder


def revision(folder: Path) -> str:
    """The commit that a folder of the Hugging Face cache is a snapshot of; empty for another."""
    return folder.name if folder.parent.name == "snapshots" else ""


def newest(folder: Path) -> str:
    """The commit of the main branch as the cache has it, for a snapshot in it; else empty."""
    try:
        return (folder.parents[1] / "refs" / "main").read_text().strip() if revision(folder) else ""
    except OSError:
        return ""


def _read(run: RunFolder) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(run.layout.models.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{run.layout.models}: damaged: not valid JSON") from None


def _described(folder: Path) -> dict[str, Any]:
    files = {file.name: _state(file) | {"checksum": _checksum(file)} for file in _files(folder)}
    place = str(folder.absolute())
    return {"place": place, "revision": revision(folder.absolute()), "files": files}


def _files(folder: Path) -> Iterable[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and _READ.fullmatch(f.name))


def _state(file: Path) -> dict[str, int]:
    """What tells cheaply that a file is as it was."""
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _checksum(file: Path) -> str:
    """The name of the cache's blob (a hash of its bytes), else sha256 (hex)."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        return blob.name
    return sha256(file)


def _has(file: Path, checksum: str) -> bool:
    """Whether a file's bytes have a checksum: sha256, or of a small blob git's sha1."""
    if len(checksum) == 64:
        return sha256(file) == checksum
    text = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest() == checksum


def _check(file: Path, was: dict[str, Any]) -> None:
    try:
        now = _state(file)
        same = now == {key: was[key] for key in now} or (
            now["size"] == was["size"] and _has(file, was["checksum"])
        )
    except OSError as error:
        raise InputError(
            f"{file}: the run was frozen with this file, and it cannot be read ({error.strerror})"
        ) from error
    if not same:
        raise InputError(
            f"{file}: has other bytes than when the run began: put those back, or begin a new run"
        )
