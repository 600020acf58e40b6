"""A warm parent: torch and transformers are imported once, and tasks are forked from it.

Imports take longer than most tasks of a small run. The parent is a process of its own that starts
no thread: a fork would not have it. It ends with whoever started it, and its children with it.
It reads requests from stdin, a JSON line each: {"number": 3, "command": ["-m", "alt_hpc.task",
...], "environment": {...}, "log": PATH} or {"end": 3}; and answers [3, STATUS] on stdout for each
task that ends, and [0, 0] when its imports are done.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alt_hpc import process
from alt_hpc.graph import STAGES

POLL_S = 0.05
END_WITHIN_S = 10.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Parent:
    """The process that forks tasks, as who started it sees it."""

    def __init__(self, threads: int, code: Path | None) -> None:
        # With more, numpy's BLAS would start threads when it is imported.
        few = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alt_hpc.clusters.warm"],
            bufsize=0,
            env=process.for_a_task(0, 1, 0, "warm", code) | few,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.given = 0
        self.ended: dict[int, int] = {}  # number of a task -> exit status; 0: the imports
        self._answers = b""

    def lives(self) -> bool:
        return self.process.poll() is None

    def imports(self) -> bool:
        """Whether it is not ready yet: what it was asked by now would fill the pipe, unread."""
        self.listen()
        return 0 not in self.ended and self.lives()

    def fork(self, command: list[str], environment: dict[str, str], log: Path) -> "Child":
        """Start a task."""
        self.given += 1
        self.ask(number=self.given, command=command, environment=environment, log=str(log))
        return Child(self, self.given)

    def ask(self, **request: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its children have died with it
            self.process.stdin.write(json.dumps(request).encode() + b"\n")

    def listen(self) -> None:
        """Take the answers that are there."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while select.select([pipe], [], [], 0)[0] and (found := os.read(pipe, 65536)):
            self._answers += found
        *lines, self._answers = self._answers.split(b"\n")
        self.ended.update(map(json.loads, lines))

    def end(self) -> None:
        """Kill it, and its children with it."""
        self.process.kill()
        self.process.wait()


@dataclass
class Child:
    """A task that was forked."""

    parent: Parent
    number: int

    def poll(self) -> int | None:
        """Its exit status, once it has ended; 1 where its parent has died."""
        lives = self.parent.lives()
        self.parent.listen()
        return self.parent.ended.get(self.number, None if lives else 1)

    def end(self) -> None:
        """Kill it and whatever it has started."""
        self.parent.ask(end=self.number)
        deadline = time.monotonic() + END_WITHIN_S
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)


def main() -> None:
    """Be the parent until stdin is closed. A child returns from `_serve` and becomes its task."""
    for stage in STAGES.values():
        importlib.import_module(f"alt_hpc.stages.{stage.key}")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"no warm parent: the imports have started {threads - 1} threads")
    print([0, 0], flush=True)
    if task := _serve():
        _become(task)


def _serve() -> dict[str, Any] | None:
    """Fork tasks as asked; None at the end, in a child its task."""
    me = os.getpid()
    running: dict[int, int] = {}  # process -> number of its task
    asked = b""
    while True:
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            print([running.pop(ended[0]), os.waitstatus_to_exitcode(ended[1])], flush=True)
        if not select.select([0], [], [], POLL_S)[0]:
            continue
        if not (found := os.read(0, 65536)):
            _kill(*running)
            return None
        *lines, asked = (asked + found).split(b"\n")
        for request in map(json.loads, lines):
            if "end" in request:
                _kill(*(child for child, number in running.items() if number == request["end"]))
            elif child := os.fork():
                running[child] = request["number"]
            else:
                return {**request, "parent": me}


def _kill(*children: int) -> None:
    for child in children:
        for kill in (os.kill, os.killpg):  # before it has a session of its own, and after
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)


def _become(task: dict[str, Any]) -> None:
    """Go on as `python -m MODULE ARGUMENTS` would have: own session, log, environment."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # sent when the parent is killed
    if os.getppid() != task["parent"]:
        sys.exit(1)  # too late: it is dead
    os.setsid()
    with open(task["log"], "ab") as log, open(os.devnull, "rb") as nothing:
        for file, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(task["environment"])
    module, sys.argv[1:] = task["command"][1], task["command"][2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
