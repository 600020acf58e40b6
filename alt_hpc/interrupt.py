"""Being asked to stop, and standing still: signals become a flag, a task that hangs ends itself."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType

HUNG = 70  # exit status of a task that made no progress for too long (EX_SOFTWARE)

_asked: list[int] = []
_last_beat = time.monotonic()


class Interrupted(Exception):
    """What was done is safe, and the task ends because it was asked to."""


def install() -> None:
    """Handle SIGUSR2 (Slurm: time limit near, preemption) and SIGTERM by setting a flag.

    In the main thread. submitit's handlers, which would checkpoint on one rank alone, are
    replaced.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(number)


def asked() -> bool:
    """Whether this process was asked to stop. Asking is a sign of life (see `watch`)."""
    beat()
    return bool(_asked)


def wants_requeue() -> bool:
    """Whether it is to go on later: SIGUSR2 says so, SIGTERM alone is a cancellation."""
    return signal.SIGUSR2 in _asked


def check() -> None:
    """Raise Interrupted if this process was asked to stop."""
    if asked():
        raise Interrupted("asked to stop")


def beat() -> None:
    """Say that the task makes progress."""
    global _last_beat
    _last_beat = time.monotonic()


def watch(seconds: float) -> None:
    """End this process, its stacks in the log, once there was no `beat` for so long."""
    beat()
    threading.Thread(target=_watch, args=(seconds,), daemon=True).start()


def _watch(seconds: float) -> None:
    while time.monotonic() - _last_beat < seconds:
        time.sleep(min(seconds / 4, 10.0))
    print(f"no progress for {seconds:g} s: the task ends itself", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)
    os._exit(HUNG)
