"""One step of a controller: read the run folder and the queue, plan, submit what is missing.

Every start is the same code path: first, next iteration, recovery, restart weeks later. It imports
no torch. On Slurm `chain` takes the steps, in jobs of a few seconds; on one machine `start` does.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from alt_hpc.clusters.cluster import NEVER, Asked, Cluster, Request, Seen, SubmissionRefused
from alt_hpc.config import Config
from alt_hpc.data import draws
from alt_hpc.graph import Graph, Piece
from alt_hpc.plan import (
    UNBEGUN,
    Array,
    Done,
    Job,
    Outcome,
    Plan,
    State,
    Submission,
    current_iteration,
    plan,
)
from alt_hpc.run import attempt, progress
from alt_hpc.run.files import make_private
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Ended, Intent, Refused, Submitted
from alt_hpc.task import StageTask

DEPENDENCY, UNSATISFIED = "Dependency", "DependencyNeverSatisfied"  # Slurm's reasons

Looked = Mapping[str, Mapping[int, Seen]]  # by the keys of jobs, and the indices of elements


@dataclass(frozen=True)
class Step:
    """What a step did: the plan, the ids of new jobs by key, and what the next step waits for.

    `waiting` are the elements in the queue that wait for others.
    """

    plan: Plan
    submitted: Mapping[str, str] = field(default_factory=dict)
    waits: tuple[str, ...] = ()
    refused: SubmissionRefused | None = None
    waiting: frozenset[str] = frozenset()


def step(folder: RunFolder, cluster: Cluster, horizon: int | None = None) -> Step:
    """Plan and submit once: the iteration that is up next, or all up to `horizon`.

    QueueUnknown where it could not be learnt what is in flight; nothing was submitted.
    """
    config = folder.config()
    state = read_state(folder, cluster)
    todo = plan(state, cluster.limits(config.cluster, scripts(folder)), horizon)
    _write_down(folder, state)
    cluster.cancel(*state.stuck)
    ids: dict[str, str] = {}
    refused = None
    for job in todo.jobs:
        after = [replace(d, target=ids.get(d.target, d.target)) for d in job.after]
        folder.journal.record(Intent.of(job))
        make_private(folder.layout.jobs)
        make_private(_job_folder(folder, job))
        try:
            ids[job.key] = cluster.submit(request(folder, config, job), after)
        except SubmissionRefused as error:
            refused = error
            folder.journal.record(Refused(key=job.key, why=str(error), kind=error.kind))
            break
        folder.journal.record(Submitted(key=job.key, job=ids[job.key]))
    missed = {job.key for job in todo.jobs} - ids.keys()
    waits = tuple(ids.get(target, target) for target in todo.wait_for if target not in missed)
    return Step(todo, ids, waits, refused, state.waiting)


def request(folder: RunFolder, config: Config, job: Job) -> Request:
    """A planned job as the cluster sees it."""
    return Request(
        name=f"{folder.path.name}-{job.stage}-{job.iteration}",
        run_id=folder.run_id,
        key=job.key,
        folder=_job_folder(folder, job),
        tasks=StageTask.of(folder, job),
        stage=config.cluster.stage(job.stage),
        common=config.cluster,
        threads=config.threads,
        exclude=job.exclude,
        code=folder.layout.code,
        side=job.stage not in folder.graph().needed_by_training(),
        warm=True,
    )


def scripts(folder: RunFolder) -> Path:
    """Where the script of this run's controllers lies."""
    return folder.layout.controller_script().parent


def finish(done: Plan) -> str:
    """The sentence of a run that has come to its end."""
    return "; but ".join(["the run is finished", *done.given_up.values()])


# ---------------------------------------------------------------------- the state


def read_state(folder: RunFolder, cluster: Cluster) -> State:
    """The run folder and the queue as one value; writes nothing.

    Iteration 0 and the one up next are there as they would begin now, if they have not.
    QueueUnknown where it could not be learnt what is in flight.
    """
    submissions, counted_from = folder.journal.submissions()
    done, outcomes = folder.manifests.done(), folder.journal.outcomes()
    open_ = _open(submissions, done, outcomes)
    found = _look(folder, cluster, open_)
    # What has ended by now may have become whole after we looked for manifests.
    ended = [p for s in open_ for p in s.pieces if p not in done and not _flies(s, p, found)]
    done |= folder.manifests.done(ended)
    graph, stale = _graph(folder, done), folder.manifests.stale(done)
    state = State(graph, done, submissions, counted_from, outcomes=outcomes, stale=stale)
    return _with_ends(folder, state, found)


def looked(folder: RunFolder, cluster: Cluster) -> list[tuple[Submission, Seen]]:
    """The elements in the queue of all jobs that may not have ended, as the cluster sees them."""
    submissions, _ = folder.journal.submissions()
    open_ = _open(submissions, folder.manifests.done(), folder.journal.outcomes())
    found = _look(folder, cluster, open_)
    return [(s, e) for s in open_ for e in found.get(s.key, {}).values() if not e.ended]


def _open(
    submissions: Iterable[Submission],
    done: Container[Piece],
    outcomes: Container[tuple[str, Piece]],
) -> list[Submission]:
    """Those of which a piece is neither whole nor known to have ended."""
    return [
        s
        for s in submissions
        if any(p not in done and (s.key, p) not in outcomes for p in s.pieces)
    ]


def _look(folder: RunFolder, cluster: Cluster, submissions: Iterable[Submission]) -> Looked:
    return cluster.look([Asked(s.key, _job_folder(folder, s), s.job) for s in submissions])


def _flies(submission: Submission, piece: Piece, found: Looked) -> bool:
    """Whether the element that makes a piece is in the queue."""
    seen = found.get(submission.key, {}).get(submission.element[piece])
    return seen is not None and not seen.ended


def _graph(folder: RunFolder, done: Mapping[Piece, Done]) -> Graph:
    """The graph of what has begun, with iteration 0 and the one up next as they would begin now.

    To what has begun is added what the config asks for since.
    """
    config = folder.config()
    shardings = {k: draws.sharding(folder, k) for k in {0, *folder.graph().shardings}}
    horizon = current_iteration(State(Graph(config, shardings), done))
    if horizon not in shardings:
        shardings[horizon] = draws.sharding(folder, horizon)
    return Graph(config, dict(sorted(shardings.items())))


def _write_down(folder: RunFolder, state: State) -> None:
    """Begin what the state says has begun, and keep what the cluster will forget (MinJobAge)."""
    for k in state.graph.shardings:
        draws.begin(folder, k)
    known = folder.journal.outcomes()
    for (key, piece), end in state.outcomes.items():
        if (key, piece) not in known:
            folder.journal.record(Ended.of(key, piece, end))


def _with_ends(folder: RunFolder, state: State, found: Looked) -> State:
    """The state with what is in flight, what waits and is stuck, and how the others ended."""
    outcomes = dict(state.outcomes)
    in_flight: dict[Piece, str] = {}
    waiting, stuck = set(), []
    for submission in _open(state.submissions, state.done, outcomes):
        for index, element in enumerate(submission.elements):
            now = found.get(submission.key, {}).get(index)
            if now is not None and not now.ended and not now.never:
                in_flight |= dict.fromkeys(element, now.id)
                waiting |= {now.id} if now.reason == DEPENDENCY else set()
                continue
            if now is not None and now.never:
                stuck.append(now.id)
            for piece in element:
                if piece not in state.done and (submission.key, piece) not in outcomes:
                    end = _outcome(folder, submission, element, piece, now)
                    outcomes[submission.key, piece] = end
    return replace(
        state,
        in_flight=in_flight,
        outcomes=outcomes,
        waiting=frozenset(waiting),
        stuck=tuple(stuck),
    )


def _outcome(
    folder: RunFolder,
    submission: Submission,
    element: Sequence[Piece],
    piece: Piece,
    now: Seen | None,
) -> Outcome:
    """How an element ended that left a piece which is not whole: as Slurm says, or as it says."""
    saved = progress.saved(folder, piece)
    if now is not None and now.never:
        waits = now.reason == UNSATISFIED  # for what has failed, and is made again
        why = "" if waits else f"Slurm would never start it: {NEVER[now.reason]} ({now.reason})"
        return Outcome("CANCELLED", (), saved, why)
    how, nodes = (now.state, now.nodes) if now is not None else ("UNKNOWN", ())
    begun = [p for p in element if attempt.began(folder, p, submission.attempt)]
    if begun and piece not in begun:
        how = UNBEGUN
    told, sentence = attempt.told(folder, piece, submission.attempt)
    if told == attempt.STOPPED:
        how = attempt.STOPPED
    return Outcome(how, nodes, saved, sentence if told == attempt.FINAL else "")


def _job_folder(folder: RunFolder, job: Array) -> Path:
    return folder.layout.job(job.iteration, job.stage, job.attempt)
