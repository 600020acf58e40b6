"""What the tests of clusters run as tasks: small functions in place of stages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """A task that is `python -m NAME ARGUMENTS`."""

    name: str
    arguments: tuple[str, ...]
    stage: str = "stub"
    iteration: int = 0

    def command(self) -> list[str]:
        return ["-m", self.name, *self.arguments]

    def __call__(self) -> None:
        raise NotImplementedError


class Call(Module):
    """A task that calls one of the functions below, by its name, with text arguments."""

    def command(self) -> list[str]:
        return ["-m", "stub_tasks", self.name, *self.arguments]

    def __call__(self) -> None:
        globals()[self.name](*self.arguments)


def sleep_or_fail(folder: str, name: str, seconds: str, status: str) -> None:
    """Note the start, sleep, note the end, exit with a status."""
    rank = os.environ["RANK"]
    Path(folder, f"{name}.{rank}.pid").write_text(str(os.getpid()))
    Path(folder, f"{name}.{rank}.start").write_text(str(time.time()))
    time.sleep(float(seconds))
    Path(folder, f"{name}.{rank}.end").write_text(str(time.time()))
    sys.exit(int(status))


def one_rank_fails(folder: str, name: str) -> None:
    """Rank 1 fails at once; the others would sleep for a minute."""
    failing = os.environ["RANK"] == "1"
    sleep_or_fail(folder, name, "0.2" if failing else "60", "3" if failing else "0")


def with_child(folder: str, name: str) -> None:
    """Start a process of one's own, as data loaders do, and wait for it."""
    child = subprocess.Popen(["sleep", "60"])
    Path(folder, f"{name}.child").write_text(str(child.pid))
    child.wait()


def show(folder: str, name: str, *environment: str) -> None:
    """Write down what a task sees of its environment."""
    values = [f"{key}={os.environ.get(key)}" for key in environment]
    Path(folder, f"{name}.{os.environ['RANK']}.seen").write_text("\n".join(values))


if __name__ == "__main__":
    Call(sys.argv[1], tuple(sys.argv[2:]))()
