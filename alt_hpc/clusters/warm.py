"""A warm parent: torch and transformers are imported once, and tasks are forked from it.

Imports take longer than most tasks of a small run. The parent is a process of its own that starts
no thread: a fork would not have it. It ends with whoever started it, and its children with it.
Over a pipe it is sent a task, [COMMAND, ENVIRONMENT, LOG] as JSON, and answers [PROCESS, null] when
that has begun and [PROCESS, STATUS] when it has ended; [0, 0] says that its imports are done.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from alt_hpc import process
from alt_hpc.graph import STAGES

POLL_S = 0.05


class Parent:
    """The process that forks tasks, as who started it sees it."""

    def __init__(self, threads: int, code: Path | None) -> None:
        # With more, numpy's BLAS would start threads when it is imported.
        few = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        self._pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "alt_hpc.clusters.warm", str(theirs.fileno())],
                env=process.for_a_task(0, 1, 0, "warm", code) | few,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._told: dict[int, int | None] = {}  # process -> exit status; 0: the imports

    def lives(self) -> bool:
        return self.process.poll() is None

    def status(self, pid: int) -> int | None:
        """The exit status of a process, once it has told it."""
        with contextlib.suppress(EOFError, ConnectionError):
            while self._pipe.poll():
                self._hear()
        return self._told.get(pid)

    def fork(self, command: list[str], environment: dict[str, str], log: Path) -> "Child | None":
        """Start a task; None where this parent has died."""
        with contextlib.suppress(EOFError, ConnectionError):
            self._pipe.send_bytes(json.dumps([command, environment, str(log)]).encode())
            while self._told[pid := self._hear()] is not None:
                pass
            return Child(self, pid)
        return None

    def _hear(self) -> int:
        pid, status = json.loads(self._pipe.recv_bytes())
        self._told[pid] = status
        return int(pid)


@dataclass
class Child:
    """A task that was forked; used as a Popen is."""

    parent: Parent
    pid: int

    def poll(self) -> int | None:
        """Its exit status, once it has ended; 1 where its parent has died."""
        lives = self.parent.lives()
        status = self.parent.status(self.pid)
        return 1 if status is None and not lives else status

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(POLL_S)


def main() -> None:
    """Be the parent until the pipe is closed; a child goes on as its task."""
    for stage in STAGES.values():
        importlib.import_module(f"alt_hpc.stages.{stage.key}")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"no warm parent: the imports have started {threads - 1} threads")
    me, pipe, running = os.getpid(), Connection(int(sys.argv[1])), set[int]()
    pipe.send_bytes(b"[0, 0]")
    while True:
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.remove(ended[0])
            pipe.send_bytes(b"[%d, %d]" % (ended[0], os.waitstatus_to_exitcode(ended[1])))
        if not pipe.poll(POLL_S):
            continue
        try:
            task = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            break
        if not (child := os.fork()):
            pipe.close()
            return _become(me, *task)
        running.add(child)
        pipe.send_bytes(b"[%d, null]" % child)
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def _become(parent: int, command: list[str], environment: dict[str, str], log: str) -> None:
    """Go on as `python -m MODULE ARGUMENTS` would have: own session, log, environment."""
    process.die_with(parent)
    os.setsid()
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        for file, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    module, sys.argv[1:] = command[1], command[2:]
    well: list[bool] = []
    atexit.register(_leave, well)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    well.append(True)


def _leave(well: list[bool]) -> None:
    """End at once a task that went well: torch takes a second or two to be taken apart."""
    if well:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
