"""One step of a controller: read the run folder and the queue, plan, submit what is missing.

Every start is the same code path: first, next iteration, recovery, restart weeks later. It imports
no torch. On Slurm `chain` takes the steps, in jobs of a few seconds; on one machine `start` does.
"""

from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

from alt_hpc import plan as plans
from alt_hpc.clusters.cluster import NEVER, Asked, Cluster, Request, Seen, SubmissionRefused
from alt_hpc.config import Config
from alt_hpc.data import draws
from alt_hpc.graph import REPORT, WIN_RATES, Graph, Piece
from alt_hpc.plan import Dependency, Job, Outcome, Plan, State, Submission
from alt_hpc.run import attempt
from alt_hpc.run.files import make_private
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Ended, Intent, Submitted
from alt_hpc.task import StageTask

Looked = list[tuple[Submission, tuple[Piece, ...], Seen]]  # an element, as it is now
UNSEEN = Seen("", "UNKNOWN")  # the cluster does not know it (any more)


@dataclass(frozen=True)
class Step:
    """What a step did."""

    plan: Plan
    waits: tuple[str, ...]  # what the next step waits for
    refused: SubmissionRefused | None
    waiting: frozenset[str]  # elements in the queue that wait for others


def step(folder: RunFolder, cluster: Cluster, horizon: int | None = None) -> Step:
    """Plan and submit what is up next, or up to `horizon`; QueueUnknown: nothing was submitted."""
    config = folder.config()
    state = read_state(folder, cluster)
    todo = plans.plan(state, cluster.limits(config.cluster, scripts(folder)), horizon)
    for k in state.graph.shardings:
        draws.begin(folder, k)
    known = folder.journal.outcomes()
    for (key, piece), end in state.outcomes.items():
        if (key, piece) not in known:  # the cluster will forget (MinJobAge)
            folder.journal.record(Ended(key=key, piece=astuple(piece), **asdict(end)))
    cluster.cancel(*state.stuck)
    ids, refused = dict[str, str](), None  # ids of new jobs, by key
    for job in todo.jobs:
        asked = cluster.spared(request(folder, config, job))
        after = [Dependency(d.kind, ids.get(d.target, d.target)) for d in job.after]
        folder.journal.record(Intent.of(job))
        make_private(folder.layout.jobs)
        make_private(asked.folder)
        try:
            ids[job.key] = cluster.submit(asked, after)
        except SubmissionRefused as error:
            refused = error
            break
        folder.journal.record(Submitted(key=job.key, job=ids[job.key]))
        if config.cluster.backend == "slurm":  # the log of a controller
            print(f"submitted {job.key} as {ids[job.key]} ({len(job.elements)} tasks)", flush=True)
    missed = {job.key for job in todo.jobs} - ids.keys()
    waits = tuple(ids.get(target, target) for target in todo.wait_for if target not in missed)
    return Step(todo, waits, refused, state.waiting)


def request(folder: RunFolder, config: Config, job: Job) -> Request:
    """A planned job as the cluster sees it."""
    shards = [tuple(piece.shard for piece in element) for element in job.elements]
    tasks = [StageTask(str(folder.path), job.stage, job.iteration, s, job.attempt) for s in shards]
    return Request(
        name=f"{folder.path.name}-{job.stage}-{job.iteration}",
        run_id=folder.run_id,
        key=job.key,
        folder=folder.layout.job(job.iteration, job.stage, job.attempt),
        tasks=tasks,
        stage=config.cluster.stage(job.stage),
        common=config.cluster,
        threads=config.threads,
        exclude=job.exclude,
        code=folder.layout.code,
        side=job.stage not in folder.graph().needed_by_training(),
        last=job.stage in (REPORT, WIN_RATES),
        warm=True,
    )


def scripts(folder: RunFolder) -> Path:
    """Where the script of this run's controllers lies."""
    return folder.layout.controller_script.parent


def finish(done: Plan) -> str:
    """The sentence of a run that has come to its end."""
    return "; but ".join(["the run is finished", *done.given_up.values()])


def read_state(folder: RunFolder, cluster: Cluster) -> State:
    """The run folder and the queue (else QueueUnknown) as one value; writes nothing.

    Iteration 0 and the one up next are there as they would begin now, if they have not.
    """
    state, found = _look(folder, cluster)
    # What has ended by now may have become whole after we looked for manifests.
    ended = [p for *_, pieces, now in found if now is UNSEEN or now.ended for p in pieces]
    well = [p for *_, pieces, now in found if now.state == "COMPLETED" for p in pieces]
    done = {**folder.manifests.done(ended), **folder.manifests.look_again(well)}
    state = replace(state, done={**state.done, **done})
    in_flight: dict[Piece, str] = {}
    outcomes, seen = dict(state.outcomes), []
    for tried, pieces, now in found:
        left = [piece for piece in pieces if not _made(state, tried, piece)]
        if not left:
            continue  # it may not have left the queue yet
        seen.append(now)
        if now is not UNSEEN and not now.ended and not now.never:
            in_flight |= dict.fromkeys(pieces, now.id)
            continue
        for piece in left:
            if (tried.key, piece) not in outcomes:
                outcomes[tried.key, piece] = _outcome(folder, tried, piece, now)
    config = folder.config()
    shardings = {k: draws.sharding(folder, k) for k in {0, *state.graph.shardings}}
    up_next = plans.current_iteration(replace(state, graph=Graph(config, shardings)))
    shardings[up_next] = draws.sharding(folder, up_next)
    return replace(
        state,
        graph=Graph(config, dict(sorted(shardings.items()))),
        in_flight=in_flight,
        outcomes=outcomes,
        waiting=frozenset(e.id for e in seen if e.reason == "Dependency" and not e.ended),
        stuck=tuple(e.id for e in seen if e.never),
        stale=folder.manifests.stale(state.done),
    )


def looked(folder: RunFolder, cluster: Cluster) -> dict[str, Seen]:
    """The elements in the queue of all jobs that may not have ended, by their ids."""
    _, found = _look(folder, cluster)
    return {now.id: now for *_, now in found if now is not UNSEEN and not now.ended}


def _look(folder: RunFolder, cluster: Cluster) -> tuple[State, Looked]:
    """What the run folder says; and elements, as seen now, of jobs that may not have ended."""
    graph, done, outcomes = folder.graph(), folder.manifests.done(), folder.journal.outcomes()
    state = State(graph, done, *folder.journal.submissions(), outcomes=outcomes)
    unknown = [
        tried
        for tried in state.submissions
        if any((tried.key, p) not in outcomes and not _made(state, tried, p) for p in tried.pieces)
    ]
    found = cluster.look(
        [Asked(s.key, folder.layout.job(s.iteration, s.stage, s.attempt), s.job) for s in unknown]
    )
    elements = ((tried, *about) for tried in unknown for about in enumerate(tried.elements))
    return state, [(s, pieces, found.get(s.key, {}).get(i, UNSEEN)) for s, i, pieces in elements]


def _made(state: State, tried: Submission, piece: Piece) -> bool:
    """Whether a piece counts that a submission, or a later one, has made."""
    return piece in state.done and state.done[piece].attempt >= tried.attempt


def _outcome(folder: RunFolder, tried: Submission, piece: Piece, now: Seen) -> Outcome:
    """How an element ended that left a piece which is not whole: as Slurm says, or as it says."""
    saved = attempt.saved(folder, piece)
    if now.never:
        waits = now.reason == "DependencyNeverSatisfied"  # for what has failed, and is made again
        why = "" if waits else f"Slurm would never start it: {NEVER[now.reason]} ({now.reason})"
        return Outcome("CANCELLED", (), saved, why)
    how, sentence = attempt.told(folder, piece, tried.attempt)
    if how == attempt.STOPPED:
        return Outcome(how, now.nodes, saved)
    mates = tried.elements[tried.element[piece]]
    begun = [mate for mate in mates if folder.layout.attempt(mate, tried.attempt).exists()]
    state = plans.UNBEGUN if begun and piece not in begun else now.state
    told = {attempt.FINAL: {"sentence": sentence}, attempt.FAILED: {"error": sentence}}
    return Outcome(state, now.nodes, saved, **told.get(how, {}))
