"""Files as a run needs them: written whole or not at all, private where they are unpickled."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alt_hpc.errors import InputError

PRIVATE = 0o700
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path`, whole and on disk, or not at all."""
    temporary = _beside(path)
    try:
        yield temporary
        flushed_size(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def half_written(path: Path) -> list[Path]:
    """What writers of a file that were killed have left beside it."""
    return sorted(path.parent.glob(f".{path.name}.*"))


def copy_once(source: Path, target: Path, *ignored: str) -> None:
    """Copy a folder, whole or not at all; one that is there already, or meanwhile, stays."""
    if target.exists():
        return
    temporary = _beside(target)
    try:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*ignored))
        for folder, _, _ in os.walk(temporary):  # the source may be read-only: ours is not
            os.chmod(folder, os.stat(folder).st_mode | stat.S_IRWXU)
        temporary.rename(target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take(source: Path, target: Path) -> None:
    """Give another run's file a second name here (a hard link), or copy it where that cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: a reader sees the old or the new text, never a part, also after a crash."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line durably; a torn line of a killed writer is closed first."""
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The value in a JSON file; InputError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path}: damaged: not valid JSON") from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a file that may be missing, end in, or contain, a torn line (skipped)."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(value := json.loads(line), dict):
                    yield value


def flushed_size(path: Path) -> int:
    """Size in bytes of a file that is on disk; opening it refreshes what an NFS client knows."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def link(place: Path, target: Path) -> None:
    """Make `place` a relative link to `target`, or turn the link that is there."""
    place.parent.mkdir(exist_ok=True)
    temporary = _beside(place)
    temporary.symlink_to(os.path.relpath(target, place.parent))
    os.replace(temporary, place)


def make_private(folder: Path) -> Path:
    """Make a folder for what will be unpickled."""
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
    os.chmod(folder, PRIVATE)
    return folder


def check_private(folder: Path, field: str = "") -> None:
    """Stop where a folder is not ours alone: what lies in it is unpickled."""
    found = folder.stat()
    owner, mode = found.st_uid, stat.S_IMODE(found.st_mode)
    if owner != os.getuid() or mode & 0o077:
        problem = f"the folder must belong to you, with mode 0700 (owner {owner}, mode {mode:o})"
        raise InputError(f"{folder}: {problem}", field)


class Locked(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(file: Path, within_s: float) -> Iterator[None]:
    """Hold a lock, which the kernel frees when its holder dies; Locked where another keeps it.

    Nothing is held where the file system has no locks: on Slurm a controller is a `singleton` too.
    """
    deadline = time.monotonic() + within_s
    with file.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    print(f"{file}: this file system has no locks", file=sys.stderr, flush=True)
                    break
                if time.monotonic() > deadline:
                    raise Locked from None
                time.sleep(0.2)
        yield
