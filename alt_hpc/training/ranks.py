"""This process among the ranks of a training: its number, its device, how they come together."""

import atexit
import contextlib
import fcntl
import os
import shutil
import socket
import struct
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from alt_hpc.errors import InputError
from alt_hpc.process import LOOPBACK

if TYPE_CHECKING:
    import torch

SIOCGIFADDR = 0x8915  # of Linux: an interface's address (netdevice(7))
WAIT = timedelta(minutes=30)  # for the slowest rank: starting, loading, saving


@dataclass(frozen=True)
class Ranks:
    """One process of a training: `rank` of `world`, the `local`-th on its node."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and logs."""
        return self.rank == 0

    @property
    def device(self) -> "torch.device":
        """The GPU of this process, or the CPU.

        Under `--gpus-per-task` it sees only its own GPU, index 0 whatever `local` is: hence %.
        """
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local % torch.cuda.device_count())


def from_environment() -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, which whoever starts the process sets (0, 1, 0).

    InputError where they are no whole numbers, or contradict one another.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    given = {name: os.environ.get(name, value) for name, value in alone.items()}
    try:
        rank, world, local = map(int, given.values())
    except ValueError:
        raise InputError(f"expected whole numbers, not {given}") from None
    if not 0 <= rank < world or local < 0:
        raise InputError(f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={local} contradict each other")
    return Ranks(rank, world, local)


def leading_to(address: str) -> str:
    """The network interface by which this host reaches an IPv4 address; empty where none does."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            mine = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # one without an address
                    found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                    if found[20:24] == mine:
                        return name
    except OSError:
        pass
    return ""


def connect(ranks: Ranks) -> None:
    """Join all ranks in one process group (nccl on GPUs, gloo on CPUs), ready for DeepSpeed.

    They come together at MASTER_ADDR and MASTER_PORT, which whoever starts the processes sets
    (`env://` of torch.distributed). A port that is taken ends the attempt: the next one has
    another. Gloo would bind to what the hostname resolves to, on Debian an address of loopback: it
    gets the interface that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME is set. Sets what
    DeepSpeed reads from the environment; it must not be imported before.
    """
    import torch

    on_gpu = ranks.device.type == "cuda"
    local = ranks.device.index if on_gpu else ranks.local
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(local))
    # DeepSpeed insists that this, where srun has set it through PMIx, equals LOCAL_RANK.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    if ranks.world == 1:  # it meets nobody, and any port will do
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
    if interface := leading_to(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Compiled operators are shared under ~/.cache by default, and a build that was killed leaves
    # a lock there for which every later process waits for ever.
    os.environ["TORCH_EXTENSIONS_DIR"] = folder = tempfile.mkdtemp(prefix="alt-hpc-extensions-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if on_gpu:
        torch.cuda.set_device(ranks.device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=WAIT, rank=ranks.rank, world_size=ranks.world
    )

    import deepspeed

    # As the group exists, DeepSpeed does not go looking for MPI. On a CPU it would first compile a
    # shared-memory all-reduce (a minute, g++ and ninja needed); it asks this table whether it can,
    # and filling the table beforehand also saves it from probing compilers for every operator.
    if not on_gpu:
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.utils.set_log_level_from_string("warning")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=WAIT)


def disconnect() -> None:
    """Leave the process group; every rank calls it once its training has ended well."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
