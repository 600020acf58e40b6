"""Benchmarks of the pipeline on a throw-away Slurm: what waits for what, and many shards."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"

from stub_tasks import Call  # noqa: E402

from alt_hpc import config as configs  # noqa: E402
from alt_hpc.clusters.cluster import Request  # noqa: E402
from alt_hpc.clusters.queue import client  # noqa: E402
from alt_hpc.clusters.slurm import Slurm  # noqa: E402
from alt_hpc.config import Cluster, StageCluster  # noqa: E402
from alt_hpc.control.step import step  # noqa: E402
from alt_hpc.plan import Dependency, Kind  # noqa: E402
from alt_hpc.process import peak_memory  # noqa: E402
from alt_hpc.run.folder import RunFolder  # noqa: E402
from alt_hpc.run.journal import Submitted  # noqa: E402

PORT = 17400
PAPER = 64  # shards of tldr_gptj.yaml


@contextlib.contextmanager
def cluster(place: Path, *options: str) -> Iterator[None]:
    """A Slurm of 4 virtual nodes."""
    script = str(ROOT / "slurm/devcluster")
    where = ["--dir", str(place / "slurm")]
    command = [script, "start", *where, "--port", str(PORT), *options]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    os.environ["SLURM_CONF"] = said.strip().removeprefix("export SLURM_CONF=").strip("'\"")
    try:
        yield
    finally:
        subprocess.run([script, "stop", *where], capture_output=True)
        del os.environ["SLURM_CONF"]


# ---------------------------------------------------------------------- barriers


def makespan(sampling: Sequence[float], scoring: Sequence[float]) -> str:
    """Two iterations of tasks that sleep as long as the real ones took, on 4 nodes of 1 CPU.

    With barriers each stage waits for the whole stage before, as in the paper's scripts; without
    them a shard is scored once it is sampled, and evaluation overlaps the next iteration.
    """
    training, evaluation = sum(scoring) / 2, sum(sampling) / len(sampling)
    seconds = {"sample": sampling, "score": scoring, "train": [training]}
    seconds["evaluate"] = [evaluation] * 4
    took = {}
    with (
        tempfile.TemporaryDirectory(prefix="alt-hpc-benchmark-") as place,
        cluster(Path(place), "--cpus", "1"),
    ):
        for way in ("with barriers", "alt_hpc"):
            began = time.perf_counter()
            _wait(_two_iterations(Path(place) / way, seconds, barriers=way == "with barriers"))
            took[way] = time.perf_counter() - began
    work = 2 * sum(map(sum, seconds.values()))
    lines = [
        f"### Makespan: 2 iterations, {len(sampling)} shards of {min(sampling):.1f} to"
        f" {max(sampling):.1f} s, 4 nodes",
        "",
        "| way | s | with barriers / this |",
        "|---|---|---|",
        *(f"| {way} | {s:.1f} | {took['with barriers'] / s:.2f} |" for way, s in took.items()),
        "",
        f"all tasks' seconds / 4 nodes: {work / 4:.1f}",
    ]
    return "\n".join(lines)


def _two_iterations(place: Path, seconds: dict[str, Sequence[float]], *, barriers: bool) -> str:
    """Submit them; returns the last job."""
    slurm = Slurm()
    evaluate: str | None = None
    last: list[Dependency] = []
    for k in (1, 2):
        chain: dict[str, str] = {}
        for stage, before in itertools.pairwise([None, "sample", "score", "train", "evaluate"]):
            assert before is not None
            stage_after = list(last) if before == "sample" else []
            if stage is not None:
                kind: Kind = "aftercorr" if before == "score" and not barriers else "afterok"
                stage_after.append(Dependency(kind, chain[stage]))
            folder = place / f"{k}-{before}"
            folder.mkdir(parents=True, mode=0o700)
            tasks = [
                Call("sleep_or_fail", (str(folder), str(i), f"{s:.2f}", "0"))
                for i, s in enumerate(seconds[before])
            ]
            name = f"{before}-{k}"
            request = Request(name, "benchmark", name, folder, tasks, StageCluster(), Cluster())
            chain[before] = slurm.submit(request, stage_after)
        evaluate = chain["evaluate"]
        last = [Dependency("afterok", evaluate if barriers else chain["train"])]
    assert evaluate is not None
    return evaluate


def _wait(job: str) -> None:
    while client("squeue", "--noheader", "--format=%i").strip():
        time.sleep(0.2)
    asked = ("--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    states = set(client("squeue", *asked).split())
    assert states == {"COMPLETED"}, states


# ---------------------------------------------------------------------- many shards


def submission() -> str:
    """A controller that submits 2,500 to 10,000 shards of sampling and as many of scoring."""
    lines = [
        "### Submission (held at once, cancelled afterwards)",
        "",
        "| shards | plan and submit, s | the next controller's plan, s | memory, MiB |",
        "|---|---|---|---|",
    ]
    options = ["--max-array", "10002", "--conf", "MaxJobCount=50000"]
    with (
        tempfile.TemporaryDirectory(prefix="alt-hpc-benchmark-") as place,
        cluster(Path(place), *options),
    ):
        for shards in (2500, 5000, 10000):
            found = _submitted(Path(place), shards)
            lines.append(
                f"| {shards} | {found['submit']:.1f} | {found['again']:.1f} | {found['MiB']:.0f} |"
            )
        found = _submitted(Path(place), PAPER)
    lines += ["", f"A controller with {PAPER} shards, from the start of its process to its last"]
    lines[-1] += f" sbatch ({found['jobs']:.0f} of them): {found['controller']:.1f} s"
    return "\n".join(lines)


def _submitted(place: Path, shards: int) -> dict[str, float]:
    """What a process of its own says of submitting so many; then the queue is emptied."""
    command = [sys.executable, __file__, str(place), str(shards)]
    subprocess.run([*command, "prepare"], capture_output=True, check=True)
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    client("scancel", f"--user={getpass.getuser()}")
    _wait_until_empty()
    return found


def _wait_until_empty() -> None:
    while client("squeue", "--noheader", "--format=%i").strip():
        time.sleep(0.5)


def _prepare(place: Path, shards: int) -> None:
    """Freeze a run of that many shards."""
    import tiny
    import transformers

    from alt_hpc.control import start

    home = place / str(shards)
    tiny.folder(home / "policy", "tied")
    classifier = transformers.AutoModelForSequenceClassification
    tiny.folder(home / "reward", "llama", classifier, num_labels=1)
    (home / "data").mkdir()
    row = {"prompt": "SUBREDDIT: r/x\nTITLE: t\nPOST: words\nTL;DR:"}
    for split, count in (("train", shards), ("valid", 4)):
        text = "".join(json.dumps(row) + "\n" for _ in range(count))
        (home / "data" / f"{split}.jsonl").write_text(text)
    (home / "config.yaml").write_text(f"""
run: {home}/run
policy: {{model: {home}/policy}}
reward: {{model: {home}/reward}}
data: {{prompts: {{path: {home}/data}}}}
sample: {{prompts: {shards}, generations: 10, group: 1, replacement: false}}
train: {{deepspeed: {ROOT}/configs/deepspeed/zero2.json}}
cluster:
  backend: slurm
  sbatch: {{hold: true}}
  sample: {{shards: {shards}}}
  score: {{shards: {shards}}}
""")
    start.prepare(configs.load(home / "config.yaml"))


def _submit(place: Path, shards: int) -> dict[str, float]:
    """What a controller does, twice, in a process that has imported no more than one."""
    folder = RunFolder(place / str(shards) / "run")
    if shards == PAPER:
        return _controller(folder)
    began = time.perf_counter()
    done = step(folder, Slurm())
    submit = time.perf_counter() - began
    assert done.refused is None, done.refused
    began = time.perf_counter()
    assert step(folder, Slurm()).plan.jobs == ()
    again = time.perf_counter() - began
    return {"submit": submit, "again": again, "MiB": peak()}


def peak() -> float:
    """The most memory that this program has had, in MiB."""
    return peak_memory()["host"] / 2**20


def _controller(folder: RunFolder) -> dict[str, float]:
    """A whole controller, as its job runs it: seconds from its start to its last sbatch."""
    began = time.time()
    command = [sys.executable, "-m", "alt_hpc", "controller", str(folder.path)]
    subprocess.run(command, check=True, capture_output=True)
    sent = [entry.time for entry in folder.journal.of(Submitted)]
    return {"controller": max(sent) - began, "jobs": len(sent)}


if __name__ == "__main__":
    if sys.argv[3:] == ["prepare"]:
        _prepare(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        print(json.dumps(_submit(Path(sys.argv[1]), int(sys.argv[2]))))
