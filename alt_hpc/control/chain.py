"""The chain of controllers on Slurm: jobs of a few seconds, each of which queues its successor."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from alt_hpc import process
from alt_hpc.clusters import queue, script
from alt_hpc.clusters.cluster import Cluster, QueueUnknown, SubmissionRefused
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.control import share
from alt_hpc.control.step import finish, looked, read_state, scripts, step
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
    chain = Chain(folder, Slurm(queue.PATIENCE_S)) if available() else None
    try:
        if chain:
            with folder.only_one(folder.layout.controller_lock, LOCK_WITHIN_S):  # perhaps two
                chain.go_on()
        else:  # a presubmitted chain is at its end, on a node that can submit nothing
            todo = plan(read_state(folder, Cluster()))
            if not todo.finished:
                missing = todo.jobs[0].pieces[0] if todo.jobs else todo.stop
                raise InputError(f"{missing} is not whole, and sbatch is not on this node")
            folder.end("FINISHED", finish(todo))
        return 0
    except InputError as error:
        sentence = f"stopped: {error}; logs are in {folder.layout.jobs}; submit again to go on"
        folder.end("STOPPED", sentence)
    except OSError as error:  # a full disk, say: each successor would die of it in turn
        sentence = f"stopped: {error}; submit again when it is mended"
    try:
        if chain:
            jobs = dict.fromkeys([chain.successor, *chain.others(), *chain.unused])
            chain.slurm.cancel(*filter(None, jobs))
    finally:
        print(sentence, file=sys.stderr, flush=True)
    return 1


def begin(folder: RunFolder, slurm: Slurm, after: str = "") -> str:
    """Queue the first controller, behind the job `after`, if any; returns its job id.

    `presubmitted`, for sites whose nodes have no sbatch: all iterations go before it, and it only
    concludes. What fails takes what depends on it along; what Slurm requeues itself goes on.
    """
    config = folder.config()
    waits: tuple[str, ...] = (after,) if after else ()
    if config.cluster.chain == "presubmitted":
        for k in range(1, config.iterations + 1):
            draws.begin(folder, k)
        done = step(folder, slurm, config.iterations)
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
    layout, common = folder.layout, folder.config().cluster
    make_private(layout.jobs)
    make_private(scripts(folder))
    command = shlex.join([sys.executable, "-m", "alt_hpc", "controller", str(folder.path)])
    lines = ["#!/bin/bash", "# a controller of this run", *script.imports(layout.code)]
    layout.controller_script.write_text("\n".join([*lines, f"exec {command}\n"]))
    after = f"afterany:{':'.join(waits)}" if waits else ""
    files = layout.controller_script, layout.controller_log
    job = slurm.submit_controller(*files, folder.path.name, folder.run_id, common, after)
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


@dataclass
class Chain:
    """A controller among those of its run. InputError ends the run."""

    folder: RunFolder
    slurm: Slurm
    successor: str = ""
    unused: Sequence[str] = ()  # elements in the queue that would wait for nothing

    def go_on(self) -> None:
        """Queue a successor, if none waits already, then take a step."""
        try:
            waiting = [job for job, state in self.others().items() if state == "PENDING"]
            self.slurm.cancel(*waiting[1:])
            me = [process.job()] if process.job() else []
            self.successor = waiting[0] if waiting else _queue(self.folder, self.slurm, me)
        except SubmissionRefused as error:  # nothing has been submitted
            raise InputError(f"Slurm refused the next controller: {error}") from error
        since = self.folder.journal.since(lambda entry: isinstance(entry, Submit | Stepped))
        if sum(isinstance(entry, Queued) for entry in since) > DEAD_CONTROLLERS:
            died = f"{DEAD_CONTROLLERS} controllers in a row died"
            raise InputError(f"{died} before they had submitted all")
        try:
            released = [entry.job for entry in self.folder.journal.of(Released)]
            for job in looked(self.folder, self.slurm).values():  # Slurm, no person, holds some
                held = job.state == "PENDING" and "launch_failed" in job.reason.lower()
                if held and released.count(job.id) < RELEASES:
                    self.folder.journal.record(Released(job=job.id))
                    self.slurm.release(job.id)
            self._step()
        except QueueUnknown as error:  # jobs of the run may be in flight
            self._back_off(str(error), UNKNOWN_CONTROLLERS)

    def _step(self) -> None:
        folder = self.folder
        if waits := self._start():
            other = RunFolder(folder.config().start_from or "")
            print(f"waits for what {other.path} makes of their start", flush=True)
            return self._stepped(other, waits)
        done = step(folder, self.slurm)
        if done.plan.finished:
            if RunFolder(folder.path).config() != folder.config():
                return  # a person has asked for more meanwhile: the successor sees to it
            folder.end("FINISHED", finish(done.plan))
            return self.slurm.cancel(self.successor)
        if done.plan.stop:  # what runs keeps what it finishes, what waits would never be used
            self.unused = sorted(done.waiting)
            raise InputError(done.plan.stop)
        if done.refused and done.refused.kind == "wrong":
            raise InputError(f"Slurm would not take a job: {done.refused}")
        if not done.waits:
            why = f"sbatch refused a job: {done.refused}" if done.refused else "no room for a job"
            return self._back_off(why, IDLE_CONTROLLERS)
        self._stepped(folder, done.waits)

    def _start(self) -> Sequence[str]:
        """Take what this run takes of another; as long as that makes it, the jobs to wait for.

        Those of its pieces, else of its controllers: when these end, one looks again. InputError
        where nothing will make what is missing.
        """
        if not share.waits(self.folder):
            return ()
        other = share.named(self.folder.config())
        controllers = self.slurm.controllers(scripts(other))  # then what these have submitted
        state, start = read_state(other, self.slurm), share.offered(self.folder)
        assert start is not None
        given_up = plan(state).given_up
        missing = [] if other.ended() else [p for p in start.missing if p not in given_up]
        if missing:
            elements = [state.in_flight[piece] for piece in missing if piece in state.in_flight]
            flying = dict.fromkeys(element.partition("_")[0] for element in elements)
            running = [job for job, now in controllers.items() if now == "RUNNING"]
            if jobs := [*flying] or running or [*controllers]:
                return jobs
        share.require(start)
        share.take(self.folder, start)
        return ()

    def _stepped(self, of: RunFolder, waits: Sequence[str]) -> None:
        """Have the successor wait for jobs; how far the run is that makes them tells progress."""
        made = len(of.manifests.done()), len(of.journal.of(Submitted))
        self.folder.journal.record(Stepped(progress=made, waits=waits))
        self.slurm.depend(self.successor, f"afterany:{':'.join(waits)},singleton")
        last = self._steps()[-IDLE_CONTROLLERS:]
        if last == IDLE_CONTROLLERS * last[:1]:  # Slurm lets us go on before its jobs have ended
            self.slurm.start_after(self.successor, BACK_OFF_MINUTES[0])

    def others(self) -> dict[str, str]:
        """The run's other controllers and their states, as far as Slurm tells."""
        try:
            found = self.slurm.controllers(scripts(self.folder))
        except QueueUnknown:
            return {}
        return {job: state for job, state in found.items() if job != process.job()}

    def _back_off(self, why: str, most: int) -> None:
        """Nothing could be submitted: the successor tries again in a while, `most` times."""
        self.folder.journal.record(Stepped(progress=None, waits=()))
        tries = len([*takewhile(lambda made: made is None, reversed(self._steps()))])
        if tries > most:
            raise InputError(why)
        minutes = BACK_OFF_MINUTES[:tries][-1]
        print(f"{why}; trying again in {minutes} min", flush=True)
        try:
            self.slurm.start_after(self.successor, minutes)
        except QueueUnknown as error:  # then the successor waits for us alone
            print(f"{error}; waiting here", flush=True)
            time.sleep(60 * minutes)

    def _steps(self) -> list[Sequence[int] | None]:
        """How far the run was after each step since a person last submitted."""
        since = self.folder.journal.since(lambda entry: isinstance(entry, Submit))
        return [entry.progress for entry in since if isinstance(entry, Stepped)]
