"""This machine as a cluster: the same jobs, dependency meanings and end states as Slurm's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alt_hpc import process
from alt_hpc.clusters import ENDED, Asked, Request, Seen, Task
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.plan import Dependency, Limits
from alt_hpc.run.layout import task_log

POLL_S = 0.1


@dataclass
class Element:
    """One array element (or plain job) and its processes, one a rank."""

    id: str
    index: int
    request: Request
    after: Sequence[Dependency]
    state: str = "PENDING"
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.request.tasks[self.index]


class Local:
    """Runs at most `slots` processes at once: what training waits for goes first, then by age."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.jobs: dict[str, list[Element]] = {}

    def limits(self, common: ClusterConfig, controllers: Path) -> Limits:
        """None that matter."""
        return Limits(array=1_000_000)

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """Queue a job; `wait` runs it."""
        job = str(len(self.jobs) + 1)
        count = len(request.tasks)
        names = [job] if count == 1 else [f"{job}_{i}" for i in range(count)]
        self.jobs[job] = [Element(name, i, request, after) for i, name in enumerate(names)]
        return job

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """What this process has submitted: it alone knows its jobs."""
        found: dict[str, dict[int, Seen]] = {}
        for element in self._elements():
            seen = Seen(element.id, element.state)
            found.setdefault(element.request.key, {})[element.index] = seen
        return {one.key: found[one.key] for one in asked if one.key in found}

    def cancel(self, *elements: str) -> None:
        """End some of them."""
        for element in (e for name in elements for e in self._target(name)):
            _end(element)

    def states(self, jobs: Iterable[str]) -> dict[str, str]:
        """State of every element of these jobs."""
        return {e.id: e.state for job in jobs for e in self.jobs[job]}

    def running(self) -> list[Element]:
        return [e for e in self._elements() if e.state == "RUNNING"]

    def wait(self, targets: Iterable[str], tick: Callable[[], None] = lambda: None) -> None:
        """Run queued jobs until all elements of the targets (jobs or elements) have ended.

        Whatever still runs is ended when this is left by an exception (such as Ctrl-C).
        """
        waited = [e for target in targets for e in self._target(target)]
        try:
            while any(e.state not in ENDED for e in waited):
                self._reap()
                self._start()
                tick()
                time.sleep(POLL_S)
        except BaseException:
            self.end_all()
            raise

    def end_all(self) -> None:
        """Kill what runs and cancel what waits."""
        for element in self._elements():
            _end(element)

    def _elements(self) -> list[Element]:
        return [element for job in self.jobs.values() for element in job]

    def _target(self, target: str) -> list[Element]:
        job, underscore, index = target.partition("_")
        elements = self.jobs.get(job, [])
        return [elements[int(index)]] if underscore and elements else elements

    def _reap(self) -> None:
        for element in self.running():
            codes = [started.poll() for started in element.processes]
            if any(code not in (None, 0) for code in codes):
                _kill(element)  # one dead rank ends the others, as srun --kill-on-bad-exit does
                element.state = "FAILED"
            elif all(code == 0 for code in codes):
                element.state = "COMPLETED"

    def _start(self) -> None:
        busy = sum(self._width(e) for e in self.running())
        for element in sorted(self._elements(), key=lambda e: e.request.side):
            if element.state != "PENDING":
                continue
            ready = self._ready(element)
            if ready is None:
                element.state = "CANCELLED"
            elif ready and busy + self._width(element) <= self.slots:
                self._launch(element)
                busy += self._width(element)
            elif ready:
                return  # a wide job is not overtaken for ever

    def _width(self, element: Element) -> int:
        return min(element.request.ranks, self.slots)

    def _ready(self, element: Element) -> bool | None:
        """Whether it may start; None when it never can (Slurm: --kill-on-invalid-dep=yes)."""
        ready = True
        for dependency in element.after:
            upstream = self._target(dependency.target)
            if dependency.kind == "aftercorr":
                upstream = [e for e in upstream if e.index == element.index]
            states = {e.state for e in upstream}
            if dependency.kind != "afterany" and states & {"FAILED", "CANCELLED"}:
                return None
            ready &= states <= set(ENDED)
        return ready

    def _launch(self, element: Element) -> None:
        request = element.request
        python = request.stage.python or sys.executable
        start = f"local-{os.getpid()}-{element.id}"
        for rank in range(request.ranks):
            log = task_log(request.folder, element.id, rank)
            local = rank % request.stage.tasks_per_node
            with log.open("ab") as output:
                started = subprocess.Popen(
                    [python, *element.task.command()],
                    env=process.for_a_task(rank, request.ranks, local, start, request.code),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            element.processes.append(started)
        element.state = "RUNNING"


def _end(element: Element) -> None:
    if element.state not in ENDED:
        _kill(element)
        element.state = "CANCELLED"


def _kill(element: Element) -> None:
    for started in element.processes:
        if started.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
