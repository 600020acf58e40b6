"""The controller: read the run folder and the queue, plan, submit exactly what is missing, exit.

Every start is the same code path: first, next iteration, recovery, restart weeks later. It imports
no torch. On Slurm it is a job of a few seconds that queues its own successor before anything else;
on one machine the same step runs in a loop.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from alt_hpc import process
from alt_hpc.clusters import Cluster, QueueUnknown, Request, SubmissionRefused, Unseen
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.config import Config
from alt_hpc.data import draws
from alt_hpc.errors import InputError
from alt_hpc.graph import Graph, Piece
from alt_hpc.plan import (
    UNBEGUN,
    Dependency,
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

IDLE_CONTROLLERS = 3  # in a row without progress: stop
DEAD_CONTROLLERS = 5  # in a row: stop
BACK_OFF_MINUTES = (1, 5, 30)  # before the first, second, third try after nothing went
RELEASES = 3  # of one job that Slurm held after a failed launch
LOCK_WITHIN_S = 60.0  # how long a controller waits for another one to finish


@dataclass(frozen=True)
class Step:
    """What one pass of the controller did: the plan, and the ids that the next pass waits for."""

    plan: Plan
    waits: tuple[str, ...] = ()
    refused: SubmissionRefused | None = None


def step(folder: RunFolder, cluster: Cluster, horizon: int | None = None) -> Step:
    """Plan and submit once: the iteration that is up next, or all up to `horizon`.

    Raises
    ------
    QueueUnknown
        It could not be learnt what is in flight; nothing was submitted.
    """
    config = folder.config()
    state = read_state(folder, cluster)
    todo = plan(state, cluster.limits(config.cluster, folder.run_id), horizon)
    _write_down(folder, state)
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
    return Step(todo, tuple(w for w in waits if w not in unknown), refused)


def read_state(folder: RunFolder, cluster: Cluster) -> State:
    """The run folder and the queue as one value; writes nothing.

    Iteration 0 and the one up next are there as they would begin now, if they have not.

    Raises
    ------
    QueueUnknown
        It could not be learnt what is in flight.
    """
    submissions, counted_from = folder.journal.submissions()
    shardings = dict(folder.graph().shardings)
    if 0 not in shardings:
        shardings[0] = draws.sharding(folder, 0)
    graph = Graph(folder.config(), dict(sorted(shardings.items())))
    state = State(graph, folder.manifests.done(), submissions, counted_from)
    horizon = current_iteration(state)
    if horizon not in shardings:
        shardings[horizon] = draws.sharding(folder, horizon)
        state = replace(state, graph=Graph(folder.config(), dict(sorted(shardings.items()))))
    state = replace(state, in_flight=flying(submissions, cluster.in_flight(folder.run_id)))
    return replace(state, outcomes=_outcomes(folder, cluster, state))


def _write_down(folder: RunFolder, state: State) -> None:
    """Begin what the state says has begun, and keep what the cluster will forget (MinJobAge)."""
    for k in state.graph.shardings:
        draws.begin(folder, k)
    known = folder.journal.outcomes()
    for (key, piece), end in state.outcomes.items():
        if (key, piece) not in known:
            folder.journal.record(Ended.of(key, piece, end))


def flying(
    submissions: Iterable[Submission], in_flight: dict[str, dict[int, str]]
) -> dict[Piece, str]:
    """The pieces that are being made, with the element that makes each."""
    found: dict[Piece, str] = {}
    for submission in submissions:
        for index, element in in_flight.get(submission.key, {}).items():
            found |= dict.fromkeys(submission.elements[index], element)
    return found


def _outcomes(
    folder: RunFolder, cluster: Cluster, state: State
) -> dict[tuple[str, Piece], Outcome]:
    """How elements ended that are neither whole nor in flight, as written down or found now."""
    known = folder.journal.outcomes()
    for submission in state.submissions[state.counted_from :]:
        lost = [
            piece
            for piece in submission.pieces
            if (submission.key, piece) not in known
            and piece not in state.in_flight
            and piece not in state.done
        ]
        ends = cluster.ends([submission.job]) if lost and submission.job else {}
        for piece in lost:
            index, count = submission.element[piece], len(submission.elements)
            how, nodes = ends.get(
                cluster.element(submission.job or "", index, count), ("UNKNOWN", ())
            )
            mates = submission.elements[index]
            begun = [p for p in mates if attempt.began(folder, p, submission.attempt)]
            if begun and piece not in begun:
                how = UNBEGUN
            known[submission.key, piece] = Outcome(how, nodes, progress.saved(folder, piece))
    return known


def request(folder: RunFolder, config: Config, job: Job) -> Request:
    """A planned job as the cluster sees it."""
    return Request(
        name=f"{folder.path.name}-{job.stage}-{job.iteration}",
        run_id=folder.run_id,
        key=job.key,
        folder=folder.layout.job(job.iteration, job.stage, job.attempt),
        tasks=StageTask.of(folder, job),
        stage=config.cluster.stage(job.stage),
        common=config.cluster,
        threads=config.threads,
        exclude=job.exclude,
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
    script.write_text(f"#!/bin/bash\n# a controller of this run\n{command}\n")
    return script


def queue_controller(folder: RunFolder, slurm: Slurm, after: str) -> str:
    """Queue a controller of this run; returns its job id."""
    script, log = write_script(folder), folder.layout.controller_log()
    common = folder.config().cluster
    job = slurm.submit_controller(script, log, folder.path.name, folder.run_id, common, after)
    folder.journal.record(Queued(job=job))
    return job


def run_on_slurm(folder: RunFolder) -> int:
    """One controller job, from its start to its end; returns its exit status."""
    me = process.job()
    folder.check_owner()
    if folder.ended():
        print(folder.ended())
        return 0
    if not available():
        return _conclude(folder)
    slurm = Slurm()
    try:
        lock = folder.layout.controller_lock
        with folder.only_one(lock, LOCK_WITHIN_S):  # two may have been started at once
            return _run_on_slurm(folder, slurm, me)
    except OSError as error:  # a full disk, say: each successor would die of it in turn
        slurm.cancel(*(job for job in slurm.controllers(folder.run_id) if job != me))
        print(f"stopped: {error}; submit again when it is mended", file=sys.stderr, flush=True)
        return 1


def _run_on_slurm(folder: RunFolder, slurm: Slurm, me: str) -> int:
    try:
        successor = _successor(folder, slurm, me)
    except SubmissionRefused as error:  # nothing has been submitted yet; submitting again is safe
        folder.end("STOPPED", f"stopped: Slurm refused the next controller: {error}")
        print(folder.ended(), file=sys.stderr, flush=True)
        return 1
    if _died(folder) > DEAD_CONTROLLERS:
        why = f"{DEAD_CONTROLLERS} controllers in a row died before they had submitted all"
        return _stop(folder, slurm, successor, why)
    try:
        _release(folder, slurm)
        done = step(folder, slurm)
    except QueueUnknown as error:
        return _back_off(folder, slurm, successor, str(error))
    if done.plan.finished:
        folder.end("FINISHED", "the run is finished")
        slurm.cancel(successor)
        return 0
    if done.plan.stop:
        return _stop(folder, slurm, successor, done.plan.stop)
    if done.refused and done.refused.kind == "wrong":
        return _stop(folder, slurm, successor, f"Slurm would not take a job: {done.refused}")
    made = len(folder.manifests.done()), len(folder.journal.of(Submitted))
    folder.journal.record(Stepped(progress=made, waits=done.waits))
    if not done.waits:
        why = f"sbatch refused a job: {done.refused}" if done.refused else "no room for a job"
        return _back_off(folder, slurm, successor, why)
    if _idle(folder):
        return _stop(
            folder, slurm, successor, f"{IDLE_CONTROLLERS} controllers in a row without progress"
        )
    slurm.depend(successor, f"afterany:{':'.join(done.waits)},singleton")
    return 0


def _release(folder: RunFolder, slurm: Slurm) -> None:
    """Let go what Slurm holds because a node could not launch it, a few times each.

    What a person holds stays held.
    """
    released = [entry.job for entry in folder.journal.of(Released)]
    for job, why in slurm.held(folder.run_id).items():
        if "launch failed" in why and released.count(job) < RELEASES:
            folder.journal.record(Released(job=job))
            slurm.release(job)


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
        folder.end("FINISHED", "the run is finished")
        return 0
    missing = todo.jobs[0].pieces[0] if todo.jobs else todo.stop
    sentence = f"stopped: {missing} is not whole, and sbatch is not on this node; submit again"
    folder.end("STOPPED", f"{sentence} to go on; logs are in {folder.layout.jobs}")
    print(sentence, file=sys.stderr, flush=True)
    return 1


def _successor(folder: RunFolder, slurm: Slurm, me: str) -> str:
    """The controller after this one: one that waits already, or a new one."""
    try:
        waiting = [j for j, s in slurm.controllers(folder.run_id).items() if s == "PENDING"]
    except QueueUnknown:
        waiting = []
    others = [job for job in waiting if job != me]
    for extra in others[1:]:
        slurm.cancel(extra)
    return others[0] if others else queue_controller(folder, slurm, f"afterany:{me}" if me else "")


def _back_off(folder: RunFolder, slurm: Slurm, successor: str, why: str) -> int:
    """Nothing could be submitted: the successor tries again in a while, a few times."""
    folder.journal.record(Stepped(progress=None, waits=()))
    if _idle(folder):
        return _stop(folder, slurm, successor, why)
    minutes = BACK_OFF_MINUTES[min(_backed_off(folder), len(BACK_OFF_MINUTES)) - 1]
    print(f"{why}; trying again in {minutes} min", flush=True)
    slurm.start_after(successor, minutes)
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
    last = steps[-IDLE_CONTROLLERS - 1 :]
    return len(last) > IDLE_CONTROLLERS and all(step == last[0] for step in last)


def _died(folder: RunFolder) -> int:
    """How many controllers have been queued since one last came to its end."""
    since = folder.journal.since(lambda entry: isinstance(entry, Submit | Stepped))
    return len([entry for entry in since if isinstance(entry, Queued)])


def _stop(folder: RunFolder, slurm: Slurm, successor: str, why: str) -> int:
    sentence = f"stopped: {why}; logs are in {folder.layout.jobs}; submit again to go on"
    folder.end("STOPPED", sentence)
    print(sentence, file=sys.stderr, flush=True)
    slurm.cancel(successor)
    return 1
