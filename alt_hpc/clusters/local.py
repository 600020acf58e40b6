"""This machine as a cluster: what is ready runs, some processes at once; then one plans again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from alt_hpc import process
from alt_hpc.clusters.cluster import ENDED, Asked, Request, Seen, Task
from alt_hpc.clusters.warm import Parent
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.plan import Dependency, Limits
from alt_hpc.run.layout import task_log

POLL_S = 0.1


class Running(Protocol):
    """A process that was started here, in a session of its own."""

    def poll(self) -> int | None:
        """Its exit status, once it has ended."""

    def end(self) -> None:
        """Kill it and whatever it has started."""


@dataclass
class Element:
    """One element of a job and its processes, one a rank."""

    id: str
    index: int
    request: Request
    state: str = "PENDING"
    processes: list[Running] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.request.tasks[self.index]

    def end(self, state: str) -> None:
        """Kill what runs of it; afterwards it is in this state."""
        for started in self.processes:
            if started.poll() is None:
                started.end()
        self.state = state


class Local:
    """Runs at most `slots` processes at once: what training waits for goes first, then by age.

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
        count = len(request.tasks)
        names = [f"{self.jobs}_{i}" for i in range(count)] if count > 1 else [str(self.jobs)]
        self.elements += [Element(name, i, request) for i, name in enumerate(names)]
        return str(self.jobs)

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """What this process has submitted: it alone knows its jobs."""
        found: dict[str, dict[int, Seen]] = {one.key: {} for one in asked}
        for element in self.elements:
            if element.request.key in found:
                seen = Seen(element.id, element.state)
                found[element.request.key][element.index] = seen
        return found

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
                running = self.running()
                ended = [element for element in running if self._has_ended(element)]
                if ended or not running:
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
            self.warm.end()

    def _has_ended(self, element: Element) -> bool:
        codes = [started.poll() for started in element.processes]
        if any(code not in (None, 0) for code in codes):
            element.end("FAILED")  # one dead rank ends the others, as srun --kill-on-bad-exit does
        elif all(code == 0 for code in codes):
            element.state = "COMPLETED"
        return element.state in ENDED

    def _start(self) -> None:
        busy = sum(self._width(e) for e in self.running())
        waiting = [e for e in self.elements if e.state == "PENDING"]
        for element in sorted(waiting, key=lambda e: e.request.side):
            busy += self._width(element)
            if busy > self.slots:
                return  # a wide job is not overtaken for ever
            self._launch(element)

    def _width(self, element: Element) -> int:
        return min(element.request.ranks, self.slots)

    def _launch(self, element: Element) -> None:
        request = element.request
        start = f"local-{os.getpid()}-{element.id}"
        for rank in range(request.ranks):
            local = rank % request.stage.tasks_per_node
            about = process.for_a_task(rank, request.ranks, local, start, request.code)
            log = task_log(request.folder, element.id, rank)
            element.processes.append(self._process(request, element.task.command(), about, log))
        element.state = "RUNNING"

    def _process(
        self, request: Request, command: list[str], environment: dict[str, str], log: Path
    ) -> Running:
        if request.warm and request.stage.python is None and not process.has_gpu():
            if self.warm is None:
                self.warm = Parent(request.threads, environment)
            if self.warm.lives():
                return self.warm.fork(command, environment, log)
        return Spawned([request.stage.python or sys.executable, *command], environment, log)


class Spawned:
    """A process with an interpreter of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
