"""This process as whatever started it sees it: the only module that reads SLURM_* variables."""

import contextlib
import ctypes
import io
import os
import re
import resource
import signal
import sys
import zlib
from collections.abc import Collection
from pathlib import Path

RANKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LOOPBACK = "127.0.0.1"
LIBC = ctypes.CDLL(None)  # loaded before a fork
PR_SET_PDEATHSIG = 1  # of Linux's prctl
OF_THE_JOB = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
OF_THE_USER = ("SLURM_CONF", "SLURM_CLUSTERS")
OF_TORCH = "TORCHINDUCTOR_CACHE_DIR"
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


def print_anything() -> None:
    """Escape, in what is printed, characters that the terminal's or log's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def die_with(parent: int) -> None:
    """Have this process killed when `parent`, which has started it, dies (Linux)."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # too late: it is dead


def first() -> bool:
    """Whether this is the first rank, which writes files and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def begin() -> None:
    """Take rank and meeting place from Slurm, where it has started this process; print all text."""
    print_anything()
    given = os.environ
    given.update({name: given[slurm] for name, slurm in RANKS.items() if slurm in given})
    if job():
        start = f"{job()}-{given.get('SLURM_RESTART_COUNT', '0')}"
        alone = given.get("SLURM_NNODES", "1") == "1"
        host = given.get("SLURM_LAUNCH_NODE_IPADDR")  # of the first node, where srun runs
        given.update(_meeting(start, LOOPBACK if alone or not host else host))


def _meeting(start: str, address: str) -> dict[str, str]:
    """Where the ranks of a start meet: a port of its own, below any that are given out."""
    port = str(20000 + zlib.crc32(start.encode()) % 12000)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def has_gpu() -> bool:
    """Whether a GPU may be seen from here, without waking its driver."""
    there = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return there and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has had: of the host's memory, and of its GPU (torch's)."""
    found = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    with contextlib.suppress(OSError):  # getrusage counts what has started this process too
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if peak := re.search(r"VmHWM:\s*(\d+) kB", status):
            found["host"] = 1024 * int(peak[1])
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["gpu"] = int(torch.cuda.max_memory_allocated())
    return found


def for_a_task(rank: int, world: int, local: int, start: str, code: Path | None) -> dict[str, str]:
    """The environment of a process started here, which knows nothing of a job around us.

    With `code` it imports the product from that folder, and not from where it starts.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}
    clean |= ranks | _meeting(start, LOOPBACK) | {"PYTHONUNBUFFERED": "1"}
    if code is not None:
        path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        clean |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    return clean


def for_slurm(decided: Collection[str] = ()) -> dict[str, str]:
    """The environment of a client of Slurm: the user's wishes, nothing of the job we are in.

    The job's variables have made jobs resubmit their own controller and halve their GPUs; without
    SLURM_CONF (which submitit's clean_env removes) the cluster is lost. What filters or formats
    answers goes. Wishes stay, as plain sbatch obeys them, but for options that are `decided` (such
    as `partition`): sbatch would let the variable win over the script. Where torch
    keeps compiled code it has itself put into our environment: a folder in the /tmp of this host.
    """
    kept = {*OF_THE_USER, *(f"SBATCH_{w.upper()}" for w in WISHES if w not in decided)}
    ours = Path(os.environ.get(OF_TORCH, "")).name.startswith("torchinductor_")
    dropped = (*OF_THE_JOB, *FILTERS, *([OF_TORCH] if ours else []))
    return {k: v for k, v in os.environ.items() if (k in kept and v) or not k.startswith(dropped)}


def wish(option: str) -> str:
    """What the user's environment asks of sbatch: which clusters, all clients may be told too."""
    of_all = os.environ.get("SLURM_CLUSTERS", "") if option == "clusters" else ""
    return os.environ.get(f"SBATCH_{option.upper()}") or of_all
