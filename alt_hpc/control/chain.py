"""The chain of controllers on Slurm: jobs of a few seconds, each of which queues its successor."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from alt_hpc import process
from alt_hpc.clusters.cluster import QueueUnknown, Seen, SubmissionRefused, Unseen
from alt_hpc.clusters.queue import PATIENCE_S
from alt_hpc.clusters.script import imports
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.control.step import Step, finish, looked, read_state, scripts, step
from alt_hpc.data import draws
from alt_hpc.errors import InputError
from alt_hpc.plan import Submission, plan
from alt_hpc.run.files import make_private
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Entry, Queued, Released, Stepped, Submit, Submitted

IDLE_CONTROLLERS = 3  # in a row that could submit nothing, with nothing in flight: stop
UNKNOWN_CONTROLLERS = 40  # in a row that Slurm did not answer: stop, after about a day
DEAD_CONTROLLERS = 5  # in a row: stop
BACK_OFF_MINUTES = (1, 5, 30)  # before the first, second, third try after nothing went
RELEASES = 3  # of one job that Slurm held after a failed launch
LOCK_WITHIN_S = 60.0  # how long a controller waits for another one to finish


def run(folder: RunFolder) -> int:
    """One controller job, from its start to its end; returns its exit status.

    Whatever ends it for good is written where `status` finds it.
    """
    folder.check_owner()
    if folder.ended():
        print(folder.ended())
        return 0
    if not available():
        return _conclude(folder)
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


def queue_controller(folder: RunFolder, slurm: Slurm, after: str) -> str:
    """Queue a controller of this run; returns its job id."""
    script, log = write_script(folder), folder.layout.controller_log()
    common = folder.config().cluster
    job = slurm.submit_controller(script, log, folder.path.name, folder.run_id, common, after)
    folder.journal.record(Queued(job=job))
    return job


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


def presubmit(folder: RunFolder, slurm: Slurm) -> str:
    """Submit all iterations at once, for sites whose nodes have no sbatch; returns the last job.

    That last job only concludes. What fails takes what depends on it along; what Slurm requeues
    itself goes on.
    """
    config = folder.config()
    for k in range(1, config.iterations + 1):
        draws.begin(folder, k)
    done = step(folder, slurm, config.iterations)
    _tell(done)
    if done.plan.stop or done.refused:
        slurm.cancel(*done.waits)
        raise InputError(f"cluster.chain: {done.plan.stop or done.refused}")
    return queue_controller(folder, slurm, f"afterany:{':'.join(done.waits)}" if done.waits else "")


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


def _tell(done: Step) -> None:
    """Say what was submitted."""
    sizes = {job.key: len(job.elements) for job in done.plan.jobs}
    for key, job in done.submitted.items():
        print(f"submitted {key} as {job} ({sizes[key]} tasks)", flush=True)


class Chain:
    """A controller among those of its run; `me` is its own job."""

    def __init__(self, folder: RunFolder, slurm: Slurm, me: str) -> None:
        self.folder = folder
        self.slurm = slurm
        self.me = me
        self.successor = ""

    def go_on(self) -> int:
        """Queue the successor, then take a step; returns the exit status."""
        try:
            self.successor = self._successor()
        except SubmissionRefused as error:  # nothing has been submitted; submitting again is safe
            self.folder.end("STOPPED", f"stopped: Slurm refused the next controller: {error}")
            print(self.folder.ended(), file=sys.stderr, flush=True)
            return 1
        if self._died() > DEAD_CONTROLLERS:
            return self.stop(
                f"{DEAD_CONTROLLERS} controllers in a row died before they had submitted all"
            )
        try:
            return self._step()
        except QueueUnknown as error:  # jobs of the run may be in flight
            return self._back_off(str(error), UNKNOWN_CONTROLLERS)

    def _step(self) -> int:
        folder = self.folder
        self._release()
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
        if self._idle():  # what is in flight has not ended, though Slurm lets us go on
            self.slurm.start_after(self.successor, BACK_OFF_MINUTES[0])
        return 0

    def stop(self, why: str, *further: str) -> int:
        """End the run with a sentence, and the other controllers with it."""
        sentence = f"stopped: {why}; logs are in {self.folder.layout.jobs}; submit again to go on"
        self.folder.end("STOPPED", sentence)
        print(sentence, file=sys.stderr, flush=True)
        self.cancel_others()
        self.slurm.cancel(*further)
        return 1

    def cancel_others(self) -> None:
        """Cancel the run's other controllers, as far as Slurm tells."""
        self.slurm.cancel(*dict.fromkeys([*filter(None, [self.successor]), *self._others()]))

    def _others(self, *states: str) -> list[str]:
        try:
            found = self.slurm.controllers(scripts(self.folder))
        except QueueUnknown:
            return []
        return [j for j, state in found.items() if j != self.me and state in (states or (state,))]

    def _successor(self) -> str:
        """The controller after this one: one that waits already, or a new one."""
        first, *others = [*self._others("PENDING"), ""]
        self.slurm.cancel(*filter(None, others))
        after = f"afterany:{self.me}" if self.me else ""
        return first or queue_controller(self.folder, self.slurm, after)

    def _release(self) -> None:
        """Let go what Slurm holds because a node could not launch it, a few times each.

        What a person holds stays held.
        """
        released = [entry.job for entry in self.folder.journal.of(Released)]
        for job, why in held(looked(self.folder, self.slurm)).items():
            if "launch failed" in why and released.count(job) < RELEASES:
                self.folder.journal.record(Released(job=job))
                self.slurm.release(job)

    def _back_off(self, why: str, most: int) -> int:
        """Nothing could be submitted: the successor tries again in a while, `most` times."""
        self.folder.journal.record(Stepped(progress=None, waits=()))
        tries = self._backed_off()
        if tries > most:
            return self.stop(why)
        minutes = BACK_OFF_MINUTES[min(tries, len(BACK_OFF_MINUTES)) - 1]
        print(f"{why}; trying again in {minutes} min", flush=True)
        try:
            self.slurm.start_after(self.successor, minutes)
        except QueueUnknown as error:  # then the successor waits for us alone
            print(f"{error}; waiting here", flush=True)
            time.sleep(60 * minutes)
        return 0

    def _backed_off(self) -> int:
        """How many controllers in a row, up to now, could submit nothing."""

        def came_further(entry: Entry) -> bool:
            stepped = isinstance(entry, Stepped) and entry.progress is not None
            return isinstance(entry, Submit) or stepped

        return sum(isinstance(e, Stepped) for e in self.folder.journal.since(came_further))

    def _idle(self) -> bool:
        """Whether the last controllers found and did nothing new."""
        since = self.folder.journal.since(lambda entry: isinstance(entry, Submit))
        steps = [entry.progress for entry in since if isinstance(entry, Stepped)]
        last = steps[-IDLE_CONTROLLERS:]
        return len(last) == IDLE_CONTROLLERS and all(one == last[0] for one in last)

    def _died(self) -> int:
        """How many controllers have been queued since one last came to its end."""
        since = self.folder.journal.since(lambda entry: isinstance(entry, Submit | Stepped))
        return sum(isinstance(entry, Queued) for entry in since)
