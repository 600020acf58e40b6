"""Clusters know how to run a plan's jobs: `slurm` through submitit, `local` on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.config import StageCluster
from alt_hpc.plan import Dependency, Limits


class Task(Protocol):
    """What one element of a job does, in each of its processes (`task.StageTask`).

    Slurm carries the object itself, pickled by submitit; `local` starts its command.
    """

    @property
    def stage(self) -> str: ...

    @property
    def iteration(self) -> int: ...

    def __call__(self) -> None:
        """Do it, in a process that a cluster has started."""
        ...

    def command(self) -> list[str]:
        """What stands behind `python` in the command that does it."""
        ...


@dataclass(frozen=True)
class Request:
    """One job as a cluster sees it: an element for each task."""

    name: str
    run_id: str
    key: str  # of the job in the plan
    folder: Path  # scripts and logs
    tasks: Sequence[Task]
    stage: StageCluster
    common: ClusterConfig
    threads: int = 1
    exclude: Sequence[str] = ()  # nodes not to run on, as far as enough others are left

    @property
    def ranks(self) -> int:
        """Processes of each element."""
        return self.stage.nodes * self.stage.tasks_per_node


class SubmissionRefused(RuntimeError):
    """The cluster did not take a job. The message is the cluster's own.

    `kind`: a limit (go on with what fits), a busy cluster (try again), or wrong for good (stop).
    """

    def __init__(self, message: str, kind: Literal["limit", "busy", "wrong"] = "busy") -> None:
        super().__init__(message)
        self.kind = kind


class QueueUnknown(RuntimeError):
    """The cluster could not say what is in flight; nothing may be submitted now."""


class Cluster(Protocol):
    """What the controller needs of a cluster. It raises `QueueUnknown` where it cannot answer."""

    def limits(self, common: ClusterConfig, run_id: str) -> Limits:
        """What it takes now of this user, beside this run's controllers."""
        ...

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """Queue a job whose dependencies name jobs or elements (`12`, `12_3`); returns its id."""
        ...

    def in_flight(self, run_id: str) -> dict[str, dict[int, str]]:
        """Elements pending or running: job key -> element index -> element id."""
        ...

    def element(self, job: str, index: int, count: int) -> str:
        """The id of one element of a job."""
        ...

    def ends(self, jobs: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """State and nodes of the elements of jobs that it remembers, by element id."""
        ...


class Unseen:
    """A cluster that cannot be asked from here: Slurm's defaults, and an empty queue."""

    def limits(self, common: ClusterConfig, run_id: str) -> Limits:
        return Limits()

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        raise SubmissionRefused("there is no cluster here")

    def in_flight(self, run_id: str) -> dict[str, dict[int, str]]:
        return {}

    def element(self, job: str, index: int, count: int) -> str:
        return job

    def ends(self, jobs: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {}
