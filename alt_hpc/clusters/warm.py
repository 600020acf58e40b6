"""A warm parent: torch and transformers are imported once, and tasks are forked from it.

Imports take longer than most tasks of a small run. The parent is a process of its own that starts
no thread: a fork would not have it. It ends with whoever started it, and so do its children.
`python -m alt_hpc.clusters.warm` reads requests from stdin, a JSON line each:

    {"number": 3, "command": ["-m", "alt_hpc.task", ...], "environment": {...}, "log": PATH}
    {"end": 3}

and answers on stdout: {"ready": true} once, then {"number": 3, "status": 0} for each that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.05
END_WITHIN_S = 10.0


class Parent:
    """The process that forks tasks, as who started it sees it."""

    def __init__(self, threads: int, environment: dict[str, str]) -> None:
        # With more, numpy's BLAS would start threads when it is imported.
        few = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alt_hpc.clusters.warm"],
            env=environment | few,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.ready = False
        self.given = 0
        self.ended: dict[int, int] = {}  # number of a task -> exit status
        self._answers = b""

    def lives(self) -> bool:
        return self.process.poll() is None

    def fork(self, command: list[str], environment: dict[str, str], log: Path) -> Child:
        """A task, which begins as soon as the imports are done."""
        self.given += 1
        log.touch()
        asked = {"command": command, "environment": environment, "log": str(log)}
        self.ask({"number": self.given, **asked})
        return Child(self, self.given)

    def ask(self, what: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its children have died with it
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def listen(self) -> None:
        """Take the answers that are there."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while select.select([pipe], [], [], 0)[0] and (found := os.read(pipe, 65536)):
            self._answers += found
        *lines, self._answers = self._answers.split(b"\n")
        for answer in map(json.loads, lines):
            self.ready |= "ready" in answer
            if "number" in answer:
                self.ended[answer["number"]] = answer["status"]

    def end(self) -> None:
        """End it; its children end as it does."""
        assert self.process.stdin is not None
        self.listen()
        if self.ready:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self.process.stdin.close()
                self.process.wait(END_WITHIN_S)
        self.process.kill()
        self.process.wait()


class Child:
    """A task that was forked, or will be."""

    def __init__(self, parent: Parent, number: int) -> None:
        self.parent = parent
        self.number = number

    def poll(self) -> int | None:
        """Its exit status, once it has ended; 1 where its parent has died."""
        lives = self.parent.lives()
        self.parent.listen()
        return self.parent.ended.get(self.number, None if lives else 1)

    def end(self) -> None:
        """Kill it and whatever it has started."""
        self.parent.ask({"end": self.number})
        deadline = time.monotonic() + END_WITHIN_S
        while self.parent.ready and self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)


# ---------------------------------------------------------------------- within the parent


def main() -> None:
    """Serve until stdin is closed. A child returns from `_serve` and becomes its task."""
    import alt_hpc.lm.decode
    import alt_hpc.lm.prefix  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"no warm parent: the imports have started {threads - 1} threads")
    print(json.dumps({"ready": True}), flush=True)
    task = _serve()
    if task is not None:
        _become(task)


def _serve() -> dict[str, Any] | None:
    """Fork tasks as asked; None at the end, in a child its task."""
    running: dict[int, int] = {}  # process -> number of its task
    asked = b""
    while True:
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = os.waitstatus_to_exitcode(ended[1])
            print(json.dumps({"number": running.pop(ended[0]), "status": status}), flush=True)
        if not select.select([0], [], [], POLL_S)[0]:
            continue
        found = os.read(0, 65536)
        if not found:
            for child in running:
                _kill(child)
            return None
        *lines, asked = (asked + found).split(b"\n")
        for request in map(json.loads, lines):
            if "end" in request:
                for child in [c for c, number in running.items() if number == request["end"]]:
                    _kill(child)
                continue
            child = os.fork()
            if not child:
                return dict(request)
            running[child] = request["number"]


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):  # before it has a session of its own, and after
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)


def _become(task: dict[str, Any]) -> None:
    """Go on as `python -m MODULE ARGUMENTS` would have: own session, log, environment."""
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
