"""One step of a controller: read the run folder and the queue, plan, submit what is missing.

Every start is the same code path: first, next iteration, recovery, restart weeks later. It imports
no torch. On Slurm `chain` takes the steps, in jobs of a few seconds; on one machine `start` does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from alt_hpc.clusters.cluster import NEVER, Asked, Cluster, Request, Seen, SubmissionRefused
from alt_hpc.config import Config
from alt_hpc.data import draws
from alt_hpc.graph import Graph, Piece
from alt_hpc.plan import UNBEGUN, Job, Outcome, Plan, State, Submission, current_iteration, plan
from alt_hpc.run import attempt, progress
from alt_hpc.run.files import make_private
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Ended, Intent, Submitted
from alt_hpc.task import StageTask

Looked = list[tuple[Submission, tuple[Piece, ...], Seen | None]]  # an element and its pieces
DEPENDENCY, UNSATISFIED = "Dependency", "DependencyNeverSatisfied"  # Slurm's reasons


@dataclass(frozen=True)
class Step:
    """What a step did."""

    plan: Plan
    submitted: Mapping[str, str]  # ids of new jobs, by key
    waits: tuple[str, ...]  # what the next step waits for
    refused: SubmissionRefused | None
    waiting: frozenset[str]  # elements in the queue that wait for others


def step(folder: RunFolder, cluster: Cluster, horizon: int | None = None) -> Step:
    """Plan and submit once: the iteration that is up next, or all up to `horizon`.

    QueueUnknown where it could not be learnt what is in flight; nothing was submitted.
    """
    config = folder.config()
    state = read_state(folder, cluster)
    todo = plan(state, cluster.limits(config.cluster, scripts(folder)), horizon)
    for k in state.graph.shardings:
        draws.begin(folder, k)
    known = folder.journal.outcomes()
    for (key, piece), end in state.outcomes.items():
        if (key, piece) not in known:  # the cluster will forget (MinJobAge)
            folder.journal.record(Ended.of(key, piece, end))
    cluster.cancel(*state.stuck)
    ids: dict[str, str] = {}  # of new jobs, by key
    refused = None
    for job in todo.jobs:
        asked = cluster.spared(request(folder, config, job))
        after = [replace(d, target=ids.get(d.target, d.target)) for d in job.after]
        folder.journal.record(Intent.of(job))
        make_private(folder.layout.jobs)
        make_private(asked.folder)
        try:
            ids[job.key] = cluster.submit(asked, after)
        except SubmissionRefused as error:
            refused = error
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


def read_state(folder: RunFolder, cluster: Cluster) -> State:
    """The run folder and the queue as one value; writes nothing.

    Iteration 0 and the one up next are there as they would begin now, if they have not.
    QueueUnknown where it could not be learnt what is in flight.
    """
    state = _written(folder)
    found = _look(folder, cluster, state)
    # What has ended by now may have become whole after we looked for manifests.
    ended = [p for *_, pieces, now in found if now is None or now.ended for p in pieces]
    state = replace(state, done={**state.done, **folder.manifests.done(ended)})
    in_flight: dict[Piece, str] = {}
    outcomes, seen = dict(state.outcomes), []
    for tried, pieces, now in found:
        if all(_made(state, tried, piece) for piece in pieces):
            continue  # it may not have left the queue yet
        seen += [now] if now is not None else []
        if now is not None and not now.ended and not now.never:
            in_flight |= dict.fromkeys(pieces, now.id)
            continue
        for piece in _unknown(state, tried, pieces):
            outcomes[tried.key, piece] = _outcome(folder, tried, piece, now)
    return replace(
        state,
        graph=_graph(folder, state),
        in_flight=in_flight,
        outcomes=outcomes,
        waiting=frozenset(e.id for e in seen if e.reason == DEPENDENCY and not e.ended),
        stuck=tuple(e.id for e in seen if e.never),
        stale=folder.manifests.stale(state.done),
    )


def looked(folder: RunFolder, cluster: Cluster) -> dict[str, Seen]:
    """The elements in the queue of all jobs that may not have ended, by their ids."""
    found = _look(folder, cluster, _written(folder))
    return {now.id: now for *_, now in found if now is not None and not now.ended}


def _written(folder: RunFolder) -> State:
    """What the run folder says; nothing is known of the queue."""
    graph, done, outcomes = folder.graph(), folder.manifests.done(), folder.journal.outcomes()
    return State(graph, done, *folder.journal.submissions(), outcomes=outcomes)


def _made(state: State, tried: Submission, piece: Piece) -> bool:
    """Whether a piece counts that a submission, or a later one, has made."""
    return piece in state.done and state.done[piece].attempt >= tried.attempt


def _unknown(state: State, tried: Submission, pieces: Iterable[Piece]) -> list[Piece]:
    """Those that are neither made nor known to have ended."""
    left = [piece for piece in pieces if (tried.key, piece) not in state.outcomes]
    return [piece for piece in left if not _made(state, tried, piece)]


def _look(folder: RunFolder, cluster: Cluster, state: State) -> Looked:
    """Elements, as seen now, of jobs that may not have ended."""
    unknown = [tried for tried in state.submissions if _unknown(state, tried, tried.pieces)]
    found = cluster.look([Asked(s.key, _job_folder(folder, s), s.job) for s in unknown])
    return [
        (tried, pieces, found.get(tried.key, {}).get(index))
        for tried in unknown
        for index, pieces in enumerate(tried.elements)
    ]


def _outcome(folder: RunFolder, tried: Submission, piece: Piece, now: Seen | None) -> Outcome:
    """How an element ended that left a piece which is not whole: as Slurm says, or as it says."""
    saved, now = progress.saved(folder, piece), now or Seen("", "UNKNOWN")
    if now.never:
        waits = now.reason == UNSATISFIED  # for what has failed, and is made again
        why = "" if waits else f"Slurm would never start it: {NEVER[now.reason]} ({now.reason})"
        return Outcome("CANCELLED", (), saved, why)
    how, sentence = attempt.told(folder, piece, tried.attempt)
    if how == attempt.STOPPED:
        return Outcome(how, now.nodes, saved)
    mates = tried.elements[tried.element[piece]]
    begun = [mate for mate in mates if attempt.began(folder, mate, tried.attempt)]
    state = UNBEGUN if begun and piece not in begun else now.state
    return Outcome(state, now.nodes, saved, sentence if how == attempt.FINAL else "")


def _graph(folder: RunFolder, state: State) -> Graph:
    """The graph of what has begun and of what the config asks for since.

    With iteration 0 and the one up next as they would begin now.
    """
    config = folder.config()
    shardings = {k: draws.sharding(folder, k) for k in {0, *state.graph.shardings}}
    up_next = current_iteration(replace(state, graph=Graph(config, shardings)))
    shardings[up_next] = draws.sharding(folder, up_next)
    return Graph(config, dict(sorted(shardings.items())))


def _job_folder(folder: RunFolder, job: Job | Submission) -> Path:
    return folder.layout.job(job.iteration, job.stage, job.attempt)
