"""One try at a piece: it writes in a folder of its own, and makes the piece whole in the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alt_hpc import interrupt, process
from alt_hpc.graph import Piece
from alt_hpc.run import code, progress
from alt_hpc.run.files import append_line, read_lines, sha256, write_atomically
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import KEPT_FILE
from alt_hpc.run.manifests import Manifest
from alt_hpc.settings import digest

LOOK_EVERY_S = 60.0  # how often a task looks whether it lags


def begin(
    run: RunFolder, piece: Piece, number: int, inputs: Mapping[str, str] | None = None
) -> Attempt:
    """Begin a try, in a fresh folder. Slurm may run one job twice: the second gets its own.

    `inputs` are the checksums of what the piece is made from.
    """
    run.layout.piece(piece).mkdir(parents=True, exist_ok=True)
    for again in range(1000):
        folder = run.layout.attempt(piece, number, again)
        try:
            folder.mkdir()
            return Attempt(run, piece, number, folder, inputs or {})
        except FileExistsError:
            continue
    raise RuntimeError(f"{folder}: the thousandth folder of attempt {number}")


def began(run: RunFolder, piece: Piece, number: int) -> bool:
    """Whether a try has begun: a task may have died before it came to this piece."""
    return run.layout.attempt(piece, number).exists()


STOPPED = "STOPPED"  # it was asked to stop, and what it had done is safe
FINAL = "FINAL"  # no further try would end otherwise


def tell(run: RunFolder, piece: Piece, number: int, how: str, sentence: str) -> None:
    """Write down how a try ends, where Slurm says no more than an exit status."""
    run.layout.piece(piece).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"how": how, "sentence": sentence})
    write_atomically(run.layout.verdict(piece, number), text)


def told(run: RunFolder, piece: Piece, number: int) -> tuple[str, str]:
    """What a try has told of its end, and its sentence; empty where it has not."""
    try:
        said = json.loads(run.layout.verdict(piece, number).read_text(encoding="utf-8"))
        return str(said["how"]), str(said["sentence"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def go_on(run: RunFolder, piece: Piece, number: int) -> None:
    """The same try has been started again: what it told no longer holds."""
    run.layout.verdict(piece, number).unlink(missing_ok=True)


def _made_with() -> dict[str, Any]:
    """What a manifest says of the code, the packages and the machine."""
    about = {"code": code.fingerprint(), "packages": code.packages(), "device": code.device()}
    return {**about, "node": process.node()}


class Attempt:
    """One try at a piece, writing in a folder of its own; `commit` makes the piece whole."""

    def __init__(
        self, run: RunFolder, piece: Piece, number: int, folder: Path, inputs: Mapping[str, str]
    ) -> None:
        self.run = run
        self.piece = piece
        self.number = number
        self.folder = folder
        self.inputs = inputs
        self.started = time.time()
        self._shown = 0.0
        self._looked = self.started

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far this try is, at most once a second."""
        now = time.time()
        if now - self._shown < 1.0 and done < total:
            return
        self._shown = now
        progress.show(self.run, self.piece, done, total, unit, self.started)
        if now - self._looked > LOOK_EVERY_S:
            self._looked = now
            for line in progress.laggards(self.run, self.piece.iteration, self.piece.stage):
                if line.startswith(f"{self.piece} "):
                    print(line, flush=True)

    def commit(
        self, files: Iterable[str], *, rows: int, facts: Mapping[str, Any] | None = None
    ) -> Manifest:
        """Declare the piece whole: all files are written and closed. The manifest comes last."""
        entries = {}
        for name in sorted(files):
            path = self.folder / name
            entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        when = {"started": self.started, "seconds": time.time() - self.started}
        manifest = Manifest(
            attempt=self.number,
            folder=self.folder.name,
            rows=rows,
            files=entries,
            fingerprint=self.run.manifests.fingerprint(self.piece),
            inputs=dict(self.inputs),
            facts={**when, **_made_with(), **(facts or {})},
        )
        self.run.manifests.write(self.piece, manifest)
        return manifest

    def resumable(
        self,
        starts: Sequence[int],
        make: Callable[[Iterator[int]], Iterator[list[dict[str, Any]]]],
        unit: str,
        each: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> list[dict[str, Any]]:
        """Rows of all prompt groups, in order; groups that an earlier attempt kept are not made.

        Groups that were made from other inputs are not taken.

        Parameters
        ----------
        starts
            Number of the first row of each group, and last the number after the last row.
        make
            Given the indices of the groups to make, gives the rows of each, in order. It may
            begin some before it has given the one before; a killed task loses all begun.
        unit, each
            What progress counts, and how many of it a row is.
        part
            Which of how many passes over the rows this is.

        Raises
        ------
        Interrupted
            The task was asked to stop; every group made so far is kept.
        """
        identity = digest([self.run.manifests.identity(self.piece, self.inputs), part])
        kept = self._kept(identity)
        size = (starts[-1] - starts[0]) * each
        before, total = size * part[0], size * part[1]
        rows: list[dict[str, Any]] = []
        mine = {start: kept[start] for start in starts[:-1] if start in kept}
        if mine:
            print(f"{self.piece}: {len(mine)} of {len(starts) - 1} prompt groups kept", flush=True)
        self.progress(before + sum(map(len, mine.values())) * each, total, unit)
        groups = make(group for group, start in enumerate(starts[:-1]) if start not in mine)
        for start in starts[:-1]:
            made = mine.get(start)
            if made is None:
                interrupt.check()
                made = next(groups)
                self._keep(identity, start, made)
            rows += made
            done = len(rows) + sum(len(r) for s, r in mine.items() if s > start)
            self.progress(before + done * each, total, unit)
        return rows

    def _keep(self, identity: str, start: int, rows: list[dict[str, Any]]) -> None:
        text = json.dumps(rows, ensure_ascii=False)
        line = {"identity": identity, "start": start, "rows": text}
        line["sha256"] = digest(line)
        append_line(self.folder / KEPT_FILE, line)

    def _kept(self, identity: str) -> dict[int, list[dict[str, Any]]]:
        """Whole groups that earlier attempts kept: number of the first row -> rows.

        A torn or changed line is as if it were not there.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        for file in self.run.layout.kept(self.piece):
            for line in read_lines(file):
                whole = line.pop("sha256", None) == digest(line)
                if whole and line.get("identity") == identity:
                    found[line["start"]] = json.loads(line["rows"])
        return found

    def commit_rows(
        self, rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any] | None = None
    ) -> Manifest:
        """Write rows as JSON lines and commit them; what attempts kept is of no more use."""
        name, count = self.run.layout.rows(self.piece), 0
        with (self.folder / name).open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        manifest = self.commit([name], rows=count, facts=facts)
        for old in self.run.layout.kept(self.piece):
            old.unlink(missing_ok=True)
        return manifest
