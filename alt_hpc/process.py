"""This process as whatever started it sees it: the only module that reads SLURM_* variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

RANKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
START = "ALT_HPC_START"  # unique to one start of a job, the same for its ranks
OF_THE_JOB = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")


def job() -> str:
    """The id of the Slurm job that this process belongs to; empty outside any."""
    return os.environ.get("SLURM_JOB_ID", "")


def element() -> str:
    """What scontrol calls this job: `12_3` for an array element, `12` for a plain job."""
    array, index = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{index}" if array and index else job()


def node() -> str:
    """This machine as Slurm calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


def start() -> str:
    """A name for this start of the job that its ranks share and no other start has."""
    return os.environ.get(START, f"by-hand-{os.getpid()}")


def first() -> bool:
    """Whether this is the first rank, which writes files and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def begin() -> None:
    """Take rank and start from Slurm, where it has started this process."""
    for name, slurm in RANKS.items():
        if slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    if job():
        os.environ[START] = f"{job()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def for_a_task(rank: int, world: int, local: int, start: str) -> dict[str, str]:
    """The environment of a process started here, which knows nothing of a job around us."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    return clean | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        START: start,
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def outside_the_job() -> Iterator[None]:
    """Without the variables of the job we are in, which sbatch would pass on; SLURM_CONF stays.

    Not doing so has made jobs resubmit their own controller and halve their GPUs; removing
    SLURM_CONF too (as submitit's clean_env does) loses the cluster.
    """
    leaked = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(OF_THE_JOB) and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(leaked)
