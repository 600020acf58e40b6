"""Trainings over hosts of their own: each has its network, its name, its /tmp, its clock.

Virtual nodes of one machine share these, and so hide what goes wrong on real clusters.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import throwaway
from test_faults import Site, client, interpreter, queue, running, settings

from alt_hpc import config as configs
from alt_hpc import process
from alt_hpc.control import start
from alt_hpc.run.folder import RunFolder
from alt_hpc.training import ranks

PLACE = Path("/tmp") / f"alt-hpc-hosts-{os.getpid()}"
SIX = ["cluster.train.nodes=3", "cluster.train.tasks_per_node=2"]
SIX += ["train.global_batch=6", "train.micro_batch=1", "train.checkpoint_minutes=0"]
SIX += ["iterations=1", "cluster.sample.shards=1", "keep=9"]
FULL_TMP = "dd if=/dev/zero of=/tmp/full bs=1M; mkdir /tmp/d; i=0; "
FULL_TMP += "while : > /tmp/d/$i; do i=$((i+1)); done"  # neither bytes nor names are left
# libfaketime 0.9.10, told to leave the monotonic clock alone, breaks clock_nanosleep by that clock.
SLEEP = "import select, time\ntime.sleep = lambda s: select.select([], [], [], s) and None\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Three hosts and a login host, for all tests of this file."""
    seen = str(tmp_path_factory.getbasetemp())
    yield from of_hosts(PLACE, "--nodes", "3", "--shared", seen)


def of_hosts(place: Path, *options: str) -> Iterator[None]:
    """A cluster of hosts of their own, and the variables that lead to it."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in throwaway.start_hosts(place, *options).items():
                patch.setenv(name, value)
            yield
    finally:
        throwaway.stop(place)


@pytest.fixture(scope="module")
def undisturbed(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole iteration on one machine; six ranks have trained."""
    place = tmp_path_factory.mktemp("six") / "run"
    chosen = [f"run={place}", "cluster.backend=local", *SIX]
    assert start.run(configs.load(tiny_config, chosen)) == 0
    return RunFolder(place)


@pytest.fixture
def site(
    cluster: None, tiny_config: Path, tmp_path: Path, undisturbed: RunFolder
) -> Iterator[Site]:
    """A run that is whole but for its training: 3 hosts x 2 ranks."""
    expected = {1: (undisturbed.layout.policy(1) / "model.safetensors").read_bytes()}
    chosen = [*SIX, *settings(interpreter(tmp_path, stubs=False), ("train",))]
    one = Site(tmp_path, tiny_config, expected, "real", chosen, began=time.monotonic())
    shutil.copytree(undisturbed.path, one.run.path, symlinks=True)
    for folder in (one.run.layout.jobs, one.run.layout.iterations / "001" / "train"):
        shutil.rmtree(folder)
    one.run.layout.journal.unlink()
    yield one
    subprocess.run(["scancel", "--user", os.environ.get("USER", "root")], timeout=60)
    deadline = time.monotonic() + 60
    while queue() or set(client("sinfo", "-h", "-N", "-o", "%T").split()) != {"idle"}:
        assert time.monotonic() < deadline, (queue(), client("sinfo", "-N"))
        time.sleep(0.3)


def devcluster(command: str, *arguments: str, place: Path = PLACE) -> None:
    words = [throwaway.SCRIPT, command, "--dir", str(place), *arguments]
    subprocess.run(words, check=True, timeout=120)


def log(site: Site) -> str:
    """What the ranks of the first job of training say."""
    return "".join(file.read_text() for file in site.run.path.glob("jobs/1-train-1/*log.out"))


# ------------------------------------------------------------------ the cluster itself


def test_clients_of_the_calling_shell_work_and_hosts_are_apart(
    cluster: None, tmp_path: Path
) -> None:
    ask = 'touch /tmp/of-$(hostname) /dev/shm/of-$(hostname); echo "$(hostname -I) $(hostname)"'
    said = client("srun", "--nodes=3", "sh", "-c", ask).split()
    assert sorted(said[1::2]) == ["n1", "n2", "n3"]
    assert len(set(said[::2])) == 3
    seen = client("srun", "--nodelist=n2", "sh", "-c", "ls -d /tmp/of-* /dev/shm/of-*").split()
    assert sorted(seen) == ["/dev/shm/of-n2", "/tmp/of-n2"]
    assert not list(Path("/tmp").glob("of-n*"))
    names = client("srun", "--nodelist=n1", "getent", "hosts", "n3", "login").split()
    assert names[1::2] == ["n3", "login"]
    wrap = ["sbatch", "--wait", f"--chdir={tmp_path}", "--output=said", "--wrap=squeue -h -o %N"]
    client(*wrap, "--nodelist=n3")
    assert (tmp_path / "said").read_text() == "n3\n"


def _processes(place: Path) -> list[Path]:
    """The processes of a cluster."""
    mark = f"={place}".encode()
    return [p for p in Path("/proc").glob("[0-9]*") if any(mark in v for v in _variables(p))]


def _variables(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _network(process: Path) -> str:
    try:
        return os.readlink(process / "ns" / "net")
    except OSError:
        return ""


@pytest.mark.parametrize("crash", ["of the daemons", "of the start"])
def test_a_stop_after_a_crash_leaves_nothing_behind(crash: str) -> None:
    place, links = Path("/tmp") / f"alt-hpc-crash-{os.getpid()}", socket.if_nameindex()
    try:
        if crash == "of the daemons":
            throwaway.start_hosts(place, "--nodes", "2")
            for process in _processes(place):
                if "slurm" in (process / "comm").read_text():
                    os.kill(int(process.name), signal.SIGKILL)
        else:
            command = [throwaway.SCRIPT, "start", "--hosts", "--dir", str(place)]
            starting = subprocess.Popen(command)
            while len(_processes(place)) < 4:
                assert starting.poll() is None
            starting.kill()
            starting.wait()
        networks = {_network(process) for process in _processes(place)}
    finally:
        devcluster("stop", place=place)
    networks -= {_network(Path("/proc/self")), ""}
    assert networks
    assert not [p for p in Path("/proc").glob("[0-9]*") if _network(p) in networks]
    assert not _processes(place)
    assert not place.exists()
    assert str(place) not in Path("/proc/self/mounts").read_text()
    assert socket.if_nameindex() == links


# ------------------------------------------------------------------ what breaks


def test_a_link_is_cut_in_the_middle_of_training_then_a_host_starts_anew(site: Site) -> None:
    """Slurm starts the job again once all hosts are there; the second comes with an empty /tmp."""
    for name in ("slow-steps", "train-hooks"):
        (site.faults / name).touch()
    assert site.submit() == 0
    for step, fault in ((3, "a cut link"), (6, "a reboot")):
        site.wait(f"step {step}", (site.faults / f"at-{step}").exists)
        assert running("run-train-1")
        if fault == "a cut link":
            devcluster("cut-link", "n3")
            site.wait("the requeue", lambda: not running("run-train-1"))
            devcluster("restore-link", "n3")
        else:
            client("srun", "--overlap", "--nodelist=n2", "--mem=1", "touch", "/tmp/before")
            devcluster("kill-node", "n2")
            devcluster("start-node", "n2")
    (site.faults / "slow-steps").unlink()
    site.whole(1)
    assert log(site).count("resuming after step") >= 2
    left = client("srun", "--nodelist=n2", "ls", "/tmp").split()
    assert "before" not in left
    site.tell("hosts: a link cut in training, then a reboot", "requeued; goes on", site.began)


def test_a_full_tmp_and_clocks_apart_change_nothing(site: Site) -> None:
    """n2 has no room in /tmp; the wall clock of n1 is 90 s ahead of the others'."""
    client("srun", "--nodelist=n2", "sh", "-c", f"({FULL_TMP}) 2> /dev/null; ! touch /tmp/more")
    hooks = site.place / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(SLEEP)
    (faketime,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    ahead = f"LD_PRELOAD={faketime} FAKETIME=+90 FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1"
    ahead += f" PYTHONPATH={hooks}:$PYTHONPATH"
    clock = f"date +%s > {site.faults}/clock-$SLURMD_NODENAME"
    before = f"[ $SLURMD_NODENAME = n1 ] && export {ahead}; {clock}"
    interpreter(site.place, stubs=False, before=before)
    assert site.submit() == 0
    site.whole(1)
    clocks = {f.name: int(f.read_text()) for f in site.faults.glob("clock-*")}
    assert clocks.keys() == {"clock-n1", "clock-n2", "clock-n3"}
    assert 60 < clocks["clock-n1"] - clocks["clock-n2"] < 120
    tried = [p.name for p in site.run.path.glob("jobs/*-*")]
    assert all(name.endswith("-1") for name in tried), tried
    client("srun", "--nodelist=n2", "rm", "-r", "/tmp/full", "/tmp/d")
    site.tell("hosts: /tmp full on one, clocks 90 s apart", "as if nothing was", site.began)


def test_torchs_folder_of_one_host_is_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing transformers puts it into the environment of who submits."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_me")
    assert "TORCHINDUCTOR_CACHE_DIR" not in process.for_slurm()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/mine")
    assert process.for_slurm()["TORCHINDUCTOR_CACHE_DIR"] == "/scratch/mine"


def test_gloo_gets_the_interface_that_leads_to_the_others() -> None:
    assert ranks.leading_to("127.0.0.1") == "lo"
    assert ranks.leading_to("no such address") == ""
