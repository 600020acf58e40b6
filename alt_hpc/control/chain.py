"""The chain of controllers on Slurm: jobs of a few seconds, each of which queues its successor."""

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from alt_hpc import process
from alt_hpc.clusters.cluster import QueueUnknown, Seen, SubmissionRefused, Unseen
from alt_hpc.clusters.queue import PATIENCE_S
from alt_hpc.clusters.script import imports
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.control.step import Step, finish, looked, read_state, scripts, step
from alt_hpc.data import draws
from alt_hpc.errors import InputError
from alt_hpc.plan import plan
from alt_hpc.run.files import make_private
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Queued, Released, Stepped, Submit, Submitted

IDLE_CONTROLLERS = 3  # in a row that could submit nothing, with nothing in flight: stop
UNKNOWN_CONTROLLERS = 40  # in a row that Slurm did not answer: stop, after about a day
DEAD_CONTROLLERS = 5  # in a row: stop
BACK_OFF_MINUTES = (1, 5, 30)  # before the first, second, third try after nothing went
RELEASES = 3  # of one job that Slurm held after a failed launch
LOCK_WITHIN_S = 60.0  # how long a controller waits for another one to finish


def run(folder: RunFolder) -> int:
    """One controller job; returns its exit status. What ends the run `status` finds written."""
    folder.check_owner()
    if folder.ended():
        print(folder.ended())
        return 0
    if not available():  # a presubmitted chain is at its end, on a node that can submit nothing
        todo = plan(read_state(folder, Unseen()))
        if todo.finished:
            folder.end("FINISHED", finish(todo))
            return 0
        missing = todo.jobs[0].pieces[0] if todo.jobs else todo.stop
        return _stop(folder, f"{missing} is not whole, and sbatch is not on this node")
    chain = Chain(folder, Slurm(PATIENCE_S), process.job())
    try:
        with folder.only_one(folder.layout.controller_lock, LOCK_WITHIN_S):  # two at once, perhaps
            return chain.go_on()
    except InputError as error:
        return chain.stop(str(error))
    except OSError as error:  # a full disk, say: each successor would die of it in turn
        chain.cancel_others()
        print(f"stopped: {error}; submit again when it is mended", file=sys.stderr, flush=True)
        return 1


def _stop(folder: RunFolder, why: str) -> int:
    """End the run with a sentence."""
    sentence = f"stopped: {why}; logs are in {folder.layout.jobs}; submit again to go on"
    folder.end("STOPPED", sentence)
    print(sentence, file=sys.stderr, flush=True)
    return 1


def begin(folder: RunFolder, slurm: Slurm) -> str:
    """Queue the first controller; returns its job id.

    `presubmitted`, for sites whose nodes have no sbatch: all iterations go before it, and it only
    concludes. What fails takes what depends on it along; what Slurm requeues itself goes on.
    """
    config = folder.config()
    waits: tuple[str, ...] = ()
    if config.cluster.chain == "presubmitted":
        for k in range(1, config.iterations + 1):
            draws.begin(folder, k)
        done = step(folder, slurm, config.iterations)
        _tell(done)
        waits = done.waits
        if problem := done.plan.stop or done.refused:
            slurm.cancel(*waits)
            raise InputError(f"cluster.chain: {problem}")
    try:
        return _queue(folder, slurm, waits)
    except SubmissionRefused as error:
        raise InputError(f"Slurm refused the controller: {error}", "cluster.controller") from error


def _queue(folder: RunFolder, slurm: Slurm, waits: Sequence[str]) -> str:
    """Queue a controller of this run that waits for these jobs; returns its job id."""
    layout, script = folder.layout, folder.layout.controller_script()
    make_private(layout.jobs)
    make_private(script.parent)
    command = shlex.join([sys.executable, "-m", "alt_hpc", "controller", str(folder.path)])
    lines = ["#!/bin/bash", "# a controller of this run", *imports(layout.code), f"exec {command}"]
    script.write_text("\n".join(lines) + "\n")
    common, log = folder.config().cluster, layout.controller_log()
    after = f"afterany:{':'.join(waits)}" if waits else ""
    job = slurm.submit_controller(script, log, folder.path.name, folder.run_id, common, after)
    folder.journal.record(Queued(job=job))
    return job


def check_cluster(folder: RunFolder, slurm: Slurm) -> None:
    """Stop where another cluster answers: not knowing the run's jobs, it would get all of them."""
    theirs = [entry.cluster for entry in folder.journal.of(Submit) if entry.cluster][-1:]
    here = slurm.name()
    if theirs and theirs != [here] and not folder.ended():
        which = f"on cluster '{theirs[0]}', but '{here}' answers here"
        names = ", ".join(process.OF_THE_USER)
        raise InputError(f"{folder.path}: its jobs are {which} ({names})", "run")


def held(elements: Iterable[Seen], why: str = "held") -> list[str]:
    """Those elements in the queue that do not start by themselves, for a reason like this."""
    return [e.id for e in elements if e.state == "PENDING" and why in e.reason.lower()]


def _tell(done: Step) -> None:
    """Say what was submitted."""
    for job in done.plan.jobs:
        if name := done.submitted.get(job.key):
            print(f"submitted {job.key} as {name} ({len(job.elements)} tasks)", flush=True)


@dataclass
class Chain:
    """A controller among those of its run; `me` is its own job."""

    folder: RunFolder
    slurm: Slurm
    me: str
    successor: str = ""

    def go_on(self) -> int:
        """Queue a successor, if none waits already, then take a step; returns the exit status."""
        try:
            waiting = [job for job, state in self._others().items() if state == "PENDING"]
            self.slurm.cancel(*waiting[1:])
            me = [self.me] if self.me else []
            self.successor = waiting[0] if waiting else _queue(self.folder, self.slurm, me)
        except SubmissionRefused as error:  # nothing has been submitted
            return self.stop(f"Slurm refused the next controller: {error}")
        since = self.folder.journal.since(lambda entry: isinstance(entry, Submit | Stepped))
        if sum(isinstance(entry, Queued) for entry in since) > DEAD_CONTROLLERS:
            died = f"{DEAD_CONTROLLERS} controllers in a row died"
            return self.stop(f"{died} before they had submitted all")
        try:
            self._release()
            return self._step()
        except QueueUnknown as error:  # jobs of the run may be in flight
            return self._back_off(str(error), UNKNOWN_CONTROLLERS)

    def _step(self) -> int:
        folder = self.folder
        done = step(folder, self.slurm)
        _tell(done)
        if done.plan.finished:
            folder.end("FINISHED", finish(done.plan))
            self.slurm.cancel(self.successor)
            return 0
        if done.plan.stop:  # what runs keeps what it finishes, what waits would never be used
            return self.stop(done.plan.stop, *sorted(done.waiting))
        if done.refused and done.refused.kind == "wrong":
            return self.stop(f"Slurm would not take a job: {done.refused}")
        if not done.waits:
            why = f"sbatch refused a job: {done.refused}" if done.refused else "no room for a job"
            return self._back_off(why, IDLE_CONTROLLERS)
        made = len(folder.manifests.done()), len(folder.journal.of(Submitted))
        folder.journal.record(Stepped(progress=made, waits=done.waits))
        self.slurm.depend(self.successor, f"afterany:{':'.join(done.waits)},singleton")
        last = self._steps()[-IDLE_CONTROLLERS:]
        if last == IDLE_CONTROLLERS * last[:1]:  # Slurm lets us go on before its jobs have ended
            self.slurm.start_after(self.successor, BACK_OFF_MINUTES[0])
        return 0

    def stop(self, why: str, *further: str) -> int:
        """End the run with a sentence, and the other controllers (and further jobs) with it."""
        status = _stop(self.folder, why)
        self.cancel_others(*further)
        return status

    def cancel_others(self, *further: str) -> None:
        """Cancel the run's other controllers, as far as Slurm tells, and further jobs."""
        jobs = dict.fromkeys([self.successor, *self._others(), *further])
        self.slurm.cancel(*filter(None, jobs))

    def _others(self) -> dict[str, str]:
        """The run's other controllers and their states."""
        try:
            found = self.slurm.controllers(scripts(self.folder))
        except QueueUnknown:
            return {}
        return {job: state for job, state in found.items() if job != self.me}

    def _release(self) -> None:
        """Let go what Slurm, no person, holds: a node could not launch it. A few times each."""
        released = [entry.job for entry in self.folder.journal.of(Released)]
        for job in held(looked(self.folder, self.slurm).values(), "launch_failed"):
            if released.count(job) < RELEASES:
                self.folder.journal.record(Released(job=job))
                self.slurm.release(job)

    def _back_off(self, why: str, most: int) -> int:
        """Nothing could be submitted: the successor tries again in a while, `most` times."""
        self.folder.journal.record(Stepped(progress=None, waits=()))
        tries = len([*takewhile(lambda made: made is None, reversed(self._steps()))])
        if tries > most:
            return self.stop(why)
        minutes = BACK_OFF_MINUTES[:tries][-1]
        print(f"{why}; trying again in {minutes} min", flush=True)
        try:
            self.slurm.start_after(self.successor, minutes)
        except QueueUnknown as error:  # then the successor waits for us alone
            print(f"{error}; waiting here", flush=True)
            time.sleep(60 * minutes)
        return 0

    def _steps(self) -> list[Sequence[int] | None]:
        """How far the run was after each step since a person last submitted."""
        since = self.folder.journal.since(lambda entry: isinstance(entry, Submit))
        return [entry.progress for entry in since if isinstance(entry, Stepped)]
