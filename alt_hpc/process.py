"""This process as whatever started it sees it: the only module that reads SLURM_* variables."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection
from pathlib import Path

RANKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LOOPBACK = "127.0.0.1"
START = "ALT_HPC_START"  # unique to one start of a job, the same for its ranks
OF_THE_JOB = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
OF_THE_USER = ("SLURM_CONF", "SLURM_CLUSTERS")
FILTERS = ("SQUEUE_", "SINFO_", "SCONTROL_", "SACCT_", "SACCTMGR_")
WISHES = ("account", "partition", "qos", "reservation", "constraint", "clusters", "wckey")


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
    """Take rank, start and meeting place from Slurm, where it has started this process."""
    for name, slurm in RANKS.items():
        if slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    if job():
        os.environ[START] = f"{job()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        alone = os.environ.get("SLURM_NNODES", "1") == "1"
        first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")  # srun runs on the first node
        os.environ.update(_meeting(start(), LOOPBACK if alone or not first else first))


def _meeting(start: str, address: str) -> dict[str, str]:
    """Where the ranks of a start come together: a port of its own, below any that are given out."""
    return {"MASTER_ADDR": address, "MASTER_PORT": str(20000 + zlib.crc32(start.encode()) % 12000)}


def has_gpu() -> bool:
    """Whether a GPU may be seen from here, without waking its driver."""
    there = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return there and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def for_a_task(
    rank: int, world: int, local: int, start: str, code: Path | None = None
) -> dict[str, str]:
    """The environment of a process started here, which knows nothing of a job around us.

    With `code` it imports the product from that folder, and not from where it starts.
    """
    if code is not None:
        path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        return for_a_task(rank, world, local, start) | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    return (
        clean
        | _meeting(start, LOOPBACK)
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(local),
            START: start,
            "PYTHONUNBUFFERED": "1",
        }
    )


def for_slurm(decided: Collection[str] = ()) -> dict[str, str]:
    """The environment of a client of Slurm: the user's wishes, nothing of the job we are in.

    Passing on the job's variables has made jobs resubmit their own controller and halve their
    GPUs; removing SLURM_CONF too (as submitit's clean_env does) loses the cluster. Variables that
    filter or format answers go. Of sbatch's the user's account, partition and the like stay, as
    plain sbatch obeys them, but for options that are `decided` (by their names, as `partition`):
    sbatch would let the variable win over the script.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*OF_THE_JOB, *FILTERS))}
    kept = {k: os.environ[k] for k in OF_THE_USER if k in os.environ}
    wishes = {
        name: value
        for option in WISHES
        if option not in decided and (value := os.environ.get(name := f"SBATCH_{option.upper()}"))
    }
    return clean | kept | wishes


def wish(option: str) -> str | None:
    """What the user's environment asks of sbatch."""
    return os.environ.get(f"SBATCH_{option.upper()}") if option in WISHES else None


def clusters() -> str | None:
    """The cluster, or the clusters, that the user's environment names instead of this one."""
    return os.environ.get("SBATCH_CLUSTERS") or os.environ.get("SLURM_CLUSTERS")
