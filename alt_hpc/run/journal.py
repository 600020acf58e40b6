"""The journal of a run: what people and controllers intended, submitted and found, line by line."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, Field, ValidationError

from alt_hpc.graph import Piece
from alt_hpc.plan import Job, Outcome, Submission
from alt_hpc.run.files import append_line, read_lines

E = TypeVar("E", bound="Entry")


class Entry(BaseModel, frozen=True, extra="forbid"):
    event: ClassVar[str]  # names the kind of a line
    time: float = Field(default_factory=time.time)

    def __init_subclass__(cls, event: str) -> None:
        cls.event = event


class Submit(Entry, event="submit"):  # a person submitted: what was tried before no longer counts
    who: str
    cluster: str = ""  # whose jobs the ids behind it are


class Intent(Entry, event="intent"):  # before sbatch: what dies before Python starts counts too
    key: str
    stage: str
    iteration: int
    attempt: int
    shards: tuple[int, ...]
    pack: int
    waits: tuple[tuple[int, str, int, int], ...]  # iteration, stage, shard; attempt

    @classmethod
    def of(cls, job: Job) -> "Intent":
        same = {name: getattr(job, name) for name in cls.model_fields.keys() - {"time", "waits"}}
        return cls(**same, waits=tuple((*dataclasses.astuple(p), a) for p, a in job.waits.items()))


class Submitted(Entry, event="submitted"):  # the cluster took a job
    key: str
    job: str


class Ended(Entry, event="outcome"):  # how a submission of a piece ended that did not make it whole
    key: str
    piece: tuple[int, str, int]  # iteration, stage, shard
    state: str
    nodes: tuple[str, ...]
    saved: int
    sentence: str = ""
    error: str = ""


class Queued(Entry, event="controller"):  # a controller was queued
    job: str


class Stepped(Entry, event="step"):  # a controller came to its end
    progress: Sequence[int] | None  # pieces whole and jobs submitted so far; None: it backed off
    waits: Sequence[str]


class Released(Entry, event="released"):  # a job that Slurm held was let go
    job: str


class Accepted(Entry, event="accepted"):  # a person goes on with other packages
    packages: Mapping[str, Mapping[str, str]]  # those that were right before, by stage


@dataclasses.dataclass
class Journal:
    file: Path  # only appended to

    def record(self, entry: Entry) -> None:
        append_line(self.file, {"event": entry.event, **entry.model_dump()})

    def __iter__(self) -> Iterator[Entry]:
        """All entries, oldest first. A torn line, or one of another version, is passed over."""
        kinds = {kind.event: kind for kind in Entry.__subclasses__()}
        for values in read_lines(self.file):
            with contextlib.suppress(ValidationError):
                if kind := kinds.get(values.pop("event", "")):
                    yield kind(**values)

    def of(self, kind: type[E]) -> list[E]:
        return [entry for entry in self if isinstance(entry, kind)]

    def since(self, holds: Callable[[Entry], bool]) -> list[Entry]:
        """The entries after the last one of which `holds`."""
        entries = list(self)
        last = max((i for i, entry in enumerate(entries) if holds(entry)), default=-1)
        return entries[last + 1 :]

    def submissions(self) -> tuple[tuple[Submission, ...], int]:
        """All recorded intents with their job ids, and the index of the first since a person's."""
        found, counted_from = dict[str, Submission](), 0
        for entry in self:
            match entry:
                case Submit():
                    counted_from = len(found)
                case Intent(key=key, stage=stage, iteration=k, attempt=attempt, shards=shards):
                    waits = {Piece(i, of, shard): last for i, of, shard, last in entry.waits}
                    found[key] = Submission(stage, k, attempt, shards, waits, entry.pack)
                case Submitted() if entry.key in found:
                    found[entry.key] = dataclasses.replace(found[entry.key], job=entry.job)
        return tuple(found.values()), counted_from

    def outcomes(self) -> dict[tuple[str, Piece], Outcome]:
        """How submissions (by job key) of pieces ended that are not whole, as controllers found."""
        ends = [
            (e, Outcome(e.state, e.nodes, e.saved, e.sentence, e.error)) for e in self.of(Ended)
        ]
        return {(entry.key, Piece(*entry.piece)): outcome for entry, outcome in ends}
