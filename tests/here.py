"""This process as a cluster: a job's tasks run as it is submitted, one after the other.

For tests that only look at what is made: no interpreter is started for each task.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alt_hpc import config as configs
from alt_hpc.clusters.cluster import Cluster, Request
from alt_hpc.control import start
from alt_hpc.control import step as steps
from alt_hpc.graph import STAGES
from alt_hpc.plan import Dependency
from alt_hpc.run.folder import RunFolder


class Here(Cluster):
    """What the controller needs of a cluster; stages on one rank only."""

    def __init__(self) -> None:
        self.made: list[str] = []  # keys of the jobs that were submitted

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        self.made.append(request.key)
        for task in request.tasks:
            make_apart(task) if STAGES[task.stage].training else task.make()  # type: ignore[attr-defined]
        return str(len(self.made))


def make_apart(task: Any) -> None:
    """In a child: DeepSpeed works once in a process, and another test may have trained in this."""
    if (child := os.fork()) == 0:
        try:
            task.make()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, f"{task.stage} {task.iteration}"


def run(config: Path, settings: Sequence[str]) -> list[str]:
    """Run a config to its end; the keys of the jobs that it took."""
    chosen = configs.load(config, [*settings, "cluster.backend=local", "cluster.train={}"])
    folder, here = start.prepare(chosen), Here()
    while not (done := steps.step(RunFolder(folder.path), here)).plan.finished:
        assert done.plan.stop is None, done.plan.stop
    folder.end("FINISHED", steps.finish(done.plan))
    return here.made
