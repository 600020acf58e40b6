"""Being asked to stop, and standing still: signals become a flag, a task that hangs ends itself."""

import faulthandler
import os
import signal
import sys
import threading
import time

HUNG = 70  # exit status of a task that made no progress for too long (EX_SOFTWARE)

_asked: list[int] = []  # signals
_last_beat = time.monotonic()


class Interrupted(Exception):
    """What was done is safe, and the task ends because it was asked to."""


def install(hung_s: float) -> None:
    """In the main thread: SIGUSR2 (Slurm: time limit near, preemption) and SIGTERM set a flag.

    submitit's handlers, which would checkpoint on one rank alone, are replaced. Once there was no
    `beat` for `hung_s` the process ends itself, its stacks in the log.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _: _asked.append(number))
    beat()
    threading.Thread(target=_watch, args=(hung_s,), daemon=True).start()


def asked() -> bool:
    """Whether this process was asked to stop. Asking is a sign of life."""
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


def _watch(hung_s: float) -> None:
    while time.monotonic() - _last_beat < hung_s:
        time.sleep(min(hung_s / 4, 10.0))
    print(f"no progress for {hung_s:g} s: the task ends itself", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)
    os._exit(HUNG)
