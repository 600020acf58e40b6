"""The models of a run, frozen by their bytes: where each lies, and what its files were.

A file of the Hugging Face cache is a link to a blob that is named after its content; any other is
hashed once. Later its size, time and inode are compared, and its bytes only where these differ.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alt_hpc.errors import InputError
from alt_hpc.run.files import read_json, sha256, write_atomically
from alt_hpc.run.folder import RunFolder

_READ = re.compile(r".*\.(json|txt|model|jinja|safetensors|bin)")  # what a model is loaded from
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def record(run: RunFolder, found: Mapping[str, Path]) -> None:
    """Write down models by their keys (see `key`); those that a run knows stay as they are."""
    known = _read(run) if run.exists() else {}
    fresh = {name: place.absolute() for name, place in found.items() if name not in known}
    for name, place in fresh.items():
        files = {file.name: {**_state(file), "checksum": _checksum(file)} for file in _files(place)}
        known[name] = {"place": str(place), "revision": revision(place), "files": files}
    if fresh:
        write_atomically(run.layout.models, json.dumps(known, indent=1))


def key(name: str, *, whole: bool = True) -> str:
    """What a model stands under; not whole: its config and tokenizer."""
    return name if whole else f"{name} (config and tokenizer)"


def known(run: RunFolder) -> dict[str, Path]:
    """The folders of all that is frozen, unchecked."""
    return {name: Path(about["place"]) for name, about in _read(run).items()}


def place(run: RunFolder, name: str, *, whole: bool = True) -> Path:
    """The folder of a model; InputError where a file was changed, added or removed since."""
    about = _read(run)[key(name, whole=whole)]
    folder = Path(about["place"])
    for file in (folder / name for name in about["files"]):
        problem = "has other bytes than when the run began: put those back, or begin a new run"
        try:
            if _is_same(file, about["files"][file.name]):
                continue
        except OSError as error:
            problem = f"the run was frozen with this file, and it cannot be read ({error.strerror})"
        raise InputError(f"{file}: {problem}")
    if whole and (added := [f for f in _files(folder) if f.name not in about["files"]]):
        raise InputError(f"{added[0]}: was not there when the run began")
    return folder


def differing(run: RunFolder, other: RunFolder) -> list[str]:
    """Models that two runs know by one name, with other bytes."""
    mine, theirs = _checksums(run), _checksums(other)
    return [name for name in mine if mine[name] != theirs.get(name, mine[name])]


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
    return dict(read_json(run.layout.models)) if run.layout.models.exists() else {}


def _checksums(run: RunFolder) -> dict[str, dict[str, str]]:
    found = {name: about["files"].items() for name, about in _read(run).items()}
    return {name: {file: it["checksum"] for file, it in its} for name, its in found.items()}


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and _READ.fullmatch(f.name))


def _state(file: Path) -> dict[str, int]:
    """What tells cheaply that a file is as it was."""
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _checksum(file: Path) -> str:
    """The name of the cache's blob (a hash of its bytes), else sha256 (hex)."""
    blob = file.resolve()
    named = blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name)
    return blob.name if named else sha256(file)


def _is_same(file: Path, was: dict[str, Any]) -> bool:
    """Whether a file is as it was, or has the same sha256, or a small blob of git the same sha1."""
    now, checksum = _state(file), str(was["checksum"])
    if now.items() <= was.items() or now["size"] != was["size"]:
        return bool(now["size"] == was["size"])
    if len(checksum) == 64:
        return sha256(file) == checksum
    return hashlib.sha1(b"blob %d\0" % now["size"] + file.read_bytes()).hexdigest() == checksum
