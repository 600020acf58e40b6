"""What a cluster is: it takes jobs, tells how they are, and ends them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from alt_hpc import config
from alt_hpc.plan import Dependency, Limits


class Task(Protocol):
    """What one element of a job does, in each of its processes (`task.StageTask`).

    Slurm carries the object itself, pickled by submitit, and calls it; `local` starts its command.
    """

    @property
    def stage(self) -> str: ...
    @property
    def iteration(self) -> int: ...
    def __call__(self) -> None: ...
    def command(self) -> list[str]: ...  # what stands behind `python` in the command that does it


@dataclass(frozen=True)
class Request:
    """One job as a cluster sees it: an element for each task."""

    name: str
    run_id: str
    key: str  # of the job in the plan
    folder: Path  # scripts and logs
    tasks: Sequence[Task]
    stage: config.StageCluster
    common: config.Cluster
    threads: int = 1
    exclude: Sequence[str] = ()  # nodes not to run on, as far as enough others are left
    code: Path | None = None  # where tasks import the product from, ahead of all else
    side: bool = False  # no training waits for it: others go first
    last: bool = False  # nothing is made from it: it goes after those
    warm: bool = False  # its tasks may be forked from a process that has imported torch

    @property
    def ranks(self) -> int:  # processes of each element
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


ENDED = (
    *("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
)
NEVER = {  # reasons for which Slurm keeps a job waiting for good, in words
    "DependencyNeverSatisfied": "what it waits for has failed",
    "PartitionTimeLimit": "it asks for more time than its partition gives",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives",
    "BadConstraints": "no node is like what it asks for",
    "PartitionConfig": "its partition does not take such jobs",
    "AssocMaxWallDurationPerJobLimit": "it asks for more time than its account may have",
    "QOSMaxWallDurationPerJobLimit": "it asks for more time than its QOS gives",
}


class Seen(NamedTuple):
    """One element of a job as the cluster sees it now."""

    id: str
    state: str
    nodes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether it has ended for good. One that is COMPLETING may yet be started again."""
        return self.state in ENDED

    @property
    def never(self) -> bool:
        """Whether it waits for what can never be."""
        return self.state == "PENDING" and self.reason in NEVER


class Asked(NamedTuple):
    """A submitted job that a cluster is asked about."""

    key: str
    folder: Path  # its scripts
    job: str | None  # None: the submitting process died before it knew


class Cluster:
    """What the controller needs of a cluster. It raises `QueueUnknown` where it cannot answer.

    This one cannot be asked from here: Slurm's defaults, and an empty queue.
    """

    def limits(self, common: config.Cluster, controllers: Path) -> Limits:
        """What it takes now of this user, beside the controllers whose script lies there."""
        return Limits()

    def spared(self, request: Request) -> Request:
        """The request without those nodes to exclude that the cluster cannot do without."""
        return replace(request, exclude=())

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """Queue a job whose dependencies name jobs or elements (`12`, `12_3`); returns its id."""
        raise SubmissionRefused("there is no cluster here")

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """Elements of jobs by their keys and indices; nothing of those that it does not know."""
        return {}

    def cancel(self, *elements: str) -> None:
        """End jobs or elements."""
