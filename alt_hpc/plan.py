"""The plan, pure: from the graph and the state of a run to the jobs to submit next.

It touches neither disk nor cluster. A job is one sbatch: a stage of an iteration over an explicit
list of shards, an array element each; several where the cluster's arrays are too short for that.
"""

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal, NamedTuple

from alt_hpc.graph import STAGES, TRAIN, Graph, Piece

Kind = Literal["afterok", "aftercorr", "afterany"]


@dataclass(frozen=True)
class Done:
    """What a controller knows of a piece with a good manifest (sizes and fingerprint)."""

    checksum: str
    attempt: int
    inputs: Mapping[Piece, str] = field(default_factory=dict)  # checksums it was made from
    removed: bool = False  # its files were, on purpose: nothing more can be made from it


@dataclass(frozen=True)
class Submission:
    """A stage of an iteration over a list of shards, recorded or to come: one sbatch."""

    stage: str
    iteration: int
    attempt: int  # numbers the submissions of a stage of an iteration
    shards: tuple[int, ...]
    waits: Mapping[Piece, int] = field(default_factory=dict)  # inputs not yet whole -> attempt
    pack: int = 1  # shards that an element makes, one after the other
    job: str | None = None  # the id, once Slurm has taken it

    @property
    def key(self) -> str:
        """Names it within its run."""
        return f"{self.iteration}:{self.stage}:{self.attempt}"

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


class Dependency(NamedTuple):
    """A condition on another job of this plan (by key) or on one in flight (by id)."""

    kind: Kind
    target: str


@dataclass(frozen=True)
class Job(Submission):
    """One to come, with what the cluster is told of it."""

    after: tuple[Dependency, ...] = ()
    exclude: tuple[str, ...] = ()  # nodes on which these pieces failed, the latest first


@dataclass(frozen=True)
class Outcome:
    """How an element ended that left a piece which is not whole."""

    state: str  # Slurm's, such as FAILED; UNKNOWN where the cluster has forgotten it; UNBEGUN
    nodes: tuple[str, ...] = ()
    saved: int = 0  # units of the piece's work that were safe by then
    sentence: str = ""  # why no further try would end otherwise
    error: str = ""  # of Python, as the task has told it; it may not come again

    def __str__(self) -> str:
        """`FAILED on n1: RuntimeError: ...`."""
        where = f" on {','.join(self.nodes)}" if self.nodes else ""
        return f"{self.state}{where}{f': {self.error}' if self.error else ''}"


UNBEGUN = "UNBEGUN"  # its task died over a piece that came before
NOT_KNOWN = Outcome("UNKNOWN", saved=-1)
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
    if stop := next(filter(None, (_why_hopeless(state, piece) for piece in missing)), None):
        return Plan(stop=stop)
    if limits.only_ready:  # a try that was left behind may make what a later one still makes
        ready = [
            all(is_whole(state, s) and s not in state.in_flight for s in state.graph.sources(piece))
            for piece in missing
        ]
        missing = list(itertools.compress(missing, ready))
    jobs = _jobs(state, missing, limits)
    return Plan(jobs=tuple(jobs), wait_for=_wait_for(state, jobs, horizon), given_up=given_up)


def current_iteration(state: State) -> int:
    """The first iteration whose training is not whole, at most the last one."""
    last = state.graph.config.iterations
    return next((k for k in range(1, last) if not is_whole(state, Piece(k, TRAIN))), last)


def is_whole(state: State, piece: Piece) -> bool:
    """Whether a piece counts: done, and made from the inputs as they are now.

    An input that is gone does not unmake it (old policies are removed from disk on purpose);
    an input made again with other bytes does, one that is to be, and one that it should have by
    now (a further set).
    """
    if piece not in state.done:
        return False
    made_from = state.done[piece].inputs
    return all(
        source in made_from
        and source not in state.stale
        and (source not in state.done or state.done[source].checksum == made_from[source])
        for source in state.graph.sources(piece)
    )


def _given_up(state: State) -> dict[Piece, str]:
    """Pieces that no training is made from and that are not tried (again), and why."""
    needed, found = state.graph.needed_by_training(), {}
    for piece in state.graph.pieces():
        if piece.stage in needed or piece in state.in_flight or is_whole(state, piece):
            continue
        gone = [s for s in state.graph.sources(piece) if s in state.done and state.done[s].removed]
        removed = [f"{piece} cannot be made: {s} was removed from the disk (keep)" for s in gone]
        if why := _why_hopeless(state, piece) or "".join(removed[:1]):
            found[piece] = why
    return found


def _needed(state: State, horizon: int, given_up: Container[Piece]) -> list[Piece]:
    """Pieces that are not whole and are needed up to `horizon`, sources before what uses them.

    What was given up is left out, and so is what would be made from it.
    """
    graph, needed = state.graph, set[Piece]()

    @cache
    def possible(piece: Piece) -> bool:
        """Whether a piece is whole or can be made: then it is needed, and what it is made from."""
        if piece in given_up:
            return False
        if is_whole(state, piece):
            return True
        sources = [possible(source) for source in graph.sources(piece)]
        if all(sources):
            needed.add(piece)
        return all(sources)

    for k in range(horizon + 1):
        used = {source for piece in graph.pieces(k) for source in graph.sources(piece)}
        for piece in graph.pieces(k):
            if piece not in used or piece.stage == TRAIN:  # no other of its iteration asks for it
                possible(piece)
    return [p for k in range(horizon + 1) for p in graph.pieces(k) if p in needed]


class Tries(NamedTuple):
    """What came of the submissions of a piece since a person last submitted."""

    counted: int
    nodes: tuple[str, ...]  # on which it failed, the latest first
    ends: tuple[Outcome, ...]  # the latest first


def tries(state: State, piece: Piece) -> Tries:
    """How often a piece was tried in earnest, and how that ended.

    One that waited for an input which then failed was cancelled by Slurm and does not count: that
    input is missing, or was made by a later attempt. Nor does one whose task died over another
    piece, before it came to this one. Preemption, a node's failure and a time limit do not count
    while they leave more work safe than the tries before; nor is such a time limit a node's fault.
    """
    counted, saved = 0, -1
    nodes, ends = list[str](), list[Outcome]()
    for submission in state.submissions[state.counted_from :]:
        end = state.outcomes.get((submission.key, piece), NOT_KNOWN)
        if piece not in submission.element or end.state == UNBEGUN:
            continue
        ends.insert(0, end)
        late = end.state in OUT_OF_TIME
        went_on = end.saved > (max(saved, 0) if late else saved)
        if end.state not in NO_NODES_FAULT and not (late and went_on):
            nodes = [*end.nodes, *nodes]
        mates = submission.elements[submission.element[piece]]
        sources = {source for mate in mates for source in state.graph.sources(mate)}
        cancelled = end.state == "CANCELLED" and not end.nodes  # for the sake of any element
        if all(
            source in state.done and state.done[source].attempt == attempt
            for source, attempt in submission.waits.items()
            if cancelled or source in sources
        ):
            counted += not (went_on and (late or end.state in NOT_ITS_FAULT))
            saved = max(saved, end.saved)
    return Tries(counted, tuple(dict.fromkeys(nodes)), tuple(ends))


def _why_hopeless(state: State, piece: Piece) -> str:
    """Why a piece is not to be tried again: an error of its own that stays, or too many tries."""
    tried = tries(state, piece)
    if stays := next((end.sentence for end in tried.ends if end.sentence), None):
        return f"{piece}: {stays}"
    if tried.counted < state.graph.config.cluster.max_attempts:
        return ""
    sentence = f"{piece} failed {tried.counted} times (cluster.max_attempts)"
    for end in tried.ends:
        if end.state != "UNKNOWN":
            return f"{sentence}, last {end}"
    return sentence


def _jobs(state: State, missing: list[Piece], limits: Limits) -> list[Job]:
    """Pieces of one stage and iteration that wait for the same and shun the same nodes: an array.

    Where an array may not have so many elements, each makes several pieces. What the cluster has
    no room for, the next controller submits. Arrays of the same shards pair, element by element
    (`aftercorr`): of a longer one it would wait for elements beyond its own. One element is a
    plain job (submitit makes it so), for which afterok means the same.
    """
    jobs: list[Job] = []
    room = len(missing) if limits.room is None else limits.room
    last = {(s.iteration, s.stage): s.attempt for s in state.submissions}
    making = {  # piece -> the job or element to wait for, and its attempt
        piece: (state.in_flight[piece], submission.attempt)
        for submission in state.submissions
        for piece in submission.pieces
        if piece in state.in_flight
    }
    for (k, stage), pieces in itertools.groupby(missing, lambda p: (p.iteration, p.stage)):
        alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Piece]] = {}
        for piece in pieces:
            targets = dict.fromkeys(making[s][0] for s in state.graph.sources(piece) if s in making)
            alike.setdefault((tuple(targets), tries(state, piece).nodes), []).append(piece)
        for (after, exclude), members in alike.items():
            number = last[k, stage] = last.get((k, stage), 0) + 1
            pack = -(-len(members) // limits.array)
            shards = tuple(piece.shard for piece in members[: room * pack])
            if not shards:
                return jobs
            of = shards if len(shards) > pack else ()
            pair = (k, STAGES[stage].pairs, of)
            mates = {j.key for j in jobs if (j.iteration, j.stage, j.shards) == pair}
            sources = [source for piece in members for source in state.graph.sources(piece)]
            waits = {source: making[source][1] for source in sources if source in making}
            job = Job(
                *(stage, k, number, shards, waits, pack),
                after=tuple(Dependency("aftercorr" if t in mates else "afterok", t) for t in after),
                exclude=exclude,
            )
            jobs.append(job)
            room -= len(job.elements)
            making |= dict.fromkeys(members, (job.key, number))
    return jobs


def _wait_for(state: State, jobs: list[Job], horizon: int) -> tuple[str, ...]:
    """What the next controller waits for: all that training needs; at the end, the rest too.

    And what lags behind by more than `keep` + 2 iterations, as no policy is removed before it.
    Where Slurm leaves a job waiting whose dependency has failed, only what waits for no other.
    """
    config = state.graph.config
    needed = state.graph.needed_by_training()
    oldest = horizon - (0 if horizon == config.iterations else config.keep + 2)
    killed = config.cluster.kill_invalid_dependencies
    ours = [(job.key, job.pieces[0]) for job in jobs if killed or not job.after]
    theirs = [(e, p) for p, e in state.in_flight.items() if killed or e not in state.waiting]
    matter = [t for t, p in ours + theirs if p.stage in needed or p.iteration <= oldest]
    if not matter:  # only what training does not need is left of what can be done now
        matter = [target for target, _ in ours + theirs]
    return tuple(dict.fromkeys(matter))
