"""One try at a piece: its folder, how far it is, how it ends, and how the piece becomes whole."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alt_hpc import interrupt, process
from alt_hpc.errors import one_line, said
from alt_hpc.graph import STAGES, Piece
from alt_hpc.run import code, files
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import KEPT_FILE, PROGRESS_FILE
from alt_hpc.run.manifests import Manifest
from alt_hpc.settings import digest

MOST, LAGS = 0.6, 3.0  # a shard lags: this share is whole, and it takes so many times as long
LOOK_EVERY_S = 60.0  # how often a task looks whether it lags
STOPPED = "STOPPED"  # it was asked to stop, and what it had done is safe
FAILED = "FAILED"  # by an error that may not come again
FINAL = "FINAL"  # no further try would end otherwise


def begin(run: RunFolder, piece: Piece, number: int, inputs: Mapping[str, str] = {}) -> "Attempt":
    """Begin a try at a piece made from `inputs` (checksums), in a folder of its own."""
    for again in range(1000):  # Slurm may run one job twice
        folder = run.layout.attempt(piece, number, again)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return Attempt(run, piece, number, folder, inputs)
    raise RuntimeError(f"{folder}: the thousandth folder of attempt {number}")


def tell(run: RunFolder, piece: Piece, number: int, how: str, sentence: str) -> None:
    """Write down how a try ends, where Slurm says no more than an exit status."""
    run.layout.piece(piece).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"how": how, "sentence": sentence})
    files.write_atomically(run.layout.verdict(piece, number), text)


def tell_error(run: RunFolder, piece: Piece, number: int, error: Exception) -> None:
    """Write down what a try fails by, unless its end is told: of several ranks that of the first,
    as the others fail for want of it.
    """
    if not told(run, piece, number)[0]:
        with contextlib.suppress(OSError):  # a full disk, say
            words = one_line(f"{type(error).__name__}: {said(error)}")
            tell(run, piece, number, FAILED, words)


def told(run: RunFolder, piece: Piece, number: int) -> tuple[str, str]:
    """What a try has told of its end, and its sentence; empty where it has not."""
    try:
        said = json.loads(run.layout.verdict(piece, number).read_text(encoding="utf-8"))
        return str(said["how"]), str(said["sentence"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def show(
    run: RunFolder, piece: Piece, done: int, total: int, unit: str, started: float, kept: int = 0
) -> None:
    """Say how far a piece is: `done` of `total` units, all but what was `kept` since `started`
    (seconds, epoch).
    """
    interrupt.beat()
    values = {"done": done, "total": total, "unit": unit, "started": started, "kept": kept}
    values |= {"at": time.time(), "node": process.node()}
    files.write_atomically(run.layout.piece(piece) / PROGRESS_FILE, json.dumps(values))


def shown(run: RunFolder, piece: Piece) -> dict[str, Any] | None:
    """What was last said of a piece, if anything was."""
    try:
        return dict(json.loads((run.layout.piece(piece) / PROGRESS_FILE).read_text()))
    except (OSError, json.JSONDecodeError):
        return None


def saved(run: RunFolder, piece: Piece) -> int:
    """Prompt groups kept, or the last step of a whole checkpoint: work that outlives its task."""
    kept = sum(1 for file in run.layout.kept(piece) for _ in files.read_lines(file))
    return max([kept, *run.layout.steps_saved(piece)])


def laggards(run: RunFolder, iteration: int, stage: str) -> list[str]:
    """A line for each shard that lags far behind, once most shards of its stage are whole.

    Shards may differ in size (sets of evaluation do): a larger one may take longer.
    """
    found = {piece: run.manifests.get(piece) for piece in run.graph().of(iteration, stage)}
    took = sorted(m.facts["seconds"] for m in found.values() if m)
    if STAGES[stage].cut is None or len(found) < 3 or len(took) < MOST * len(found):
        return []
    sizes = sorted(said["total"] for p, m in found.items() if m and (said := shown(run, p)))
    size, lines = sizes[len(sizes) // 2] if sizes else math.inf, []
    for piece in [piece for piece, manifest in found.items() if not manifest]:
        now = shown(run, piece) or {"started": 0.0, "at": 0.0, "total": 0}
        so_far = now["at"] - now["started"]  # by the clock of its own host
        usual = took[len(took) // 2] * max(1.0, now["total"] / size)
        if so_far > LAGS * max(usual, LAGS):
            lines.append(
                f"{piece} lags on {now['node']}: {so_far:.0f} s so far,"
                f" {now['done']}/{now['total']} {now['unit']};"
                f" the others need {usual:.0f} s for as much"
            )
    return lines


@dataclass
class Attempt:
    """One try at a piece, writing in `folder`; `commit` makes the piece whole."""

    run: RunFolder
    piece: Piece
    number: int
    folder: Path
    inputs: Mapping[str, str]
    started: float = field(default_factory=time.time)
    kept: int = 0  # units that an earlier try has made
    _shown: float = 0.0
    _looked: float = field(default_factory=time.time)

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far this try is, at most once a second."""
        now = time.time()
        if now - self._shown < 1.0 and done < total:
            return
        self._shown = now
        show(self.run, self.piece, done, total, unit, self.started, self.kept)
        if now - self._looked > LOOK_EVERY_S:
            self._looked = now
            for line in laggards(self.run, self.piece.iteration, self.piece.stage):
                if line.startswith(f"{self.piece} "):
                    print(line, flush=True)

    def commit(self, names: Iterable[str], *, rows: int, facts: Mapping[str, Any] = {}) -> None:
        """Declare the piece whole: all files are written and closed. The manifest comes last."""
        paths = {name: self.folder / name for name in sorted(names)}
        made = {n: {"size": p.stat().st_size, "sha256": files.sha256(p)} for n, p in paths.items()}
        when = {"started": self.started, "seconds": time.time() - self.started}
        used = {"node": process.node(), "memory": process.peak_memory()}
        manifest = Manifest(
            attempt=self.number,
            folder=self.folder.name,
            rows=rows,
            files=made,
            fingerprint=self.run.manifests.fingerprint(self.piece),
            inputs=self.inputs,
            facts={**when, **code.facts(), **used, **facts},
        )
        manifest.write(self.run.layout.manifest(self.piece))

    def commit_rows(self, rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any] = {}) -> None:
        """Write rows as JSON lines and commit them; what attempts kept is of no more use."""
        name = self.run.layout.rows(self.piece)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (self.folder / name).write_text("".join(lines), encoding="utf-8")
        self.commit([name], rows=len(lines), facts=facts)
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
        firsts, rows = dict.fromkeys(starts[:-1]), dict[int, list[dict[str, Any]]]()
        for file in self.run.layout.kept(self.piece):
            for line in files.read_lines(file):  # no torn or changed one counts
                whole = line.pop("sha256", None) == digest(line)
                if whole and line["identity"] == identity and line["start"] in firsts:
                    rows[line["start"]] = json.loads(line["rows"])
        if rows:
            print(f"{self.piece}: {len(rows)} of {len(firsts)} prompt groups kept", flush=True)
        size = (starts[-1] - starts[0]) * each
        kept = sum(map(len, rows.values())) * each
        self.kept, done = self.kept + kept, size * part[0] + kept
        self.progress(done, size * part[1], unit)
        missing = {start: group for group, start in enumerate(firsts) if start not in rows}
        groups = make(iter(missing.values()))
        for start in missing:
            interrupt.check()
            rows[start] = made = next(groups)
            text = json.dumps(made, ensure_ascii=False)
            line = {"identity": identity, "start": start, "rows": text}
            files.append_line(self.folder / KEPT_FILE, {**line, "sha256": digest(line)})
            done += len(made) * each
            self.progress(done, size * part[1], unit)
        return [row for start in firsts for row in rows[start]]
