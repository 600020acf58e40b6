"""What says that a piece, or a checkpoint, is whole: a manifest, written last and atomically."""

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alt_hpc import process
from alt_hpc.graph import Graph, Piece
from alt_hpc.plan import Done
from alt_hpc.run import files, layout
from alt_hpc.run.layout import Layout
from alt_hpc.settings import digest

logger = logging.getLogger(__name__)
VISIBLE_WITHIN_S = 60.0  # how long a file written on another node may stay hidden by NFS caches


class PieceDamaged(RuntimeError):
    """A file of a piece does not have the bytes that its manifest says, or is not there."""


@dataclass(frozen=True, kw_only=True)
class Whole:  # says that a folder's files are whole, and what decided their content
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
        files.write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1))

    def has_sizes(self, folder: Path) -> bool:
        """Whether every file is there with its size. Fast: none is opened."""
        try:
            return all((folder / n).stat().st_size == e["size"] for n, e in self.files.items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False


@dataclass(frozen=True, kw_only=True)
class Manifest(Whole):  # what says that a piece is whole
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
class Manifests:  # of a run's pieces
    layout: Layout
    graph: Callable[[], Graph]

    def fingerprint(self, piece: Piece) -> str:
        """sha256 (hex) of what decides a piece's content, its inputs' bytes apart."""
        return digest(self.graph().decides(piece))

    def get(self, piece: Piece) -> Manifest | None:
        """The manifest, if it is there, readable, this config's, and its files have their sizes."""
        manifest = Manifest.read(self.layout.manifest(piece))
        with contextlib.suppress(LookupError):  # a piece that this sharding has not
            if manifest and manifest.fingerprint == self.fingerprint(piece):
                folder = self.layout.piece(piece) / manifest.folder
                return manifest if manifest.removed or manifest.has_sizes(folder) else None
        return None

    def done(self, pieces: Iterable[Piece] | None = None) -> dict[Piece, Done]:
        """Those pieces (else all of the iterations begun) that have a good manifest."""
        graph, found = self.graph(), dict[Piece, Done]()
        for piece in graph.pieces() if pieces is None else pieces:
            if now := self.get(piece):
                inputs = {s: c for s in graph.sources(piece) if (c := now.inputs.get(str(s)))}
                found[piece] = Done(now.checksum, now.attempt, inputs, now.removed)
        return found

    def stale(self, done: Container[Piece]) -> frozenset[Piece]:
        """Pieces that are not done but were, with other settings."""
        others = [piece for piece in self.graph().pieces() if piece not in done]
        found = [(piece, Manifest.read(self.layout.manifest(piece))) for piece in others]
        return frozenset(p for p, m in found if m and m.fingerprint != self.fingerprint(p))

    def open(self, piece: Piece) -> tuple[Path, Manifest]:
        """The folder of a whole piece, every file's checksum verified; else PieceDamaged.

        What fails that is withdrawn, so that the next controller has the piece made again.
        """
        manifest = self.wait(piece)
        if manifest.removed:  # on purpose: it still counts
            raise PieceDamaged(f"{piece} was removed from the disk (keep)")
        folder = self.layout.piece(piece) / manifest.folder
        for name, entry in manifest.files.items():
            if not (file := folder / name).is_file() or files.sha256(file) != entry["sha256"]:
                self.withdraw(piece)
                raise PieceDamaged(f"{file}: does not have the bytes its manifest says; withdrawn")
        return folder, manifest

    def wait(self, piece: Piece) -> Manifest:
        """The manifest of a piece that should be whole; else PieceDamaged.

        The parent is listed and the read tried again: caches may hide what is there, and the
        piece's folder with it, where a job's host has looked before another made them.
        """
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        while (manifest := self.get(piece)) is None:
            begun = bool(self.layout.attempts(piece)) or process.job()
            if time.monotonic() > deadline or not begun:
                where = self.layout.piece(piece)
                raise PieceDamaged(f"{where}: {piece} is not whole: no good manifest")
            time.sleep(1.0)
        return manifest

    def look_again(self, pieces: Iterable[Piece]) -> dict[Piece, Done]:
        """As `done`, of pieces whose jobs have ended well: what caches may hide is waited for."""
        pieces, deadline = list(pieces), time.monotonic() + VISIBLE_WITHIN_S
        if hidden := [piece for piece in pieces if self._hidden(piece)]:
            names = ", ".join(map(str, hidden))
            print(f"{names}: made, but not seen from here yet", file=sys.stderr, flush=True)
        while any(map(self._hidden, hidden)) and time.monotonic() < deadline:
            time.sleep(1.0)
        return self.done(pieces)

    def _hidden(self, piece: Piece) -> bool:
        """Whether no manifest is seen, or a file of it is not, and none was withdrawn."""
        manifest = Manifest.read(self.layout.manifest(piece))
        if manifest is None:
            return not self.layout.withdrawn(piece)
        folder = self.layout.piece(piece) / manifest.folder
        return not (manifest.removed or all((folder / name).exists() for name in manifest.files))

    def withdraw(self, piece: Piece) -> None:
        """Take a manifest back: the piece no longer counts."""
        manifest = self.layout.manifest(piece)
        manifest.rename(manifest.with_name(layout.WITHDRAWN.format(time.time_ns())))

    def remove_policy(self, piece: Piece) -> None:
        """Free the disk of an old policy; its manifest stays, saying so."""
        if (manifest := self.get(piece)) and not manifest.removed:
            dataclasses.replace(manifest, removed=True).write(self.layout.manifest(piece))
            folder = self.layout.piece(piece) / manifest.folder
            shutil.rmtree(folder / layout.POLICY_FOLDER, ignore_errors=True)
            (folder / layout.MOMENTS_FILE).unlink(missing_ok=True)
            self.layout.policy(piece.iteration).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Whole):  # what says that a checkpoint is whole
    step: int


@dataclass
class Checkpoints:
    """Folders `step-NNNNNN`, each whole once its manifest is there: a `Store` of the training."""

    folder: Path

    def make(self) -> None:
        files.make_private(self.folder)  # DeepSpeed unpickles what it finds there

    def check(self) -> None:
        files.check_private(self.folder)

    def tag(self, step: int) -> str:
        return layout.STEP.format(step)

    def random_state(self, step: int, rank: int) -> Path:
        return self.folder / self.tag(step) / layout.RANDOM_STATE.format(rank)

    def whole(self, identity: str) -> list[int]:
        """Steps of the checkpoints that are whole and this training's own, in order."""
        steps = []
        for place in sorted(self.folder.glob(layout.STEPS)):
            found = Checkpoint.read(place / layout.MANIFEST_FILE)
            if found and found.has_sizes(place):
                if found.fingerprint == identity:
                    steps.append(found.step)
                else:
                    logger.warning("%s: of other settings, data or ranks: not used", place)
        return steps

    def begin(self, step: int) -> None:
        """Make room for a checkpoint; what an earlier attempt half wrote goes."""
        shutil.rmtree(self.folder / self.tag(step), ignore_errors=True)
        files.make_private(self.folder / self.tag(step))

    def commit(self, step: int, identity: str) -> None:
        """Declare a checkpoint whole, and remove what is older than the newest two."""
        place = self.folder / self.tag(step)
        sizes = {file.name: {"size": files.flushed_size(file)} for file in sorted(place.iterdir())}
        Checkpoint(step=step, fingerprint=identity, files=sizes).write(place / layout.MANIFEST_FILE)
        keep = {self.tag(kept) for kept in self.whole(identity)[-2:]}
        for other in self.folder.glob(layout.STEPS):
            if other.name not in keep:  # the manifest first: it is no longer whole
                (other / layout.MANIFEST_FILE).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)
