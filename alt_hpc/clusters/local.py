"""This machine as a cluster: what is ready runs, some processes at once; then one plans again."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alt_hpc import process
from alt_hpc.clusters.cluster import ENDED, Asked, Cluster, Request, Seen, Task
from alt_hpc.clusters.warm import Child, Parent
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.plan import Dependency, Limits
from alt_hpc.run.layout import task_log

POLL_S = 0.1


@dataclass
class Element:
    """One element of a job and its processes, one a rank."""

    id: str
    index: int
    request: Request
    width: int  # of the slots
    state: str = "PENDING"
    processes: list[subprocess.Popen[bytes] | Child] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.request.tasks[self.index]

    def end(self, state: str) -> None:
        """Kill what runs of it, and whatever that has started; afterwards it is in this state."""
        for started in (one for one in self.processes if one.poll() is None):
            for kill in (os.kill, os.killpg):  # before a fork has a session of its own, and after
                with contextlib.suppress(ProcessLookupError):
                    kill(started.pid, signal.SIGKILL)
            started.wait()
        self.state = state


class Local(Cluster):
    """Runs at most `slots` processes at once: first what training waits for, last what nothing is
    made from, else by age.

    A job that waits for others is not taken: it is planned again when they have ended.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.elements: list[Element] = []
        self.jobs = 0
        self.warm: Parent | None = None

    def limits(self, common: ClusterConfig, controllers: Path) -> Limits:
        """Only what is ready."""
        return Limits(array=1_000_000, only_ready=True)

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """Queue a job; `turn` runs it."""
        assert not after
        self.jobs += 1
        job, count, width = str(self.jobs), len(request.tasks), min(request.ranks, self.slots)
        ids = [f"{job}_{i}" for i in range(count)] if count > 1 else [job]
        self.elements += [Element(name, i, request, width) for i, name in enumerate(ids)]
        return job

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """What this process has submitted: it alone knows its jobs."""
        seen = [(e.request.key, e.index, Seen(e.id, e.state)) for e in self.elements]
        return {one.key: {i: now for key, i, now in seen if key == one.key} for one in asked}

    def cancel(self, *elements: str) -> None:
        """End some of them."""
        for element in self.elements:
            if element.id in elements and element.state not in ENDED:
                element.end("CANCELLED")

    def running(self) -> list[Element]:
        return [e for e in self.elements if e.state == "RUNNING"]

    def turn(self, tick: Callable[[], None] = lambda: None) -> list[Element]:
        """Run queued elements until some have ended; those (none: nothing is queued).

        Whatever still runs is ended when this is left by an exception (such as Ctrl-C).
        """
        try:
            while True:
                self._start()
                ended = [element for element in self.running() if self._has_ended(element)]
                if ended or all(element.state in ENDED for element in self.elements):
                    return ended
                tick()
                time.sleep(POLL_S)
        except BaseException:
            self.end_all()
            raise

    def end_all(self) -> None:
        """Kill what runs and cancel what waits."""
        self.cancel(*(element.id for element in self.elements))
        if self.warm is not None:
            self.warm.process.kill()  # and its children with it
            self.warm.process.wait()

    def _has_ended(self, element: Element) -> bool:
        codes = [started.poll() for started in element.processes]
        if any(codes):
            element.end("FAILED")  # one dead rank ends the others, as srun --kill-on-bad-exit does
        elif None not in codes:
            element.state = "COMPLETED"
        return element.state in ENDED

    def _start(self) -> None:
        busy = sum(element.width for element in self.running())
        waiting = [e for e in self.elements if e.state == "PENDING"]
        for element in sorted(waiting, key=lambda e: (e.request.side, e.request.last)):
            request, parent = element.request, None
            if request.warm and not request.stage.python and not process.has_gpu():
                parent = self.warm = self.warm or Parent(request.threads, request.code)
            busy += element.width
            imports = parent and parent.lives() and parent.status(0) is None
            if busy > self.slots or imports:
                return  # a wide job is not overtaken for ever
            self._launch(element, parent)

    def _launch(self, element: Element, parent: Parent | None) -> None:
        request, command = element.request, element.task.command()
        start = f"local-{os.getpid()}-{element.id}"
        for rank in range(request.ranks):
            local = rank % request.stage.tasks_per_node
            about = process.for_a_task(rank, request.ranks, local, start, request.code)
            log = task_log(request.folder, element.id, rank)
            if parent and (child := parent.fork(command, about, log)):
                element.processes.append(child)
                continue
            with log.open("ab") as output:
                plain = subprocess.Popen(
                    [request.stage.python or sys.executable, *command],
                    env=about,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=functools.partial(process.die_with, os.getpid()),
                )
            element.processes.append(plain)
        element.state = "RUNNING"
