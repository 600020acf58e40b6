"""Hosts of their own for slurm/devcluster: each has its network, name, /tmp and /dev/shm (root).

A host is a process that sleeps in namespaces of its own; what enters these runs on that host. The
switch is one more such process: the links of all hosts meet in a bridge in its network. Nothing has
a name outside: the kernel takes namespaces, links and mounts away when the last process in them
ends, however it ends. So who finds the processes (see devcluster) finds everything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

LOGIN, SWITCH = "login", "switch"
CLIENTS = (
    *("sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol"),
    *("sdiag", "sinfo", "sprio", "squeue", "sreport", "srun", "sshare", "sstat", "strigger"),
)
STALE_S = 20  # how long a host's caches hide what another host has written
ENTERED = "--net --uts --mount --ipc"  # namespaces
# /tmp has a few hundred MB, as on some sites. DEVCLUSTER_HOST comes last: devcluster kills all
# that shares the network of a process that bears it.
HOST = """set -e
name=$1 home=$2; shift 2
ip link set lo up
if [ "$name" = switch ]; then
    ip link add br0 type bridge
    ip link set br0 up
    exec env DEVCLUSTER_HOST="$name" sleep infinity
fi
hostname "$name"
{ echo "127.0.1.1 $name"; cat "$home/etc-hosts"; } > "$home/etc-hosts-$name"  # as Debian has it
mount --bind "$home/etc-hosts-$name" /etc/hosts
if [ "$name" != login ]; then
    new=$home/tmp-$name
    mount -t tmpfs -o size=256m,nr_inodes=20k,mode=1777 none "$new"
    for folder; do  # in /tmp, and seen by all
        mkdir -p "$new${folder#/tmp}"
        mount --bind "$folder" "$new${folder#/tmp}"
    done
    mount --move "$new" /tmp
    mount -t tmpfs -o mode=1777 none /dev/shm
fi
mount -t tmpfs none "$home/bin"  # a host has Slurm's own clients
exec env DEVCLUSTER_HOST="$name" sleep infinity
"""
CLIENT = """#!/bin/sh
# {name} as on the login host of the cluster in {home}.
[ "$SLURM_CONF" = {home}/slurm.conf ] || exec {real} "$@"
pid=$(cat {home}/login.pid)
grep -qzsx DEVCLUSTER={home} "/proc/$pid/environ" || {{  # by now it may be anyone's
    echo "{name}: error: the cluster in {home} has ended" >&2
    exit 1
}}
exec nsenter --target "$pid" {entered} --wdns="$PWD" {real} "$@"
"""


def problem(cached: Sequence[Path], path: str) -> str:
    """Why there can be no such hosts here, in one sentence; empty where there can. `path`: PATH."""
    if os.getuid():
        return "--hosts needs root: it makes network and mount namespaces"
    lacking = [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name, path=path)]
    if lacking:
        return f"--hosts needs {lacking[0]}: apt-get install iproute2 util-linux"
    if cached and not shutil.which("bindfs", path=path):
        return "--cached needs bindfs: apt-get install bindfs"
    if cached and not Path("/dev/fuse").exists():
        return "--cached needs /dev/fuse, which is not here"
    links = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    tried = f"{links} && mount -t tmpfs none /dev/shm"
    command = ["unshare", *ENTERED.split(), "sh", "-c", tried]
    env = {**os.environ, "PATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    words = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"--hosts cannot be had here: {words}" if done.returncode else ""


def address(home: Path, name: str) -> str:
    """The address of a host (login, n1, n2 ...), in a network of this cluster's own."""
    number = zlib.crc32(str(home).encode())
    last = 10 if name == LOGIN else 10 + int(name.removeprefix("n"))
    return f"10.{number % 256}.{number // 256 % 256}.{last}"


def prepare(home: Path, nodes: Sequence[str], shared: Iterable[Path], cached: list[Path]) -> None:
    """Write what the hosts read, and Slurm's clients for the calling shell."""
    (home / "host.sh").write_text(HOST)
    (home / "shared").write_text("".join(f"{folder}\n" for folder in (*shared, *cached)))
    (home / "cached").write_text("".join(f"{folder}\n" for folder in cached))
    lines = ["127.0.0.1 localhost", *(f"{address(home, n)} {n}" for n in (LOGIN, *nodes))]
    (home / "etc-hosts").write_text("\n".join(lines) + "\n")
    for name in nodes:
        (home / f"tmp-{name}").mkdir()
    (home / "bin").mkdir()
    for name in CLIENTS:
        if real := shutil.which(name, path=os.defpath):
            text = CLIENT.format(name=name, home=home, real=real, entered=ENTERED)
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)


def host(home: Path, name: str) -> str:
    """The command of the process that is a host, or the switch."""
    shared = [str(home), *(home / "shared").read_text().split()]
    inner = " ".join(folder for folder in shared if folder.startswith("/tmp/"))
    return f"unshare {ENTERED} sh {home}/host.sh {name} {home} {inner}"


def entering(pid: int) -> str:
    """What stands before a command that is to run on the host of this process."""
    return f"nsenter --target {pid} {ENTERED}"


def plugging(home: Path, name: str, pid: int, switch: int) -> list[str]:
    """The commands that link a host to the switch, where its link has the host's name."""
    here, there = f"{entering(switch)} ip", f"{entering(pid)} ip"
    return [
        f"{here} link add {name} type veth peer name eth0 netns {pid}",
        f"{here} link set {name} master br0 up",
        f"{there} addr add {address(home, name)}/24 dev eth0",
        f"{there} link set eth0 up",
    ]


def cached(home: Path) -> dict[str, str]:
    """Folders that a host sees through caches of its own, as NFS has them, and what shows them."""
    stale = ",".join(f"{kind}_timeout={STALE_S}" for kind in ("attr", "entry", "negative"))
    folders = (home / "cached").read_text().split()
    return {folder: f"bindfs -f -o {stale} {folder} {folder}" for folder in folders}
