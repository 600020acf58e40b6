"""Runs that are broken on purpose on a real Slurm cluster, and what must hold when they have ended.

Without `--faults` a representative core runs; with it all of it, and `tests/faults.md` is written:
fault, what happened, time to recover. Stages are stubs (see faulty.py) unless a test says real.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import throwaway
from faults_table import TABLE

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.queue import client
from alt_hpc.control import start, status
from alt_hpc.control import step as steps
from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES, Piece
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Ended, Intent, Queued, Submitted
from alt_hpc.task import StageTask

ROOT = Path(__file__).parent.parent
LONG_S = 420
FULL = pytest.mark.faults


@dataclass
class Site:
    """A cluster, a config and a place for one run that will be broken."""

    place: Path
    config: Path
    expected: dict[int, bytes]
    stages: str = "stub"
    settings: list[str] = field(default_factory=list)
    name: str = "run"
    began: float = 0.0

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.place / self.name)

    @property
    def faults(self) -> Path:
        return self.place / "faults"

    def fault(self, name: str, action: str) -> None:
        (self.faults / name).write_text(action)

    def submit(self, *settings: str) -> int:
        chosen = [f"run={json.dumps(str(self.run.path))}", *self.settings, *settings]
        return main(["submit", str(self.config), *[a for s in chosen for a in ("--set", s)]])

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = LONG_S) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.state()}"
            time.sleep(0.3)

    def state(self) -> str:
        folder = self.run.path / "jobs" / "controller"
        logs = [p.read_text()[-2000:] for p in sorted(folder.glob("*.log"))]
        journal = list(self.run.journal)
        return "\n".join([*map(str, journal[-40:]), *logs, *map(str, queue())])

    def ended(self) -> tuple[str, str]:
        """Wait until the run has ended and the queue is empty."""
        self.wait("the end", lambda: self.run.ended() is not None and not queue())
        return self.run.ended() or ("", "")

    def whole(self, iterations: int = 2) -> None:
        """What must hold after any fault."""
        how, sentence = self.ended()
        assert how == "FINISHED", f"{sentence}\n{self.state()}"
        for k in range(1, iterations + 1):
            assert self.policy(k) == self.expected[k], f"policy {k} differs"
            for stage in ("sample", "score"):
                found = [row["row"] for row in rows.of_stage(self.run, k, stage)]
                assert found == list(range(12)), f"{stage} {k}: {found}"
        for manifest in self.run.path.glob("iterations/*/*/*/manifest.json"):
            made = json.loads(manifest.read_text())
            latest = max(manifest.parent.glob("attempt-*"), key=lambda p: _number(p.name))
            assert latest.name == made["folder"], f"{manifest}: made again though whole"
        tries = self.run.journal.of(Intent)
        assert len(tries) <= 3 * 12 * iterations
        assert queue() == []

    def policy(self, iteration: int) -> bytes:
        return (self.run.path / f"policies/{iteration:03d}/model.safetensors").read_bytes()

    def tell(self, fault: str, happened: str, since: float | None = None) -> None:
        """A row of the table."""
        TABLE.append((fault, self.stages, happened, time.monotonic() - (since or self.began)))


def _number(attempt: str) -> float:
    return float(attempt.removeprefix("attempt-"))


def queue() -> list[list[str]]:
    """[element id, name, state, node] of everything in the queue."""
    text = client("squeue", "--noheader", "--array", "--format=%i %j %T %N")
    return [line.split() for line in text.splitlines()]


def running(name: str) -> list[list[str]]:
    return [job for job in queue() if job[1] == name and job[2] == "RUNNING"]


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def interpreter(place: Path, *, stubs: bool, before: str = "") -> Path:
    """A stage's python whose stages break as `place`/faults says."""
    (place / "faults").mkdir(exist_ok=True)
    return script(
        place / "python",
        f"""export FAULTS={place}/faults STUBS={"1" if stubs else ""}
export PYTHONPATH={ROOT}:{ROOT}/tests
{before}
exec {sys.executable} -u -c 'import faulty; faulty.main()' "$@"
""",
    )


def settings(python: Path, stages: Iterable[str] = STAGES) -> list[str]:
    keys = [STAGES[stage].key for stage in stages]
    return [f"cluster.{key}.python={json.dumps(str(python))}" for key in keys]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One throw-away Slurm cluster for all tests of this file that need no other."""
    place = Path("/tmp") / f"alt-hpc-faults-{os.getpid()}"
    yield from _cluster(place)


def _cluster(place: Path, *options: str) -> Iterator[None]:
    name, value = throwaway.start(place, *options)
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
        throwaway.stop(place)


@pytest.fixture(scope="module")
def stub_expected(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """Policies of an undisturbed run of the stub stages, on this machine."""
    place = tmp_path_factory.mktemp("undisturbed")
    python = interpreter(place, stubs=True)
    chosen = [f"run={place}/run", "cluster.backend=local", "iterations=4", *settings(python), *STUB]
    folder, local = start.prepare(configs.load(tiny_config, chosen)), Local(2)
    while not steps.step(folder, local).plan.finished:
        local.turn()
    files = {k: place / f"run/policies/{k:03d}/model.safetensors" for k in range(1, 5)}
    return {k: file.read_bytes() for k, file in files.items()}


STUB = ["cluster.train.nodes=1", "cluster.train.tasks_per_node=1", "keep=9"]


@pytest.fixture
def site(
    cluster: None, tiny_config: Path, tmp_path: Path, stub_expected: dict[int, bytes]
) -> Iterator[Site]:
    """A run of two iterations with stub stages."""
    python = interpreter(tmp_path, stubs=True)
    yield Site(tmp_path, tiny_config, stub_expected, settings=[*settings(python), *STUB])
    subprocess.run(["scancel", "--user", os.environ.get("USER", "root")], timeout=60)
    for node in ("n1", "n2", "n3", "n4"):
        resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(resume, timeout=60, capture_output=True)
    deadline = time.monotonic() + 30
    while set(client("sinfo", "-h", "-N", "-o", "%T").split()) != {"idle"}:
        assert time.monotonic() < deadline, client("sinfo", "-N")
        time.sleep(0.3)


@pytest.fixture
def real(cluster: None, tiny_config: Path, tmp_path: Path, undisturbed: RunFolder) -> Site:
    """One iteration with real stages; training is 2 nodes x 1 task of DeepSpeed with dropout."""
    python = interpreter(tmp_path, stubs=False)
    expected = {1: (undisturbed.path / "policies/001/model.safetensors").read_bytes()}
    chosen = ["iterations=1", "cluster.sample.shards=1"]
    return Site(
        tmp_path, tiny_config, expected, "real", [*chosen, *settings(python, ("train",)), "keep=9"]
    )


# ------------------------------------------------------------------ nothing


@FULL
def test_nothing_is_broken(site: Site) -> None:
    began = time.monotonic()
    assert site.submit() == 0
    site.whole()
    site.tell("(none)", "undisturbed", began)


@FULL
def test_nothing_is_broken_with_real_training(real: Site) -> None:
    began = time.monotonic()
    assert real.submit() == 0
    real.whole(1)
    real.tell("(none), real", "undisturbed", began)


# ------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    ("fault", "name", "action"),
    [
        ("a task: SIGKILL in the middle of a shard", "sample-1-1", "group1 kill"),
        pytest.param("a task: exits 3 once", "score-1-2", "group1 exit", marks=FULL),
        pytest.param("a task: an exception once", "evaluate-1-0", "start raise", marks=FULL),
        pytest.param("training: killed at step 4 of 6", "train-1-0", "step4 kill", marks=FULL),
        pytest.param(
            "training: killed before its manifest", "train-2-0", "export kill", marks=FULL
        ),
    ],
)
def test_a_task_dies_once(site: Site, fault: str, name: str, action: str) -> None:
    site.fault(name, action)
    began = time.monotonic()
    assert site.submit() == 0
    site.whole()
    assert not (site.faults / name).exists()
    site.tell(fault, "that piece again, and what waited for it", began)


def test_a_shard_goes_on_after_its_last_whole_group(site: Site) -> None:
    site.fault("sample-1-0", "group1 kill")
    assert site.submit("cluster.sample.shards=1", "iterations=1") == 0
    site.whole(1)
    log = "".join(p.read_text() for p in site.run.path.glob("jobs/1-sample-2/*log.out"))
    assert "sample 1 shard 0: 1 of 6 prompt groups kept" in log


def test_a_task_always_fails(site: Site) -> None:
    """Its error stands in the sentence, and in the status until the piece is made."""
    site.fault("score-1-1", "always start raise")
    began = time.monotonic()
    assert site.submit() == 0
    how, sentence = site.ended()
    assert (how, "score 1 shard 1 failed 3 times" in sentence) == ("STOPPED", True)
    assert re.search(r"last FAILED on n\d: ValueError: a fault on purpose;", sentence)
    failed = re.compile(r"^score 1 shard 1: FAILED on n\d: ValueError: a fault on purpose$", re.M)
    assert failed.search(status.status(RunFolder(site.run.path)))
    site.tell("a task: an exception always", f"stopped: “{sentence[9:60]}…”", began)
    (site.faults / "score-1-1").unlink()
    assert site.submit() == 0
    site.whole()
    assert not failed.search(status.status(RunFolder(site.run.path)))


def test_more_is_asked_for_while_the_last_controller_leaves_the_queue(site: Site) -> None:
    """Slurm shows it for a while after the run has ended: a sleeping script of its folder."""
    assert site.submit("iterations=1") == 0
    site.whole(1)
    leaving = script(steps.scripts(site.run) / "leaving.sh", "sleep 300\n")
    client("sbatch", "--job-name=leaving", "--output=/dev/null", str(leaving))
    site.wait("it runs", lambda: bool(running("leaving")))
    assert site.submit() == 0
    client("scancel", "--name=leaving")
    site.whole()


@FULL
def test_death_before_python_starts(site: Site) -> None:
    interpreter(
        site.place,
        stubs=True,
        before=f"[ $SLURM_JOB_NAME = run-sample-1 ] && mkdir {site.place}/once && exit 9",
    )
    began = time.monotonic()
    assert site.submit() == 0
    site.whole()
    site.tell("a task: death before Python starts", "the attempt counts; that shard again", began)


def test_a_node_on_which_every_task_fails_at_once(site: Site) -> None:
    interpreter(site.place, stubs=True, before="[ $SLURMD_NODENAME = n1 ] && exit 1")
    began = time.monotonic()
    assert site.submit() == 0
    site.whole()
    scripts = [p.read_text() for p in site.run.path.glob("jobs/*/*_submission.sh")]
    assert any("--exclude=n1" in text for text in scripts)
    site.tell("a node: every task on it fails at once", "retries exclude that node", began)


@FULL
def test_a_hanging_task_ends_itself(site: Site) -> None:
    site.fault("sample-1-2", "group1 hang")
    began = time.monotonic()
    assert site.submit("cluster.hung_minutes=0.1") == 0
    site.whole()
    log = "".join(p.read_text() for p in site.run.path.glob("jobs/1-sample-1/*log.out"))
    assert "no progress for 6 s" in log
    site.tell("a task: hangs (limit 6 s)", "ends itself, stacks in its log; again", began)


@FULL
def test_a_time_limit_is_no_failure_while_there_is_progress(site: Site) -> None:
    """A shard of 80 s under a limit of 60 s: it asks to be requeued, nothing is lost."""
    site.fault("sample-1-0", "always group1 group2 group3 group4 slow")
    began = time.monotonic()
    assert site.submit("cluster.sample.shards=1", "iterations=1", "cluster.sample.minutes=1") == 0
    site.whole(1)
    happened = f"{_starts(site, '1-sample-1')} starts of one submission"
    site.tell("a task: time limit reached again and again", happened, began)


def _starts(site: Site, job: str) -> int:
    logs = (p.read_text() for p in site.run.path.glob(f"jobs/{job}/*log.out"))
    return sum(text.count("scontrol requeue") for text in logs) + 1


def test_preempted_tasks_go_on(site: Site) -> None:
    site.fault("sample-1-0", "group3 wait")
    began = time.monotonic()
    partition = "cluster.sample.partition=scavenge"
    assert site.submit(partition, "cluster.sample.shards=1", "iterations=1") == 0
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    job = ["sbatch", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 4"]
    client(*job, "--partition=main")
    site.whole(1)
    assert len(site.run.journal.of(Intent)) == 6 + 3
    site.tell("a task: preempted", "Slurm requeues it; goes on inside the shard", began)


# ------------------------------------------------------------------ training, real DeepSpeed


@FULL  # the gate cuts a host off in the midst of training (test_hosts)
@pytest.mark.parametrize(
    ("fault", "action", "more"),
    [
        (
            "training: rank 1 killed at step 3",
            "step3-rank1 kill",
            ["train.checkpoint_minutes=0"],
        ),
        (
            "training: killed while a checkpoint is written",
            "checkpoint3 kill",
            ["train.checkpoint_minutes=0"],
        ),
        ("training: killed while the export is written", "export kill", []),
    ],
)
def test_real_training_is_killed(real: Site, fault: str, action: str, more: list[str]) -> None:
    real.fault("train-1-0", action)
    began = time.monotonic()
    assert real.submit(*more) == 0
    real.whole(1)
    assert not (real.faults / "train-1-0").exists()
    log = "".join(p.read_text() for p in real.run.path.glob("jobs/1-train-2/*log.out"))
    if more:
        assert "resuming after step 2" in log
    real.tell(fault, "goes on from its last whole checkpoint", began)


@FULL
def test_real_training_finds_its_port_in_use(real: Site) -> None:
    real.fault("train-hooks", "")
    real.fault("ports", "hold")
    began = time.monotonic()
    assert real.submit() == 0
    real.whole(1)
    assert (real.faults / "held-ports").exists()
    (ended,) = [e for e in real.run.journal.of(Ended) if e.key.startswith("1:train")]
    assert (ended.state, ended.key) == ("FAILED", "1:train:1")
    real.tell("training: its port already in use", "fails at once; the next try has another", began)


@FULL
@pytest.mark.parametrize("fault", ["down", "preempted"])
def test_real_training_loses_its_nodes(real: Site, fault: str) -> None:
    (real.faults / "slow-steps").touch()
    (real.faults / "train-hooks").touch()
    began = time.monotonic()
    chosen = ["train.checkpoint_minutes=0"]
    chosen += ["cluster.train.partition=scavenge"] if fault == "preempted" else []
    assert real.submit(*chosen) == 0
    real.wait("step 3", (real.faults / "at-3").exists)
    (job,) = running("run-train-1")
    if fault == "down":
        node = client("scontrol", "show", "hostnames", job[3]).split()[1]
        client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    else:
        asked = ["--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 3"]
        client("sbatch", "--partition=main", *asked)
    real.whole(1)
    words = "the node of rank 1 set DOWN" if fault == "down" else "preempted in mid-epoch"
    real.tell(f"training: {words}", "Slurm requeues it; goes on from a checkpoint", began)


# ------------------------------------------------------------------ nodes and daemons


@FULL
def test_a_node_set_down(site: Site) -> None:
    site.fault("sample-1-0", "group1 wait")
    began = time.monotonic()
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(running("run-sample-1")))
    node = running("run-sample-1")[0][3]
    client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    site.whole()
    site.tell("a node: set DOWN", "Slurm requeues its tasks elsewhere", began)


def _node_of_a_slow_task(site: Site) -> str:
    """Submit a run; where its first shard then sleeps for 20 s."""
    site.fault("sample-1-0", "group1 slow")
    assert site.submit() == 0
    site.wait("the slow task", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    (job,) = [j for j in running("run-sample-1") if j[0].endswith("_0")]
    return job[3]


@FULL
def test_a_node_really_dies(site: Site) -> None:
    began = time.monotonic()
    slow = _node_of_a_slow_task(site)
    place = Path(os.environ["SLURM_CONF"]).parent
    node = [str(ROOT / "slurm/devcluster"), "kill-node", "--dir", str(place), slow]
    subprocess.run(node, check=True, timeout=60)
    site.whole()
    node[1] = "start-node"
    subprocess.run(node, check=True, timeout=60)
    site.tell("a node: slurmd and its steps killed", "seen after SlurmdTimeout; requeued", began)


@FULL
@pytest.mark.parametrize("how", ["stopped for 30 s", "killed -9"])
def test_slurmctld_goes_away(
    tiny_config: Path, tmp_path: Path, stub_expected: dict[int, bytes], how: str
) -> None:
    """On a cluster of its own: one that has lost its state gives old job ids again."""
    for _ in _cluster(_elsewhere()):
        python = interpreter(tmp_path, stubs=True)
        chosen = [*settings(python), *STUB]
        _slurmctld_goes_away(Site(tmp_path, tiny_config, stub_expected, settings=chosen), how)


def _slurmctld_goes_away(site: Site, how: str) -> None:
    began = time.monotonic()
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(running("run-sample-1")))
    conf = os.environ["SLURM_CONF"]
    pid = int((Path(conf).parent / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGKILL if "9" in how else signal.SIGTERM)
    time.sleep(2 if "9" in how else 30)
    environment = os.environ | {"DEVCLUSTER": str(Path(conf).parent)}
    command = [shutil.which("slurmctld", path="/usr/sbin:/usr/bin") or "slurmctld", "-f", conf]
    subprocess.run(command, check=True, timeout=60, env=environment)

    def quiet() -> bool:
        return site.run.ended() is not None or not queue() or "held" in status.status(site.run)

    site.wait("an end, an empty queue or one held", quiet)
    happened = "the chain goes on"
    if "held by Slurm" in (told := status.status(site.run)):
        client(*told.splitlines()[-1].partition(": ")[2].split())
        happened = "Slurm holds a job; status says what to type; goes on"
        site.wait("an end or an empty queue", lambda: site.run.ended() is not None or not queue())
    if site.run.ended() is None:  # slurmctld forgot the newest jobs, the next controller too
        assert "submit again to go on" in status.status(site.run)
        assert site.submit() == 0
        happened = "Slurm forgot all jobs; status says so; submitted again, goes on"
    site.whole()
    site.tell(f"slurmctld: {how}", happened, began)


@FULL
def test_slurmd_is_restarted(site: Site) -> None:
    began = time.monotonic()
    node = _node_of_a_slow_task(site)
    pid = (Path(os.environ["SLURM_CONF"]).parent / f"slurmd-{node}.pid").read_text().strip()
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")[:-1]
    environment = dict(v.split(b"=", 1) for v in variables)
    os.kill(int(pid), signal.SIGKILL)
    time.sleep(1)
    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    site.whole()
    assert len(site.run.journal.of(Intent)) == 3 + 2 * 6
    site.tell("slurmd restarted under a task", "the task lives on", began)


# ------------------------------------------------------------------ files


def _damage(site: Site, kind: str) -> Path:
    """Damage sample 1 shard 1 as soon as it is whole, while score 1 shard 1 waits to begin."""
    folder = site.run.layout.piece(Piece(1, "sample", 1))
    site.wait("the shard", (folder / "manifest.json").exists)
    file = folder / "attempt-1/samples.jsonl"
    manifest = folder / "manifest.json"
    match kind:
        case "truncated":
            os.truncate(file, file.stat().st_size // 2)
        case "one byte flipped":
            data = bytearray(file.read_bytes())
            data[40] ^= 1
            file.write_bytes(data)
        case "empty":
            file.write_bytes(b"")
        case "manifest missing":
            manifest.unlink()
        case "manifest of another config":
            text = json.loads(manifest.read_text()) | {"fingerprint": "0" * 64}
            manifest.write_text(json.dumps(text))
    return file


@pytest.mark.parametrize(
    "kind",
    [
        "one byte flipped",
        pytest.param("truncated", marks=FULL),
        pytest.param("empty", marks=FULL),
        pytest.param("manifest missing", marks=FULL),
        pytest.param("manifest of another config", marks=FULL),
    ],
)
def test_a_damaged_shard_is_made_again(site: Site, kind: str) -> None:
    site.fault("score-1-1", "start wait")
    began = time.monotonic()
    assert site.submit() == 0
    _damage(site, kind)
    site.whole()
    site.tell(f"files: a shard {kind}", "the reader refuses it; made again", began)


@FULL
def test_leftovers_of_a_half_written_attempt(site: Site) -> None:
    site.fault("sample-1-0", "always start raise")
    assert site.submit() == 0
    site.ended()
    (site.faults / "sample-1-0").unlink()
    left = site.run.layout.piece(Piece(1, "sample", 0)) / "attempt-4"
    left.mkdir(parents=True)
    (left / "samples.jsonl").write_text('{"row": 0, "prompt": "ha')
    (left / "kept.jsonl").write_text('{"identity": "x", "start": 0, "rows": "[]"}\n{"identity')
    (left.parent / ".manifest.json.1.ab").write_text("{")
    began = time.monotonic()
    assert site.submit() == 0
    site.whole()
    site.tell("files: leftovers of a half-written attempt", "left alone", began)


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb") as filler:
        while filler.write(b"0" * 4096):
            filler.flush()


@FULL
@pytest.mark.parametrize("kind", ["the disk full", "the folder read-only"])
def test_a_disk_that_cannot_be_written(site: Site, kind: str) -> None:
    if os.getuid():
        pytest.skip("mounting a small tmpfs needs root")
    disk = site.place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], check=True)
    try:
        site.name = "disk/run"
        began = time.monotonic()
        if "full" in kind:
            site.fault("score-1-0", "start wait")
            assert site.submit() == 0
            site.wait("scoring", lambda: bool(list(site.faults.glob(".score-1-0*"))))
            _fill(disk / "filler")
        else:  # a mount with writers cannot be made read-only: no job runs yet
            assert site.submit("cluster.controller.sbatch={begin: now+5}") == 0
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        site.wait("an empty queue", lambda: not queue())
        assert site.run.ended() is None or site.run.ended()[0] == "STOPPED"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        (disk / "filler").unlink(missing_ok=True)
        assert site.submit() == 0
        site.whole()
        site.tell(f"files: {kind}", "stops; submitted again when mended, goes on", began)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


# ------------------------------------------------------------------ the controller


DYING = """
import os, signal
if {condition}:
    from alt_hpc.clusters import slurm
    from alt_hpc.run.journal import Journal
    count = [0]
    def dying(function):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == {effect}: os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            return result
        return wrapped
    Journal.record = dying(Journal.record)
    slurm.Slurm.submit = dying(slurm.Slurm.submit)
    slurm.Slurm.submit_controller = dying(slurm.Slurm.submit_controller)
    slurm.Slurm.depend = dying(slurm.Slurm.depend)
"""


@FULL
def test_the_controller_is_killed_at_every_side_effect_in_turn(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first controller dies before its effect n, for every n after it queued its successor."""
    began = time.monotonic()
    for effect in range(2, 60):
        hooks = site.place / f"hooks{effect}"
        hooks.mkdir()
        flag = hooks / "once"
        condition = f"'controller' in ' '.join(sys.orig_argv) and not os.path.exists('{flag}')"
        text = DYING.format(condition=condition, effect=effect)
        text = text.replace("    count = [0]", f"    open('{flag}', 'w').close()\n    count = [0]")
        (hooks / "sitecustomize.py").write_text("import sys\n" + text)
        monkeypatch.setenv("PYTHONPATH", f"{hooks}:{ROOT}:{ROOT}/tests")
        one = Site(site.place / f"e{effect}", site.config, site.expected, settings=site.settings)
        one.place.mkdir()
        assert one.submit("iterations=1") == 0
        one.whole(1)
        if not _first_controller_was_killed(one):
            break  # it had fewer effects: all have been tried
    site.tell(
        f"the controller: killed before each of its {effect - 2} further side effects in turn",
        "its successor goes on",
        began,
    )
    assert effect > 20


def _first_controller_was_killed(site: Site) -> bool:
    first = site.run.journal.of(Queued)[0].job
    return "JobState=FAILED" in client("scontrol", "show", "job", first)


@FULL
def test_two_controllers_at_once_and_again_while_all_runs(site: Site) -> None:
    began = time.monotonic()
    assert site.submit() == 0
    command = [sys.executable, "-m", "alt_hpc", "controller", str(site.run.path)]
    two = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in two] == [0, 0]
    site.wait("sampling", lambda: bool(running("run-sample-1")))
    assert subprocess.run(command, timeout=120, stdout=subprocess.DEVNULL).returncode == 0
    assert site.submit() == 0
    site.whole()
    keys = [e.key for e in site.run.journal.of(Submitted)]
    assert len(keys) == len(set(keys)) == 3 + 2 * 6
    assert subprocess.run(command, timeout=120, stdout=subprocess.DEVNULL).returncode == 0
    assert queue() == []
    happened = "each piece is submitted once"
    site.tell(
        "the controller: twice at once, again while all runs, on a finished run", happened, began
    )


@FULL
def test_squeue_does_not_answer_and_sbatch_refuses_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = site.place / "bin"
    tools.mkdir()
    flags = f"{site.place}/flag"
    in_a_job = "grep -qz ^SLURM_JOB_ID= /proc/$PPID/environ"
    fails = f"{in_a_job} && mkdir {flags}1 2>/dev/null && exit 1"
    script(tools / "squeue", f'{fails}; exec /usr/bin/squeue "$@"\n')
    refuse = f"mkdir {flags}2 2>/dev/null && {{ echo 'sbatch: error: Try later' >&2; exit 1; }}"
    sbatch = f'case "$*" in *controller*|*test-only*) ;; *) {refuse} ;; esac\n'
    script(tools / "sbatch", sbatch + 'exec /usr/bin/sbatch "$@"\n')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    began = time.monotonic()
    assert site.submit("iterations=1") == 0
    site.whole(1)
    assert (site.place / "flag1").exists()
    assert (site.place / "flag2").exists()
    site.tell("squeue does not answer; sbatch refuses once", "backs off and tries again", began)


@FULL
def test_sbatch_refuses_for_good(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = site.place / "bin"
    tools.mkdir()
    words = "sbatch: error: Batch job submission failed: Invalid account or account/partition"
    refuse = f"{{ echo '{words}' >&2; exit 1; }}"
    sbatch = f'case "$*" in *controller*|*test-only*) ;; *) {refuse} ;; esac\n'
    script(tools / "sbatch", sbatch + 'exec /usr/bin/sbatch "$@"\n')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    began = time.monotonic()
    assert site.submit("iterations=1") == 0
    how, sentence = site.ended()
    assert (how, "Invalid account" in sentence) == ("STOPPED", True)
    site.tell("sbatch refuses for good", f"stopped: “{sentence[9:70]}…”", began)


# ------------------------------------------------------------------ strangers' words and secrets


def test_nothing_of_a_config_reaches_a_shell_and_no_secret_is_written(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_planted_7c1d"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.chdir(site.place)
    evil = "a $(touch pwned) `touch pwned`; touch pwned & 'q' \"d\" #"
    site.name = evil
    python = site.place / f"python {evil}"
    (site.place / "python").rename(python)
    site.settings = [*settings(python), *STUB]
    words = json.dumps({"wckey": evil, "mail-user": evil})
    assert site.submit("iterations=1", f"cluster.sample.sbatch={words}") == 0
    site.whole(1)
    assert not list(site.place.rglob("pwned"))
    assert not list(ROOT.glob("pwned"))
    for path in site.run.path.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path


def test_a_run_folder_of_somebody_else(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither submitting, nor a controller, nor a task goes near what may be unpickled there."""
    began = time.monotonic()
    chosen = [f"run={site.run.path}", *site.settings]
    start.prepare(configs.load(site.config, chosen))
    stranger = 65534
    if os.getuid() == 0:
        os.chown(site.run.path, stranger, stranger)
    else:
        monkeypatch.setattr(os, "getuid", lambda: stranger)
    run = str(site.run.path)
    for command in (lambda: site.submit(), lambda: main(["controller", run])):
        assert command() == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert run in sentence
        assert "belong" in sentence
    with pytest.raises(InputError, match="belong"):
        StageTask(run, "sample", 1, (0,), 1).make()
    assert queue() == []
    assert not (site.run.path / "jobs").exists()
    site.tell("files: the folder has a foreign owner", "refused in one sentence", began)


# ------------------------------------------------------------------ limits


@FULL
def test_a_task_exceeds_its_memory(
    tiny_config: Path, tmp_path: Path, stub_expected: dict[int, bytes]
) -> None:
    options = ["JobAcctGatherParams=OverMemoryKill", "JobAcctGatherFrequency=1"]
    for _ in _cluster(_elsewhere(), *[a for o in options for a in ("--conf", o)]):
        python = interpreter(tmp_path, stubs=True)
        site = Site(tmp_path, tiny_config, stub_expected, settings=[*settings(python), *STUB])
        site.fault("sample-1-1", "group1 memory")
        began = time.monotonic()
        assert site.submit("cluster.sample.mem_gb=0.4") == 0
        site.whole()
        end = site.run.journal.outcomes()["1:sample:1", Piece(1, "sample", 1)]
        happened = f"Slurm says {end.state}; the attempt counts; again"
        site.tell("a task: memory exceeded", happened, began)


def _elsewhere() -> Path:
    return Path("/tmp") / f"alt-hpc-limits-{os.getpid()}"


@FULL
@pytest.mark.parametrize(
    ("fault", "options", "happened"),
    [
        ("MaxArraySize=4", ["--max-array", "4"], "several shards a task"),
        (
            "MaxJobCount=9",
            ["--conf", "MaxJobCount=9", "--conf", "MinJobAge=2"],
            "submits what fits, goes on with the rest",
        ),
        ("jobs purged from Slurm's memory after 2 s", ["--conf", "MinJobAge=2"], "goes on"),
    ],
)
def test_limits_of_the_cluster(
    tiny_config: Path,
    tmp_path: Path,
    stub_expected: dict[int, bytes],
    fault: str,
    options: list[str],
    happened: str,
) -> None:
    for _ in _cluster(_elsewhere(), *options):
        python = interpreter(tmp_path, stubs=True)
        site = Site(tmp_path, tiny_config, stub_expected, settings=[*settings(python), *STUB])
        began = time.monotonic()
        assert site.submit("cluster.sample.shards=6") == 0
        site.whole()
        site.tell(fault, happened, began)


@FULL
def test_a_task_of_several_shards_killed_over_its_first(
    tiny_config: Path, tmp_path: Path, stub_expected: dict[int, bytes]
) -> None:
    """Only the shard that it died over has used up a try."""
    for _ in _cluster(_elsewhere(), "--max-array", "4"):
        python = interpreter(tmp_path, stubs=True)
        site = Site(tmp_path, tiny_config, stub_expected, settings=[*settings(python), *STUB])
        site.fault("sample-1-0", "group0 kill")
        began = time.monotonic()
        assert site.submit("cluster.sample.shards=6") == 0
        site.whole()
        lost = site.run.journal.outcomes()
        ends = {
            piece.shard: end.state for (_, piece), end in lost.items() if piece.stage == "sample"
        }
        assert ends == {0: "FAILED", 1: "UNBEGUN"}
        happened = "both again; only the first has used up a try"
        site.tell("a task of several shards: SIGKILL over its first", happened, began)


@FULL
def test_a_submit_limit_of_the_user(
    tiny_config: Path, tmp_path: Path, stub_expected: dict[int, bytes]
) -> None:
    enforce = ["--conf", "AccountingStorageEnforce=limits,qos"]
    for _ in _cluster(_elsewhere(), "--accounting", *enforce):
        client("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=6")
        python = interpreter(tmp_path, stubs=True)
        site = Site(tmp_path, tiny_config, stub_expected, settings=[*settings(python), *STUB])
        began = time.monotonic()
        assert site.submit() == 0
        site.whole()
        site.tell("a QOS with MaxSubmitJobsPerUser=6", "submits what fits, goes on", began)


@FULL
def test_nodes_without_sbatch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is submitted from the login node; a failure stops it until it is submitted again."""
    hooks = site.place / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import os, shutil\n"
        "if 'SLURM_JOB_ID' in os.environ:\n"
        "    which = shutil.which\n"
        "    gone = ('sbatch', 'scontrol')\n"
        "    shutil.which = lambda c, *a, **k: None if c in gone else which(c, *a, **k)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{hooks}:{ROOT}:{ROOT}/tests")
    site.settings.append("cluster.chain=presubmitted")
    site.fault("score-2-1", "start exit")
    began = time.monotonic()
    assert site.submit() == 0
    how, sentence = site.ended()
    assert (how, "sbatch is not on this node" in sentence) == ("STOPPED", True)
    assert site.submit() == 0
    site.whole()
    site.tell("nodes without sbatch (presubmitted), a task fails", "stops; submitted again", began)


# ------------------------------------------------------------------ a person


@FULL
@pytest.mark.parametrize("what", ["one task", "an array", "the controller", "alt-hpc cancel"])
def test_a_person_cancels(site: Site, what: str) -> None:
    site.fault("sample-1-0", "group1 wait")
    began = time.monotonic()
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    job = running("run-sample-1")[0][0]
    if what == "one task":
        client("scancel", job)
    elif what == "an array":
        client("scancel", job.partition("_")[0])
    elif what == "the controller":
        client("scancel", *[j[0] for j in queue() if "controller" in j[1]])
        site.wait("an empty queue", lambda: not queue())
        assert site.run.ended() is None
        assert site.submit() == 0
    else:
        assert main(["cancel", str(site.run.path)]) == 0
        site.wait("an empty queue", lambda: not queue())
        time.sleep(3)
        assert queue() == []
        changes = ["cluster.sample.minutes=7", "cluster.score.mem_gb=0.4"]
        assert site.submit("cluster.partition=main", *changes) == 0
    site.whole()
    again = what in ("the controller", "alt-hpc cancel")
    happened = "submitted again, goes on" if again else "what was cancelled again"
    changed = what == "alt-hpc cancel"
    said = "alt-hpc cancel; then other partition, time and memory" if changed else f"cancels {what}"
    site.tell(f"a person: {said}", happened, began)


@FULL
def test_more_iterations_are_asked_for(site: Site) -> None:
    assert site.submit() == 0
    site.whole()
    began = time.monotonic()
    assert site.submit("iterations=3") == 0
    site.whole(3)
    site.tell("a person: asks for one more iteration", "only that one runs", began)


# ------------------------------------------------------------------ many at once

SHORT = ("kill", "exit", "raise")


def _random_faults(rng: random.Random, iterations: int, count: int) -> dict[str, str]:
    """At most one fault a piece, so that none fails three times."""
    places = {
        "sample": [f"group{g}" for g in range(2)],
        "score": [f"group{g}" for g in range(4)],
        "train": [*(f"step{s}" for s in range(1, STEPS + 1)), "export"],
        "evaluate": ["start"],
        "measure": ["start"],
    }
    pieces = [
        (stage, k, shard)
        for k in range(1, iterations + 1)
        for stage in places
        for shard in range(3 if stage in ("sample", "score") else 1)
    ]
    return {
        f"{stage}-{k}-{shard}": f"{rng.choice(places[stage])} {rng.choice(SHORT)}"
        for stage, k, shard in rng.sample(pieces, count)
    }


STEPS = 6


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=FULL) for s in (2, 3, 4))])
def test_random_sequences_of_faults(site: Site, seed: int) -> None:
    """Tasks die, tasks and controllers are cancelled, a node goes DOWN: 14 faults a run."""
    rng = random.Random(seed)
    faults = _random_faults(rng, 3, 12)
    for name, action in faults.items():
        site.fault(name, action)
    began = time.monotonic()
    assert site.submit("iterations=3") == 0
    site.wait("sampling", lambda: bool(running("run-sample-1")))
    node = rng.choice(["n1", "n2", "n3", "n4"])
    client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    site.wait("the second iteration", lambda: bool(running("run-sample-2")))
    client("scancel", rng.choice(running("run-sample-2") or [["1"]])[0])
    site.whole(3)
    left = [name for name in faults if (site.faults / name).exists()]
    assert not left
    site.tell(f"14 random faults in 3 iterations (seed {seed})", "byte-identical", began)
