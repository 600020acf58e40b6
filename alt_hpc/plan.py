"""The plan, pure: from the graph and the state of a run to the jobs to submit next.

It touches neither disk nor cluster. A job is one sbatch: a stage of an iteration over an explicit
list of shards, an array element each; several where the cluster's arrays are too short for that.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from alt_hpc.graph import STAGES, TRAIN, Graph, Piece

Kind = Literal["afterok", "aftercorr", "afterany"]


@dataclass(frozen=True)
class Done:
    """What a controller knows of a piece with a good manifest (sizes and fingerprint)."""

    checksum: str
    attempt: int
    inputs: Mapping[Piece, str] = field(default_factory=dict)  # checksums it was made from
    removed: bool = False  # its files were, on purpose: nothing more can be made from it


def job_key(iteration: int, stage: str, attempt: int) -> str:
    """Names a submission within its run."""
    return f"{iteration}:{stage}:{attempt}"


@dataclass(frozen=True)
class Array:
    """A stage of an iteration over a list of shards. `attempt` numbers its submissions."""

    stage: str
    iteration: int
    attempt: int
    shards: tuple[int, ...]
    waits: Mapping[Piece, int] = field(default_factory=dict)  # inputs not yet whole -> attempt
    pack: int = 1  # shards that an element makes, one after the other

    @property
    def key(self) -> str:
        return job_key(self.iteration, self.stage, self.attempt)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(Piece(self.iteration, self.stage, shard) for shard in self.shards)

    @cached_property
    def elements(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of each array element."""
        starts = range(0, len(self.shards), self.pack)
        return tuple(self.pieces[start : start + self.pack] for start in starts)

    @cached_property
    def element(self) -> Mapping[Piece, int]:
        """Which element makes a piece."""
        return {piece: i for i, element in enumerate(self.elements) for piece in element}


@dataclass(frozen=True)
class Submission(Array):
    """One recorded intent to submit a job, and the job's id once it had been taken."""

    job: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How an element ended that left a piece which is not whole."""

    state: str  # Slurm's, such as FAILED; UNKNOWN where the cluster has forgotten it; UNBEGUN
    nodes: tuple[str, ...] = ()
    saved: int = 0  # units of the piece's work that were safe by then
    sentence: str = ""  # why no further try would end otherwise


UNBEGUN = "UNBEGUN"  # its task died over a piece that came before
NOT_ITS_FAULT = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REQUEUED")
OUT_OF_TIME = ("STOPPED", "TIMEOUT")  # asked to stop, or not even that
NO_NODES_FAULT = ("CANCELLED", "PREEMPTED", "UNKNOWN", "STOPPED")


@dataclass(frozen=True)
class Limits:
    """What the cluster takes: elements of an array, and elements in all (None: no limit)."""

    array: int = 1000
    room: int | None = None
    only_ready: bool = False  # no job that waits for another


@dataclass(frozen=True)
class State:
    """The run folder and the queue, as a controller found them.

    The graph holds the iterations that have begun, and the one up next as it would begin now.
    """

    graph: Graph
    done: Mapping[Piece, Done] = field(default_factory=dict)
    submissions: tuple[Submission, ...] = ()  # all of them, oldest first
    counted_from: int = 0  # index in `submissions` of the first since a person last submitted
    in_flight: Mapping[Piece, str] = field(default_factory=dict)  # piece -> job or element id
    outcomes: Mapping[tuple[str, Piece], Outcome] = field(default_factory=dict)  # by job key
    waiting: frozenset[str] = frozenset()  # elements in flight that wait for others
    stuck: tuple[str, ...] = ()  # elements in the queue that can never start
    stale: frozenset[Piece] = frozenset()  # whole, but made with settings that have changed since


@dataclass(frozen=True)
class Dependency:
    """A condition on another job of this plan (by key) or on one in flight (by id)."""

    kind: Kind
    target: str


@dataclass(frozen=True)
class Job(Array):
    """One sbatch to come."""

    after: tuple[Dependency, ...] = ()
    exclude: tuple[str, ...] = ()  # nodes on which these pieces failed, the latest first


@dataclass(frozen=True)
class Plan:
    """What a controller does next.

    `wait_for` are the keys of new jobs and the ids of those in flight that the next controller
    waits for. `stop` is the sentence that ends the run early; `finished` says that all is whole
    but what was given up, with a sentence each.
    """

    jobs: tuple[Job, ...] = ()
    wait_for: tuple[str, ...] = ()
    stop: str | None = None
    finished: bool = False
    given_up: Mapping[Piece, str] = field(default_factory=dict)


def plan(state: State, limits: Limits = Limits(), horizon: int | None = None) -> Plan:
    """The next jobs of a run; where the cluster has not room for all, the first that fit.

    `horizon` is the last iteration to plan for; by default the one that is up next.
    """
    horizon = horizon or current_iteration(state)
    given_up = _given_up(state)
    needed = _needed(state, horizon, given_up)
    if not needed and horizon == state.graph.config.iterations:
        return Plan(finished=True, given_up=given_up)
    missing = [piece for piece in needed if piece not in state.in_flight]
    hopeless = _hopeless(state, missing)
    if hopeless:
        return Plan(stop=hopeless)
    if limits.only_ready:
        missing = [p for p in missing if all(is_whole(state, s) for s in state.graph.sources(p))]
    jobs = _that_fit(_jobs(state, missing, limits.array), limits.room)
    return Plan(jobs=tuple(jobs), wait_for=_wait_for(state, jobs, horizon), given_up=given_up)


def current_iteration(state: State) -> int:
    """The first iteration whose training is not whole, at most the last one."""
    last = state.graph.config.iterations
    for k in range(1, last + 1):
        if k not in state.graph.shardings or not is_whole(state, Piece(k, TRAIN)):
            return k
    return last


def is_whole(state: State, piece: Piece) -> bool:
    """Whether a piece counts: done, and made from the inputs as they are now.

    An input that is gone does not unmake it (old policies are removed from disk on purpose);
    an input made again with other bytes does, one that is to be, and one that it should have by
    now (a further set).
    """
    done = state.done.get(piece)
    if done is None:
        return False
    for source in state.graph.sources(piece):
        was, now = done.inputs.get(source), state.done.get(source)
        if was is None or source in state.stale or (now is not None and now.checksum != was):
            return False
    return True


def _needed(state: State, horizon: int, given_up: Container[Piece]) -> list[Piece]:
    """Pieces that are not whole and are needed up to `horizon`, sources before what uses them.

    What was given up is left out, and so is what would be made from it.
    """
    possible: dict[Piece, bool] = {}

    def need(piece: Piece) -> bool:
        """Whether a piece is whole, or can be made."""
        if piece in given_up:
            return False
        if is_whole(state, piece):
            return True
        if piece not in possible:
            sources = [need(source) for source in state.graph.sources(piece)]
            possible[piece] = all(sources)
        return possible[piece]

    for k in range(horizon + 1):
        for result in state.graph.results(k):
            need(result)
    order, stages = [piece for piece, can in possible.items() if can], list(STAGES)
    return sorted(order, key=lambda p: (p.iteration, stages.index(p.stage), p.shard))


def _given_up(state: State) -> dict[Piece, str]:
    """Pieces that no training is made from and that are not tried again, and why."""
    needed = state.graph.needed_by_training()
    found: dict[Piece, str] = {}
    for piece in state.graph.pieces():
        if piece.stage in needed or piece in state.in_flight or is_whole(state, piece):
            continue
        if why := _why_hopeless(state, piece) or _why_impossible(state, piece):
            found[piece] = why
    return found


def _why_impossible(state: State, piece: Piece) -> str:
    """Why a piece of a policy that is gone cannot be made (again); else empty."""
    for source in state.graph.sources(piece):
        done = state.done.get(source)
        if done is not None and done.removed:
            return f"{piece} cannot be made: {source} was removed from the disk (keep)"
    return ""


def attempts(state: State, piece: Piece) -> int:
    """How many submissions of a piece count since a person last submitted.

    One that waited for an input which then failed was cancelled by Slurm and does not count: that
    input is missing, or was made by a later attempt. Nor does one whose task died over another
    piece, before it came to this one. Preemption, a node's failure and a time limit do not count
    while they leave more work safe than the attempts before.
    """
    count, saved = 0, -1
    for submission, end in _tries(state, piece):
        if not _could_run(state, submission, piece):
            continue
        count += end is None or not _went_on(end, saved)
        saved = max(saved, end.saved if end else saved)
    return count


def _went_on(end: Outcome, saved: int) -> bool:
    """Whether a try that something else ended left more work safe than those before it."""
    if end.state in OUT_OF_TIME:
        return end.saved > max(saved, 0)
    return end.state in NOT_ITS_FAULT and end.saved > saved


def _tries(state: State, piece: Piece) -> list[tuple[Submission, Outcome | None]]:
    """Submissions of a piece since a person last submitted that may have come to it, and ends."""
    tries = [
        (submission, state.outcomes.get((submission.key, piece)))
        for submission in state.submissions[state.counted_from :]
        if piece in submission.element
    ]
    return [(submission, end) for submission, end in tries if end is None or end.state != UNBEGUN]


def _could_run(state: State, submission: Submission, piece: Piece) -> bool:
    """Whether what a submission waited for was made by the attempt that it waited for."""
    waited = submission.waits
    end = state.outcomes.get((submission.key, piece))
    never_ran = end is not None and end.state == "CANCELLED" and not end.nodes
    if not never_ran:  # element by element: what the others wait for is nothing to it
        mates = submission.elements[submission.element[piece]]
        sources = {source for mate in mates for source in state.graph.sources(mate)}
        waited = {source: attempt for source, attempt in waited.items() if source in sources}
    made = {source: state.done.get(source) for source in waited}
    return all(d is not None and d.attempt == waited[s] for s, d in made.items())


def failed_on(state: State, piece: Piece) -> tuple[str, ...]:
    """Nodes on which a piece failed since a person last submitted, the latest first.

    A time limit that left more work safe than before is no node's fault.
    """
    nodes: dict[str, None] = {}
    saved, blamed = -1, []
    for end in (end for _, end in _tries(state, piece) if end is not None):
        late = end.state in OUT_OF_TIME and _went_on(end, saved)
        saved = max(saved, end.saved)
        blamed += [] if late or end.state in NO_NODES_FAULT else [end.nodes]
    for names in reversed(blamed):
        nodes.update(dict.fromkeys(names))
    return tuple(nodes)


def _hopeless(state: State, missing: Iterable[Piece]) -> str | None:
    """The sentence of the first piece that is not to be tried again."""
    return next(filter(None, (_why_hopeless(state, piece) for piece in missing)), None)


def _why_hopeless(state: State, piece: Piece) -> str | None:
    """Why a piece is not to be tried again: an error of its own that stays, or too many tries."""
    for _, end in reversed(_tries(state, piece)):
        if end is not None and end.sentence:
            return f"{piece}: {end.sentence}"
    tried = attempts(state, piece)
    if tried < state.graph.config.cluster.max_attempts:
        return None
    return f"{piece} failed {tried} times (cluster.max_attempts){_last_end(state, piece)}"


def _last_end(state: State, piece: Piece) -> str:
    """`, last FAILED on n2`, where that is known."""
    for _, end in reversed(_tries(state, piece)):
        if end is not None and end.state != "UNKNOWN":
            return f", last {end.state}" + (f" on {','.join(end.nodes)}" if end.nodes else "")
    return ""


def _that_fit(jobs: list[Job], room: int | None) -> list[Job]:
    """The jobs, or elements of the last one, that the cluster has room for.

    What they leave out the next controller submits; an array cut short pairs with no other.
    """
    if room is None:
        return jobs
    taken: list[Job] = []
    for job in jobs:
        left = room - sum(len(other.elements) for other in taken)
        shards = job.shards[: left * job.pack]
        if shards:
            taken.append(replace(job, shards=shards))
        if shards != job.shards:
            break
    return [_unpaired(job, taken) for job in taken]


def _unpaired(job: Job, taken: list[Job]) -> Job:
    """`aftercorr` of a cut array would wait for elements beyond its own: they go, or are all."""
    shards = {other.key: other.shards for other in taken}
    after = tuple(
        replace(d, kind="afterok")
        if d.kind == "aftercorr" and shards[d.target] != job.shards
        else d
        for d in job.after
    )
    return replace(job, after=after)


def _jobs(state: State, missing: list[Piece], max_array: int) -> list[Job]:
    """Group pieces of one stage and iteration with alike dependencies into arrays.

    Where an array may not have so many elements, each makes several pieces.
    """
    jobs: list[Job] = []
    making: dict[Piece, Job] = {}
    used = {submission.key for submission in state.submissions}
    for k, stage in dict.fromkeys((p.iteration, p.stage) for p in missing):
        alike: dict[tuple[tuple[Dependency, ...], tuple[str, ...]], list[Piece]] = {}
        for piece in (p for p in missing if (p.iteration, p.stage) == (k, stage)):
            shared = _after(state, making, piece), failed_on(state, piece)
            alike.setdefault(shared, []).append(piece)
        for (after, exclude), members in alike.items():
            job = _job(state, making, members, after, used)
            job = replace(job, exclude=exclude, pack=-(-len(members) // max_array))
            used.add(job.key)
            jobs.append(job)
            making.update(dict.fromkeys(members, job))
    return [_pair(job, jobs) for job in jobs]


def _after(state: State, making: Mapping[Piece, Job], piece: Piece) -> tuple[Dependency, ...]:
    """Conditions of one piece: on jobs of this plan (all of the job) and on elements in flight."""
    after: dict[Dependency, None] = {}
    for source in state.graph.sources(piece):
        if source in making:
            after[Dependency("afterok", making[source].key)] = None
        elif source in state.in_flight:
            after[Dependency("afterok", state.in_flight[source])] = None
    return tuple(after)


def _job(
    state: State,
    making: Mapping[Piece, Job],
    members: list[Piece],
    after: tuple[Dependency, ...],
    used: set[str],
) -> Job:
    k, stage = members[0].iteration, members[0].stage
    attempt = 1
    while job_key(k, stage, attempt) in used:
        attempt += 1
    waits: dict[Piece, int] = {}
    running = {p: s.attempt for s in state.submissions for p in s.pieces if p in state.in_flight}
    for piece in members:
        for source in state.graph.sources(piece):
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
    """Turn `afterok` into `aftercorr` on the array that a stage pairs with, shard by shard.

    Only arrays of the same shards pair, element by element; one element is a plain job
    (submitit makes it so), for which afterok means the same.
    """
    by_key = {other.key: other for other in jobs}
    after = []
    for dependency in job.after:
        other = by_key.get(dependency.target)
        pairs = (
            other is not None
            and other.stage == STAGES[job.stage].pairs
            and other.shards == job.shards
            and len(job.elements) > 1
        )
        after.append(Dependency("aftercorr", dependency.target) if pairs else dependency)
    return replace(job, after=tuple(after))


def _wait_for(state: State, jobs: list[Job], horizon: int) -> tuple[str, ...]:
    """What the next controller waits for: all that training needs; at the end, the rest too.

    And what lags behind by more than `keep` + 2 iterations, as no policy is removed before it.
    Where Slurm leaves a job waiting whose dependency has failed, only what waits for no other.
    """
    config = state.graph.config
    needed = state.graph.needed_by_training()
    oldest = config.iterations if horizon == config.iterations else horizon - config.keep - 2

    def matters(iteration: int, stage: str) -> bool:
        return stage in needed or iteration <= oldest

    ours = [job for job in jobs if config.cluster.kill_invalid_dependencies or not job.after]
    theirs = {
        piece: element
        for piece, element in state.in_flight.items()
        if config.cluster.kill_invalid_dependencies or element not in state.waiting
    }
    keys = [job.key for job in ours if matters(job.iteration, job.stage)]
    ids = [element for piece, element in theirs.items() if matters(piece.iteration, piece.stage)]
    if not keys and not ids:  # only what training does not need is left of what can be done now
        keys, ids = [job.key for job in ours], list(theirs.values())
    return tuple(dict.fromkeys([*keys, *ids]))
