"""This process among the others: its rank, its device, and how the ranks find one another."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alt_hpc.errors import InputError

if TYPE_CHECKING:
    import torch

WAIT = timedelta(minutes=10)  # for the other ranks to start; their models load afterwards
KNOCK = timedelta(seconds=10)  # for one try to reach rank 0
COLLECTIVE = timedelta(minutes=30)  # for the slowest rank of a collective: loading, saving


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
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU.

        Under `--gpus-per-task` a process sees only its own GPU, whose index is 0 whatever the
        local rank is: hence the remainder.
        """
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local % torch.cuda.device_count())


def from_environment() -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, which whoever starts the process sets (0, 1, 0).

    Raises
    ------
    InputError
        A value is not a whole number, or they contradict one another.
    """
    rank, world, local = (_number(*v) for v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not 0 <= rank < world or local < 0:
        raise InputError(f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={local} contradict each other")
    return Ranks(rank, world, local)


def connect(meeting: Path, ranks: Ranks, write: Callable[[Path, str], None]) -> None:
    """Join all ranks in one process group (nccl on GPUs, gloo on CPUs), ready for DeepSpeed.

    Rank 0 listens on a port outside the ephemeral range (where any outgoing connection may take
    it first) and only then publishes where, in the file `meeting` on the shared folder. The
    others look for that file. Ranks whose hostname is rank 0's come through the loopback, which
    also serves virtual nodes, whose names resolve nowhere; the others take rank 0's hostname
    where it resolves, else its address.

    Parameters
    ----------
    meeting
        A path that no earlier attempt used. (After a stale file, which leads to a dead port or
        to a stranger without the nonce, ranks look again; it only costs time.)
    ranks
        This process.
    write
        Replaces a file by one with this text, whole or not at all.

    Raises
    ------
    TimeoutError
        Rank 0 could not be reached within `WAIT`.
    RuntimeError
        No port is free, or another rank did not come within `WAIT`.

    Notes
    -----
    Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, DS_ACCELERATOR and
    TORCH_EXTENSIONS_DIR for DeepSpeed, which must not be imported before. Gloo across several
    hosts binds to what the hostname resolves to; where that is wrong set GLOO_SOCKET_IFNAME.
    """
    _prepare_environment(ranks)
    import torch
    from torch.distributed.distributed_c10d import PrefixStore

    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    store = _listen(meeting, ranks, write) if ranks.first else _find(meeting, ranks)
    store.set(f"host-{ranks.rank}", socket.gethostname())
    hosts = {store.get(f"host-{rank}") for rank in range(ranks.world)}
    if len(hosts) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if ranks.device.type == "cuda" else "gloo",
        store=PrefixStore("ranks", store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=COLLECTIVE,
    )
    _prepare_deepspeed(ranks)


def disconnect() -> None:
    """Leave the process group; every rank calls it once its training has ended well."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}: expected a whole number, not '{text}'") from None


def _prepare_environment(ranks: Ranks) -> None:
    """What DeepSpeed reads from the environment, set before it is imported."""
    local = ranks.device.index or 0 if ranks.device.type == "cuda" else ranks.local
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(local))
    # DeepSpeed insists that this, where srun has set it through PMIx, equals LOCAL_RANK.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Compiled operators are shared under ~/.cache by default, and a build that was killed leaves
    # a lock there for which every later process waits for ever.
    folder = tempfile.mkdtemp(prefix="alt-hpc-extensions-")
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _prepare_deepspeed(ranks: Ranks) -> None:
    """Let DeepSpeed take over the process group.

    As the group exists, DeepSpeed does not go looking for MPI. On a CPU it would first compile a
    shared-memory all-reduce (a minute, g++ and ninja needed); it asks this table whether it can,
    and filling the table beforehand also saves it from probing compilers for every operator.
    """
    import deepspeed

    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.utils.set_log_level_from_string("warning")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE)


def _listen(meeting: Path, ranks: Ranks, write: Callable[[Path, str], None]) -> Any:
    """Rank 0: a store that listens, then (not before) the file that says where."""
    nonce = uuid.uuid4().hex
    store, port = _open_store(meeting, ranks)
    store.set("nonce", nonce)
    _announce("127.0.0.1", port)
    place = {"host": socket.gethostname(), "address": _address(), "port": port, "nonce": nonce}
    meeting.parent.mkdir(parents=True, exist_ok=True)
    write(meeting, json.dumps(place))
    return store


def _open_store(meeting: Path, ranks: Ranks) -> tuple[Any, int]:
    """Bind a free port at once: probing it first would leave a moment to lose it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    for port in _ports(str(meeting)):
        try:
            return TCPStore("127.0.0.1", port, ranks.world, True, WAIT, False), port
        except RuntimeError as error:  # taken: DistNetworkError is one
            if "EADDRINUSE" not in str(error) and "in use" not in str(error):
                raise
    raise RuntimeError("no free port between 20000 and 32767 for the ranks to meet at")


def _ports(key: str) -> Iterator[int]:
    """Ports below 32768 and outside the ephemeral range, from a place of this training's own."""
    low, high = _ephemeral()
    free = [port for port in range(20000, 32768) if not low <= port <= high]
    free = free or list(range(10000, 20000))
    start = zlib.crc32(f"{key} {os.getpid()}".encode()) % len(free)
    yield from free[start:] + free[:start]


def _ephemeral() -> tuple[int, int]:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        low, high = (int(word) for word in text.split())
    except (OSError, ValueError):  # not Linux
        return 32768, 60999
    return low, high


def _address() -> str:
    """The address of the interface that leads out of this host (nothing is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: never a real host
        except OSError:  # no route: a machine by itself
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _find(meeting: Path, ranks: Ranks) -> Any:
    """Another rank: wait for the file and join; a stale file is read until it is replaced."""
    deadline = time.monotonic() + WAIT.total_seconds()
    while time.monotonic() < deadline:
        place = _read_place(meeting)
        store = _join(place, ranks) if place else None
        if store is not None:
            return store
        time.sleep(0.1)
    raise TimeoutError(f"{meeting}: rank 0 did not come within {WAIT}")


def _read_place(meeting: Path) -> dict[str, Any] | None:
    # Listing the folder makes an NFS client look again for a file it remembers as absent.
    if not meeting.parent.is_dir() or meeting.name not in os.listdir(meeting.parent):
        return None
    place: dict[str, Any] = json.loads(meeting.read_text(encoding="utf-8"))
    return place


def _join(place: dict[str, Any], ranks: Ranks) -> Any:
    """The store that rank 0 opened, or None where nobody or somebody else listens there."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = _reachable(str(place["host"]), str(place["address"])), int(place["port"])
    try:
        store = TCPStore(host, port, ranks.world, False, KNOCK, False)
        if store.get("nonce").decode() != place["nonce"]:
            return None
    except RuntimeError:  # DistNetworkError and DistStoreError are
        return None
    store.set_timeout(WAIT)
    _announce(host, port)
    return store


def _reachable(host: str, address: str) -> str:
    if host == socket.gethostname():
        return "127.0.0.1"
    try:
        resolved = socket.gethostbyname(host)
    except OSError:
        return address
    return address if resolved.startswith("127.") else host


def _announce(host: str, port: int) -> None:
    """For libraries that open connections of their own."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
