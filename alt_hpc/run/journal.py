"""The journal of a run: what people and controllers intended, submitted and found, line by line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from alt_hpc.graph import Piece
from alt_hpc.plan import Job, Outcome, Submission
from alt_hpc.run.files import append_line, read_lines

E = TypeVar("E", bound="Entry")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line. `event` names its kind."""

    event: ClassVar[str]
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Submit(Entry):
    """A person submitted: what was tried before no longer counts."""

    event = "submit"
    who: str
    cluster: str = ""  # whose jobs the ids behind it are


@dataclass(frozen=True, kw_only=True)
class Intent(Entry):
    """Before sbatch: so that a job which dies before Python starts counts as an attempt."""

    event = "intent"
    key: str
    stage: str
    iteration: int
    attempt: int
    shards: Sequence[int]
    pack: int
    waits: Sequence[tuple[int, str, int, int]]  # iteration, stage, shard; attempt

    @classmethod
    def of(cls, job: Job) -> Intent:
        return cls(
            key=job.key,
            stage=job.stage,
            iteration=job.iteration,
            attempt=job.attempt,
            shards=job.shards,
            pack=job.pack,
            waits=[(p.iteration, p.stage, p.shard, a) for p, a in job.waits.items()],
        )

    def submission(self) -> Submission:
        waits = {Piece(k, stage, shard): attempt for k, stage, shard, attempt in self.waits}
        return Submission(
            self.stage, self.iteration, self.attempt, tuple(self.shards), waits, self.pack
        )


@dataclass(frozen=True, kw_only=True)
class Submitted(Entry):
    """The cluster took a job."""

    event = "submitted"
    key: str
    job: str


@dataclass(frozen=True, kw_only=True)
class Refused(Entry):
    """The cluster did not."""

    event = "refused"
    key: str
    why: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Ended(Entry):
    """How a submission of a piece ended that did not make it whole."""

    event = "outcome"
    key: str
    piece: tuple[int, str, int]
    state: str
    nodes: Sequence[str]
    saved: int
    sentence: str = ""

    @classmethod
    def of(cls, key: str, piece: Piece, end: Outcome) -> Ended:
        where = piece.iteration, piece.stage, piece.shard
        return cls(key=key, piece=where, **dataclasses.asdict(end))

    def outcome(self) -> Outcome:
        return Outcome(self.state, tuple(self.nodes), self.saved, self.sentence)


@dataclass(frozen=True, kw_only=True)
class Queued(Entry):
    """A controller was queued."""

    event = "controller"
    job: str


@dataclass(frozen=True, kw_only=True)
class Stepped(Entry):
    """A controller came to its end: pieces whole and jobs submitted so far; None: it backed off."""

    event = "step"
    progress: Sequence[int] | None
    waits: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Released(Entry):
    """A job that Slurm held was let go."""

    event = "released"
    job: str


@dataclass(frozen=True, kw_only=True)
class Accepted(Entry):
    """A person goes on with other packages; these were right before, by stage."""

    event = "accepted"
    packages: Mapping[str, Mapping[str, str]]


KINDS: dict[str, type[Entry]] = {
    kind.event: kind
    for kind in (Submit, Intent, Submitted, Refused, Ended, Queued, Stepped, Released, Accepted)
}


class Journal:
    """A file that is only appended to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def record(self, entry: Entry) -> None:
        append_line(self.file, {"event": entry.event, **dataclasses.asdict(entry)})

    def __iter__(self) -> Iterator[Entry]:
        """All entries, oldest first. A torn line, or one of another version, is passed over."""
        return filter(None, map(_entry, read_lines(self.file)))

    def of(self, kind: type[E]) -> list[E]:
        """All entries of a kind, oldest first."""
        return [entry for entry in self if isinstance(entry, kind)]

    def since(self, holds: Callable[[Entry], bool]) -> list[Entry]:
        """The entries after the last one of which `holds`."""
        entries = list(self)
        last = max((i for i, entry in enumerate(entries) if holds(entry)), default=-1)
        return entries[last + 1 :]

    def submissions(self) -> tuple[tuple[Submission, ...], int]:
        """All recorded intents with their job ids, and the index of the first since a person's."""
        found: dict[str, Submission] = {}
        counted_from = 0
        for entry in self:
            match entry:
                case Submit():
                    counted_from = len(found)
                case Intent():
                    found[entry.key] = entry.submission()
                case Submitted() if entry.key in found:
                    found[entry.key] = dataclasses.replace(found[entry.key], job=entry.job)
        return tuple(found.values()), counted_from

    def outcomes(self) -> dict[tuple[str, Piece], Outcome]:
        """How submissions (by job key) of pieces ended that are not whole, as controllers found."""
        return {(e.key, Piece(*e.piece)): e.outcome() for e in self.of(Ended)}


def _entry(values: dict[str, Any]) -> Entry | None:
    kind = KINDS.get(values.pop("event", ""))
    try:
        return kind(**values) if kind else None
    except TypeError:
        return None
