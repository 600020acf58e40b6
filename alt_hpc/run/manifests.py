"""What says that a piece, or a checkpoint, is whole: a manifest, written last and atomically."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alt_hpc.graph import Graph, Piece
from alt_hpc.plan import Done
from alt_hpc.run.files import sha256, write_atomically
from alt_hpc.run.layout import POLICY_FOLDER, Layout
from alt_hpc.settings import digest

VISIBLE_WITHIN_S = 60.0  # how long a file written on another node may stay hidden by NFS caches


class PieceDamaged(RuntimeError):
    """A file of a piece does not have the bytes that its manifest says; it has been withdrawn."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Says that a folder's files are whole, and what decided their content."""

    files: Mapping[str, Mapping[str, Any]]  # name within the folder -> size, sha256 where taken
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What a manifest says, or None where it is missing or damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """The last thing that is written."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1))

    def has_sizes(self, folder: Path) -> bool:
        """Whether every file is there with its size. Fast: none is opened."""
        try:
            return all((folder / n).stat().st_size == e["size"] for n, e in self.files.items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False


@dataclass(frozen=True, kw_only=True)
class Manifest(Whole):
    """What says that a piece is whole."""

    attempt: int
    folder: str  # of the attempt, within the piece's folder
    rows: int
    inputs: Mapping[str, str]  # str(piece) -> checksum
    facts: Mapping[str, Any]  # what later pieces want to know cheaply
    removed: bool = False  # the files were removed on purpose (`keep`)

    @property
    def checksum(self) -> str:
        """sha256 (hex) over the files' names and checksums."""
        return digest({name: entry["sha256"] for name, entry in self.files.items()})


@dataclass(frozen=True)
class Manifests:
    """The manifests of a run's pieces."""

    layout: Layout
    graph: Callable[[], Graph]

    def fingerprint(self, piece: Piece) -> str:
        """sha256 (hex) of what decides a piece's content, its inputs' bytes apart."""
        return digest(self.graph().decides(piece))

    def get(self, piece: Piece) -> Manifest | None:
        """The manifest, if it is there, readable, this config's, and its files have their sizes."""
        manifest = Manifest.read(self.layout.manifest(piece))
        try:
            if manifest is None or manifest.fingerprint != self.fingerprint(piece):
                return None
        except LookupError:  # a piece that this sharding has not
            return None
        whole = manifest.removed or manifest.has_sizes(self.folder(piece, manifest))
        return manifest if whole else None

    def folder(self, piece: Piece, manifest: Manifest) -> Path:
        """Where the files of a whole piece are; unread."""
        return self.layout.piece(piece) / manifest.folder

    def done(self, pieces: Iterable[Piece] | None = None) -> dict[Piece, Done]:
        """Those pieces (else all of the iterations begun) that have a good manifest."""
        graph = self.graph()
        found: dict[Piece, Done] = {}
        for piece in graph.pieces() if pieces is None else pieces:
            if now := self.get(piece):
                was = {source: now.inputs.get(str(source)) for source in graph.sources(piece)}
                named = {source: checksum for source, checksum in was.items() if checksum}
                found[piece] = Done(now.checksum, now.attempt, named, now.removed)
        return found

    def stale(self, done: Container[Piece]) -> frozenset[Piece]:
        """Pieces that are not done but were, with other settings."""
        others = [piece for piece in self.graph().pieces() if piece not in done]
        found = [(piece, Manifest.read(self.layout.manifest(piece))) for piece in others]
        return frozenset(p for p, m in found if m and m.fingerprint != self.fingerprint(p))

    def open(self, piece: Piece) -> tuple[Path, Manifest]:
        """The folder of a whole piece, every file's checksum verified.

        PieceDamaged where it is not whole, or a checksum fails: then the manifest is withdrawn, so
        that the next controller has the piece made again.
        """
        manifest = self.wait(piece)
        folder = self.folder(piece, manifest)
        for name, entry in manifest.files.items():
            file = folder / name
            if not file.is_file() or sha256(file) != entry["sha256"]:
                self.withdraw(piece)
                raise PieceDamaged(f"{file}: does not have the bytes its manifest says; withdrawn")
        return folder, manifest

    def wait(self, piece: Piece) -> Manifest:
        """The manifest of a piece that should be whole; else PieceDamaged.

        The parent is listed and the read tried again: an attribute cache may hide what is there.
        """
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        while (manifest := self.get(piece)) is None:
            if time.monotonic() > deadline or not self.layout.attempts(piece):
                where = self.layout.piece(piece)
                raise PieceDamaged(f"{where}: {piece} is not whole: no good manifest")
            time.sleep(1.0)
        return manifest

    def checksums(self, sources: Iterable[Piece]) -> dict[str, str]:
        """What a manifest says of its inputs: str(piece) -> checksum now."""
        return {str(source): self.wait(source).checksum for source in sources}

    def withdraw(self, piece: Piece) -> None:
        """Take a manifest back: the piece no longer counts."""
        self.layout.manifest(piece).rename(self.layout.withdrawn(piece, time.time_ns()))

    def remove_policy(self, piece: Piece) -> None:
        """Free the disk of an old policy; its manifest stays, saying so."""
        manifest = self.get(piece)
        if manifest is None or manifest.removed:
            return
        dataclasses.replace(manifest, removed=True).write(self.layout.manifest(piece))
        shutil.rmtree(self.folder(piece, manifest) / POLICY_FOLDER, ignore_errors=True)
        self.layout.policy(piece.iteration).unlink(missing_ok=True)
