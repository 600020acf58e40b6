"""One try at a piece: it writes in a folder of its own, and makes the piece whole in the end."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
STOPPED = "STOPPED"  # it was asked to stop, and what it had done is safe
FINAL = "FINAL"  # no further try would end otherwise


def begin(run: RunFolder, piece: Piece, number: int, inputs: Mapping[str, str] = {}) -> "Attempt":
    """Begin a try at a piece made from `inputs` (checksums), in a folder of its own."""
    run.layout.piece(piece).mkdir(parents=True, exist_ok=True)
    for again in range(1000):  # Slurm may run one job twice
        folder = run.layout.attempt(piece, number, again)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return Attempt(run, piece, number, folder, inputs)
    raise RuntimeError(f"{folder}: the thousandth folder of attempt {number}")


def began(run: RunFolder, piece: Piece, number: int) -> bool:
    """Whether a try has begun: a task may have died before it came to this piece."""
    return run.layout.attempt(piece, number).exists()


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


@dataclass
class Attempt:
    """One try at a piece, writing in `folder`; `commit` makes the piece whole."""

    run: RunFolder
    piece: Piece
    number: int
    folder: Path
    inputs: Mapping[str, str]
    started: float = field(default_factory=time.time)
    _shown: float = 0.0
    _looked: float = field(default_factory=time.time)

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

    def commit(self, files: Iterable[str], *, rows: int, facts: Mapping[str, Any] = {}) -> None:
        """Declare the piece whole: all files are written and closed. The manifest comes last."""
        paths = {name: self.folder / name for name in sorted(files)}
        entries = {n: {"size": p.stat().st_size, "sha256": sha256(p)} for n, p in paths.items()}
        when = {"started": self.started, "seconds": time.time() - self.started}
        what = {"code": code.fingerprint(), "packages": code.packages(), "device": code.device()}
        manifest = Manifest(
            attempt=self.number,
            folder=self.folder.name,
            rows=rows,
            files=entries,
            fingerprint=self.run.manifests.fingerprint(self.piece),
            inputs=self.inputs,
            facts={**when, **what, "node": process.node(), **facts},
        )
        manifest.write(self.run.layout.manifest(self.piece))

    def commit_rows(self, rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any] = {}) -> None:
        """Write rows as JSON lines and commit them; what attempts kept is of no more use."""
        name, count = self.run.layout.rows(self.piece), 0
        with (self.folder / name).open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        self.commit([name], rows=count, facts=facts)
        for old in self.run.layout.kept(self.piece):
            old.unlink(missing_ok=True)

    def resumable(
        self,
        starts: Sequence[int],
        make: Callable[[Iterator[int]], Iterator[list[dict[str, Any]]]],
        unit: str,
        each: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> list[dict[str, Any]]:
        """Rows of all prompt groups; those that an attempt has kept (of the same inputs) are taken.

        `starts`: the first row of each group, and last the row after the last. `make`, given the
        indices of the groups to make, gives the rows of each, in order; a killed task loses those
        begun. Progress counts `each` units a row. `part`: which of how many passes over the rows
        this is. Interrupted where the task was asked to stop; every group made so far is kept.
        """
        identity = digest([self.run.manifests.fingerprint(self.piece), dict(self.inputs), part])
        earlier, firsts = self._kept(identity), starts[:-1]
        rows = {start: earlier[start] for start in firsts if start in earlier}
        if rows:
            print(f"{self.piece}: {len(rows)} of {len(firsts)} prompt groups kept", flush=True)
        size = (starts[-1] - starts[0]) * each
        done = size * part[0] + sum(map(len, rows.values())) * each
        self.progress(done, size * part[1], unit)
        missing = {start: group for group, start in enumerate(firsts) if start not in rows}
        groups = make(iter(missing.values()))
        for start in missing:
            interrupt.check()
            rows[start] = made = next(groups)
            line = {"identity": identity, "start": start}
            line["rows"] = json.dumps(made, ensure_ascii=False)
            append_line(self.folder / KEPT_FILE, {**line, "sha256": digest(line)})
            done += len(made) * each
            self.progress(done, size * part[1], unit)
        return [row for start in firsts for row in rows[start]]

    def _kept(self, identity: str) -> dict[int, list[dict[str, Any]]]:
        """First row -> rows of the groups that attempts kept; no torn or changed line counts."""
        lines = (line for file in self.run.layout.kept(self.piece) for line in read_lines(file))
        whole = (line for line in lines if line.pop("sha256", None) == digest(line))
        mine = (line for line in whole if line.get("identity") == identity)
        return {line["start"]: json.loads(line["rows"]) for line in mine}
