"""The plan, pure: from config and the state of the run folder to the jobs to submit next.

It touches neither disk nor cluster. A job is one sbatch: a stage of an iteration over an explicit
list of shards, each an array element.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from alt_hpc import pieces
from alt_hpc.config import Config
from alt_hpc.pieces import STAGES, Piece, Sharding

Kind = Literal["afterok", "aftercorr", "afterany"]


@dataclass(frozen=True)
class Done:
    """What a controller knows of a piece with a good manifest (sizes and fingerprint)."""

    checksum: str
    attempt: int
    inputs: Mapping[Piece, str] = field(default_factory=dict)  # checksums it was made from


@dataclass(frozen=True)
class Submission:
    """One recorded intent to submit a job."""

    key: str
    stage: str
    iteration: int
    attempt: int
    shards: tuple[int, ...]
    waits: Mapping[Piece, int] = field(default_factory=dict)  # inputs not yet whole -> attempt
    job: str | None = None

    @property
    def pieces(self) -> list[Piece]:
        return [Piece(self.iteration, self.stage, shard) for shard in self.shards]


@dataclass(frozen=True)
class State:
    """The run folder and the queue, as a controller found them."""

    shardings: Mapping[int, Sharding]
    done: Mapping[Piece, Done] = field(default_factory=dict)
    submissions: tuple[Submission, ...] = ()  # all of them, oldest first
    counted_from: int = 0  # index in `submissions` of the first since a person last submitted
    in_flight: Mapping[Piece, str] = field(default_factory=dict)  # piece -> job or element id


@dataclass(frozen=True)
class Dependency:
    """A condition on another job of this plan (by key) or on one in flight (by id)."""

    kind: Kind
    target: str


@dataclass(frozen=True)
class Job:
    """One sbatch to come. `attempt` numbers the submissions of this stage and iteration."""

    stage: str
    iteration: int
    attempt: int
    shards: tuple[int, ...]
    after: tuple[Dependency, ...] = ()
    waits: Mapping[Piece, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.iteration}:{self.stage}:{self.attempt}"

    @property
    def pieces(self) -> list[Piece]:
        return [Piece(self.iteration, self.stage, shard) for shard in self.shards]


@dataclass(frozen=True)
class Plan:
    """What a controller does next.

    `wait_for` are the keys of new jobs and the ids of those in flight that the next controller
    waits for. `stop` is the sentence that ends the run early; `finished` says all is whole.
    """

    jobs: tuple[Job, ...] = ()
    wait_for: tuple[str, ...] = ()
    stop: str | None = None
    finished: bool = False


def plan(config: Config, state: State, max_array: int = 1000) -> Plan:
    """The next jobs of a run. `max_array` is the largest number of elements of an array."""
    horizon = current_iteration(config, state)
    needed = _needed(config, state, horizon)
    if not needed and horizon == config.iterations:
        return Plan(finished=True)
    missing = [piece for piece in needed if piece not in state.in_flight]
    exhausted = _exhausted(config, state, missing)
    if exhausted:
        return Plan(stop=exhausted)
    jobs = _jobs(config, state, missing, max_array)
    return Plan(jobs=tuple(jobs), wait_for=_wait_for(config, state, jobs, horizon))


def current_iteration(config: Config, state: State) -> int:
    """The first iteration whose training is not whole, at most the last one."""
    for k in range(1, config.iterations + 1):
        if k not in state.shardings or not is_whole(config, state, Piece(k, "train")):
            return k
    return config.iterations


def is_whole(config: Config, state: State, piece: Piece) -> bool:
    """Whether a piece counts: done, and made from the inputs as they are now.

    An input that is gone does not unmake it (old policies are removed from disk on purpose);
    an input made again with other bytes does.
    """
    done = state.done.get(piece)
    if done is None:
        return False
    for source in pieces.inputs(config, state.shardings, piece):
        now = state.done.get(source)
        if now is not None and done.inputs.get(source) != now.checksum:
            return False
    return True


def _needed(config: Config, state: State, horizon: int) -> list[Piece]:
    """Pieces that are not whole and are needed up to `horizon`, inputs before what uses them."""
    order: dict[Piece, None] = {}

    def need(piece: Piece) -> None:
        if piece in order or is_whole(config, state, piece):
            return
        for source in pieces.inputs(config, state.shardings, piece):
            need(source)
        order[piece] = None

    for k in range(horizon + 1):
        if k:
            need(Piece(k, "train"))
        need(Piece(k, "report"))
    return sorted(order, key=lambda p: (p.iteration, STAGES.index(p.stage), p.shard))


def attempts(state: State, piece: Piece) -> int:
    """How many submissions of a piece had a chance to run since a person last submitted.

    One that waited for an input which then failed was cancelled by Slurm and does not count:
    that input is missing, or was made by a later attempt.
    """
    count = 0
    for submission in state.submissions[state.counted_from :]:
        if piece not in submission.pieces:
            continue
        waited = {
            source: attempt
            for source, attempt in submission.waits.items()
            if source.stage != "sample" or piece.stage != "score" or source.shard == piece.shard
        }
        made = {source: state.done.get(source) for source in waited}
        count += all(d is not None and d.attempt == waited[s] for s, d in made.items())
    return count


def _exhausted(config: Config, state: State, missing: Iterable[Piece]) -> str | None:
    for piece in missing:
        tried = attempts(state, piece)
        if tried >= config.cluster.max_attempts:
            return f"{piece} failed {tried} times (cluster.max_attempts)"
    return None


def _jobs(config: Config, state: State, missing: list[Piece], max_array: int) -> list[Job]:
    """Group pieces of one stage and iteration with alike dependencies into arrays."""
    jobs: list[Job] = []
    making: dict[Piece, Job] = {}
    used = {submission.key for submission in state.submissions}
    for k, stage in dict.fromkeys((p.iteration, p.stage) for p in missing):
        alike: dict[tuple[Dependency, ...], list[Piece]] = {}
        for piece in (p for p in missing if (p.iteration, p.stage) == (k, stage)):
            alike.setdefault(_after(config, state, making, piece), []).append(piece)
        for after, members in alike.items():
            for start in range(0, len(members), max_array):
                chunk = members[start : start + max_array]
                job = _job(config, state, making, chunk, after, used)
                used.add(job.key)
                jobs.append(job)
                making.update(dict.fromkeys(chunk, job))
    return [_pair(job, jobs) for job in jobs]


def _after(
    config: Config, state: State, making: Mapping[Piece, Job], piece: Piece
) -> tuple[Dependency, ...]:
    """Conditions of one piece: on jobs of this plan (all of the job) and on elements in flight."""
    after: dict[Dependency, None] = {}
    for source in pieces.inputs(config, state.shardings, piece):
        if source in making:
            after[Dependency("afterok", making[source].key)] = None
        elif source in state.in_flight:
            after[Dependency("afterok", state.in_flight[source])] = None
    return tuple(after)


def _job(
    config: Config,
    state: State,
    making: Mapping[Piece, Job],
    members: list[Piece],
    after: tuple[Dependency, ...],
    used: set[str],
) -> Job:
    k, stage = members[0].iteration, members[0].stage
    attempt = 1
    while f"{k}:{stage}:{attempt}" in used:
        attempt += 1
    waits: dict[Piece, int] = {}
    running = {p: s.attempt for s in state.submissions for p in s.pieces if p in state.in_flight}
    for piece in members:
        for source in pieces.inputs(config, state.shardings, piece):
            if source in making:
                waits[source] = making[source].attempt
            elif source in state.in_flight:
                waits[source] = running[source]
    return Job(
        stage=stage,
        iteration=k,
        attempt=attempt,
        shards=tuple(p.shard for p in members),
        after=after,
        waits=waits,
    )


def _pair(job: Job, jobs: list[Job]) -> Job:
    """Turn `afterok` into `aftercorr` between a score array and the sample array of its shards.

    Only arrays with the same list of shards pair, element by element; one element is a plain job
    (submitit makes it so), for which afterok means the same.
    """
    by_key = {other.key: other for other in jobs}
    after = []
    for dependency in job.after:
        other = by_key.get(dependency.target)
        pairs = (
            job.stage == "score"
            and other is not None
            and other.stage == "sample"
            and other.shards == job.shards
            and len(job.shards) > 1
        )
        after.append(Dependency("aftercorr", dependency.target) if pairs else dependency)
    return Job(job.stage, job.iteration, job.attempt, job.shards, tuple(after), job.waits)


def _wait_for(config: Config, state: State, jobs: list[Job], horizon: int) -> tuple[str, ...]:
    """What the next controller waits for: all but evaluations; at the end, those too."""
    overlapping = ("evaluate", "report")
    last = horizon == config.iterations
    keys = [job.key for job in jobs if last or job.stage not in overlapping]
    ids = [job for piece, job in state.in_flight.items() if last or piece.stage not in overlapping]
    if not keys and not ids:  # only evaluations are left of what can be done now
        keys, ids = [job.key for job in jobs], list(state.in_flight.values())
    return tuple(dict.fromkeys([*keys, *ids]))
