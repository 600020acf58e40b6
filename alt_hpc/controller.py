"""The controller: read the run folder and the queue, plan, submit exactly what is missing, exit.

Every start is the same code path: first, next iteration, recovery, restart weeks later. It imports
no torch. On Slurm it is a job of a few seconds that queues its own successor before anything else;
on one machine the same step runs in a loop.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alt_hpc import process
from alt_hpc.clusters import (
    NEVER,
    Asked,
    Cluster,
    QueueUnknown,
    Request,
    Seen,
    SubmissionRefused,
    Unseen,
)
from alt_hpc.clusters.queue import PATIENCE_S
from alt_hpc.clusters.slurm import Slurm, available, imports
from alt_hpc.config import Config
from alt_hpc.data import draws
from alt_hpc.errors import InputError
from alt_hpc.graph import Graph, Piece
from alt_hpc.plan import (
    UNBEGUN,
    Array,
    Dependency,
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
from alt_hpc.run.journal import (
    Ended,
    Entry,
    Intent,
    Queued,
    Refused,
    Released,
    Stepped,
    Submit,
    Submitted,
)
from alt_hpc.task import StageTask

DEPENDENCY, UNSATISFIED = "Dependency", "DependencyNeverSatisfied"  # Slurm's reasons
IDLE_CONTROLLERS = 3  # in a row that could submit nothing, with nothing in flight: stop
UNKNOWN_CONTROLLERS = 40  # in a row that Slurm did not answer: stop, after about a day
DEAD_CONTROLLERS = 5  # in a row: stop
BACK_OFF_MINUTES = (1, 5, 30)  # before the first, second, third try after nothing went
RELEASES = 3  # of one job that Slurm held after a failed launch
LOCK_WITHIN_S = 60.0  # how long a controller waits for another one to finish


@dataclass(frozen=True)
class Step:
    """What one pass of the controller did: the plan, and the ids that the next pass waits for.

    `waiting` are the elements in the queue that wait for others.
    """

    plan: Plan
    waits: tuple[str, ...] = ()
    refused: SubmissionRefused | None = None
    waiting: frozenset[str] = frozenset()


def step(folder: RunFolder, cluster: Cluster, horizon: int | None = None) -> Step:
    """Plan and submit once: the iteration that is up next, or all up to `horizon`.

    Raises
    ------
    QueueUnknown
        It could not be learnt what is in flight; nothing was submitted.
    """
    config = folder.config()
    state = read_state(folder, cluster)
    todo = plan(state, cluster.limits(config.cluster, scripts(folder)), horizon)
    _write_down(folder, state)
    cluster.cancel(*state.stuck)
    ids: dict[str, str] = {}
    refused = None
    for job in todo.jobs:
        after = [_resolved(dependency, ids) for dependency in job.after]
        folder.journal.record(Intent.of(job))
        make_private(folder.layout.jobs)
        make_private(folder.layout.job(job.iteration, job.stage, job.attempt))
        try:
            ids[job.key] = cluster.submit(request(folder, config, job), after)
        except SubmissionRefused as error:
            refused = error
            folder.journal.record(Refused(key=job.key, why=str(error), kind=error.kind))
            break
        folder.journal.record(Submitted(key=job.key, job=ids[job.key]))
        print(f"submitted {job.key} as {ids[job.key]} ({len(job.elements)} tasks)", flush=True)
    waits = tuple(ids.get(target, target) for target in todo.wait_for)
    submitted = {job.key for job in todo.jobs if job.key in ids}
    unknown = {job.key for job in todo.jobs} - submitted
    waits = tuple(target for target in waits if target not in unknown)
    return Step(todo, waits, refused, state.waiting)


def read_state(folder: RunFolder, cluster: Cluster) -> State:
    """The run folder and the queue as one value; writes nothing.

    Iteration 0 and the one up next are there as they would begin now, if they have not.

    Raises
    ------
    QueueUnknown
        It could not be learnt what is in flight.
    """
    submissions, counted_from = folder.journal.submissions()
    done, outcomes = folder.manifests.done(), folder.journal.outcomes()
    open_ = _open(submissions, done, outcomes)
    looked = _look(folder, cluster, open_)
    # What has ended by now may have become whole after we looked for manifests.
    ended = [p for s in open_ for p in s.pieces if p not in done and not _flies(s, p, looked)]
    done |= folder.manifests.done(ended)
    graph, stale = _graph(folder, done), folder.manifests.stale(done)
    state = State(graph, done, submissions, counted_from, outcomes=outcomes, stale=stale)
    return _seen(folder, state, looked)


Looked = Mapping[str, Mapping[int, Seen]]  # by the keys of jobs, and the indices of elements


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


def _flies(submission: Submission, piece: Piece, looked: Looked) -> bool:
    """Whether the element that makes a piece is in the queue."""
    seen = looked.get(submission.key, {}).get(submission.element[piece])
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


def scripts(folder: RunFolder) -> Path:
    """Where the script of this run's controllers lies."""
    return folder.layout.controller_script().parent


def _write_down(folder: RunFolder, state: State) -> None:
    """Begin what the state says has begun, and keep what the cluster will forget (MinJobAge)."""
    for k in state.graph.shardings:
        draws.begin(folder, k)
    known = folder.journal.outcomes()
    for (key, piece), end in state.outcomes.items():
        if (key, piece) not in known:
            folder.journal.record(Ended.of(key, piece, end))


def _seen(folder: RunFolder, state: State, looked: Looked) -> State:
    """The state with what is in flight, what waits and is stuck, and how the others ended."""
    outcomes = dict(state.outcomes)
    in_flight: dict[Piece, str] = {}
    waiting, stuck = set(), []
    for submission in _open(state.submissions, state.done, outcomes):
        seen = looked.get(submission.key, {})
        for index, element in enumerate(submission.elements):
            now = seen.get(index)
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


def _job_folder(folder: RunFolder, job: Array) -> Path:
    return folder.layout.job(job.iteration, job.stage, job.attempt)


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
    )


def _resolved(dependency: Dependency, ids: dict[str, str]) -> Dependency:
    return replace(dependency, target=ids.get(dependency.target, dependency.target))


# ---------------------------------------------------------------------- on Slurm


def write_script(folder: RunFolder) -> Path:
    """The batch script of this run's controllers; its options stand on sbatch's command line."""
    script = folder.layout.controller_script()
    make_private(folder.layout.jobs)
    make_private(script.parent)
    python, run = shlex.quote(sys.executable), shlex.quote(str(folder.path))
    command = f"exec {python} -m alt_hpc controller {run}"
    lines = ["#!/bin/bash", "# a controller of this run", *imports(folder.layout.code), command]
    script.write_text("\n".join(lines) + "\n")
    return script


def queue_controller(folder: RunFolder, slurm: Slurm, after: str) -> str:
    """Queue a controller of this run; returns its job id."""
    script, log = write_script(folder), folder.layout.controller_log()
    common = folder.config().cluster
    job = slurm.submit_controller(script, log, folder.path.name, folder.run_id, common, after)
    folder.journal.record(Queued(job=job))
    return job


def run_on_slurm(folder: RunFolder) -> int:
    """One controller job, from its start to its end; returns its exit status.

    Whatever ends it for good is written where `status` finds it.
    """
    me = process.job()
    folder.check_owner()
    if folder.ended():
        print(folder.ended())
        return 0
    if not available():
        return _conclude(folder)
    slurm = Slurm(PATIENCE_S)
    try:
        lock = folder.layout.controller_lock
        with folder.only_one(lock, LOCK_WITHIN_S):  # two may have been started at once
            return _run_on_slurm(folder, slurm, me)
    except InputError as error:
        return _stop(folder, slurm, _others(folder, slurm, me), str(error))
    except OSError as error:  # a full disk, say: each successor would die of it in turn
        slurm.cancel(*_others(folder, slurm, me))
        print(f"stopped: {error}; submit again when it is mended", file=sys.stderr, flush=True)
        return 1


def _others(folder: RunFolder, slurm: Slurm, me: str) -> list[str]:
    """The run's other controllers, as far as Slurm tells."""
    try:
        return [job for job in slurm.controllers(scripts(folder)) if job != me]
    except QueueUnknown:
        return []


def _run_on_slurm(folder: RunFolder, slurm: Slurm, me: str) -> int:
    try:
        successor = _successor(folder, slurm, me)
    except SubmissionRefused as error:  # nothing has been submitted yet; submitting again is safe
        folder.end("STOPPED", f"stopped: Slurm refused the next controller: {error}")
        print(folder.ended(), file=sys.stderr, flush=True)
        return 1
    if _died(folder) > DEAD_CONTROLLERS:
        why = f"{DEAD_CONTROLLERS} controllers in a row died before they had submitted all"
        return _stop(folder, slurm, [successor], why)
    try:
        return _step_on_slurm(folder, slurm, successor)
    except QueueUnknown as error:
        return _back_off(folder, slurm, successor, str(error), unknown=True)


def _step_on_slurm(folder: RunFolder, slurm: Slurm, successor: str) -> int:
    _release(folder, slurm)
    done = step(folder, slurm)
    if done.plan.finished:
        folder.end("FINISHED", finish(done.plan))
        slurm.cancel(successor)
        return 0
    if done.plan.stop:  # what runs keeps what it finishes, what waits would never be used
        return _stop(folder, slurm, [successor, *sorted(done.waiting)], done.plan.stop)
    if done.refused and done.refused.kind == "wrong":
        why = f"Slurm would not take a job: {done.refused}"
        return _stop(folder, slurm, [successor], why)
    if not done.waits:
        why = f"sbatch refused a job: {done.refused}" if done.refused else "no room for a job"
        return _back_off(folder, slurm, successor, why)
    made = len(folder.manifests.done()), len(folder.journal.of(Submitted))
    folder.journal.record(Stepped(progress=made, waits=done.waits))
    slurm.depend(successor, f"afterany:{':'.join(done.waits)},singleton")
    if _idle(folder):  # what is in flight has not ended, though Slurm lets us go on
        slurm.start_after(successor, BACK_OFF_MINUTES[0])
    return 0


def finish(done: Plan) -> str:
    """The sentence of a run that has come to its end."""
    return "; but ".join(["the run is finished", *done.given_up.values()])


def _release(folder: RunFolder, slurm: Slurm) -> None:
    """Let go what Slurm holds because a node could not launch it, a few times each.

    What a person holds stays held.
    """
    released = [entry.job for entry in folder.journal.of(Released)]
    for job, why in held(looked(folder, slurm)).items():
        if "launch failed" in why and released.count(job) < RELEASES:
            folder.journal.record(Released(job=job))
            slurm.release(job)


def looked(folder: RunFolder, cluster: Cluster) -> list[tuple[Submission, Seen]]:
    """The elements in the queue of all jobs that may not have ended, as Slurm sees them."""
    submissions, _ = folder.journal.submissions()
    open_ = _open(submissions, folder.manifests.done(), folder.journal.outcomes())
    found = _look(folder, cluster, open_)
    return [(s, e) for s in open_ for e in found.get(s.key, {}).values() if not e.ended]


def check_cluster(folder: RunFolder, slurm: Slurm) -> None:
    """Stop where another cluster answers than the one that has the run's jobs.

    It would know none of their ids, and all would be submitted a second time.
    """
    theirs = [entry.cluster for entry in folder.journal.of(Submit) if entry.cluster]
    here = slurm.name()
    if theirs and theirs[-1] != here and not folder.ended():
        raise InputError(
            f"{folder.path}: its jobs are on cluster '{theirs[-1]}', but '{here}' answers here"
            f" ({', '.join(process.OF_THE_USER)})",
            "run",
        )


def held(found: Iterable[tuple[Submission, Seen]]) -> dict[str, str]:
    """Those elements in the queue that will not start by themselves, with Slurm's reason."""
    return {
        element.id: element.reason.replace("_", " ")
        for _, element in found
        if element.state == "PENDING" and "held" in element.reason.lower()
    }


def presubmit(folder: RunFolder, slurm: Slurm) -> str:
    """Submit all iterations at once, for sites whose nodes have no sbatch; returns the last job.

    That last job only concludes. What fails takes what depends on it along; what Slurm requeues
    itself goes on.
    """
    config = folder.config()
    for k in range(1, config.iterations + 1):
        draws.begin(folder, k)
    done = step(folder, slurm, config.iterations)
    if done.plan.stop or done.refused:
        slurm.cancel(*done.waits)
        raise InputError(f"cluster.chain: {done.plan.stop or done.refused}")
    return queue_controller(folder, slurm, f"afterany:{':'.join(done.waits)}" if done.waits else "")


def _conclude(folder: RunFolder) -> int:
    """Say how a presubmitted chain ended, on a node that can submit nothing."""
    todo = plan(read_state(folder, Unseen()))
    if todo.finished:
        folder.end("FINISHED", finish(todo))
        return 0
    missing = todo.jobs[0].pieces[0] if todo.jobs else todo.stop
    sentence = f"stopped: {missing} is not whole, and sbatch is not on this node; submit again"
    folder.end("STOPPED", f"{sentence} to go on; logs are in {folder.layout.jobs}")
    print(sentence, file=sys.stderr, flush=True)
    return 1


def _successor(folder: RunFolder, slurm: Slurm, me: str) -> str:
    """The controller after this one: one that waits already, or a new one."""
    try:
        found = slurm.controllers(scripts(folder))
        waiting = [job for job, state in found.items() if state == "PENDING"]
    except QueueUnknown:
        waiting = []
    others = [job for job in waiting if job != me]
    for extra in others[1:]:
        slurm.cancel(extra)
    return others[0] if others else queue_controller(folder, slurm, f"afterany:{me}" if me else "")


def _back_off(
    folder: RunFolder, slurm: Slurm, successor: str, why: str, *, unknown: bool = False
) -> int:
    """Nothing could be submitted: the successor tries again in a while, a few times.

    More often where Slurm does not answer (`unknown`), as jobs of the run may be in flight.
    """
    folder.journal.record(Stepped(progress=None, waits=()))
    tries = _backed_off(folder)
    if tries > (UNKNOWN_CONTROLLERS if unknown else IDLE_CONTROLLERS):
        return _stop(folder, slurm, [successor], why)
    minutes = BACK_OFF_MINUTES[min(tries, len(BACK_OFF_MINUTES)) - 1]
    print(f"{why}; trying again in {minutes} min", flush=True)
    try:
        slurm.start_after(successor, minutes)
    except QueueUnknown as error:  # then the successor waits for us alone
        print(f"{error}; waiting here", flush=True)
        time.sleep(60 * minutes)
    return 0


def _backed_off(folder: RunFolder) -> int:
    """How many controllers in a row, up to now, could submit nothing."""

    def came_further(entry: Entry) -> bool:
        return isinstance(entry, Submit) or (
            isinstance(entry, Stepped) and entry.progress is not None
        )

    return len([e for e in folder.journal.since(came_further) if isinstance(e, Stepped)])


def _idle(folder: RunFolder) -> bool:
    """Whether the last controllers found and did nothing new."""
    since = folder.journal.since(lambda entry: isinstance(entry, Submit))
    steps = [entry.progress for entry in since if isinstance(entry, Stepped)]
    last = steps[-IDLE_CONTROLLERS:]
    return len(last) == IDLE_CONTROLLERS and all(step == last[0] for step in last)


def _died(folder: RunFolder) -> int:
    """How many controllers have been queued since one last came to its end."""
    since = folder.journal.since(lambda entry: isinstance(entry, Submit | Stepped))
    return len([entry for entry in since if isinstance(entry, Queued)])


def _stop(folder: RunFolder, slurm: Slurm, cancel: Sequence[str], why: str) -> int:
    sentence = f"stopped: {why}; logs are in {folder.layout.jobs}; submit again to go on"
    folder.end("STOPPED", sentence)
    print(sentence, file=sys.stderr, flush=True)
    slurm.cancel(*cancel)
    return 1
