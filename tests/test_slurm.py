"""Real jobs on a real, throw-away Slurm cluster: the chain, its recovery, and its refusals."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from stub_tasks import Call

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.clusters.cluster import Asked, Request
from alt_hpc.clusters.queue import client
from alt_hpc.clusters.slurm import Slurm
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.config import StageCluster
from alt_hpc.control import preview, start
from alt_hpc.graph import Piece
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submitted

ROOT = Path(__file__).parent.parent
LONG_S = 900
UNFINISHED = {"PENDING", "RUNNING", "COMPLETING"}


def _queue() -> list[list[str]]:
    """[element id, name, state] of everything in the queue."""
    text = client("squeue", "--noheader", "--array", "--format=%i %j %T")
    return [line.split() for line in text.splitlines()]


def _await_end(
    folder: RunFolder, watch: Callable[[list[list[str]]], None] = lambda q: None
) -> None:
    """Wait until the run has ended and the queue is empty."""
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        queue = _queue()
        watch(queue)
        if folder.ended() and not queue:
            return
        time.sleep(0.5)
    logs = "\n".join(p.read_text() for p in folder.layout.controller_log.parent.glob("*.log"))
    raise AssertionError(f"the run has not ended: {_queue()}\n{logs}")


def _policy(folder: RunFolder, iteration: int) -> bytes:
    return (folder.layout.policy(iteration) / "model.safetensors").read_bytes()


def test_two_iterations_with_nobody_touching_them(
    slurm: None, tiny_config: Path, tmp_path: Path, undisturbed: RunFolder
) -> None:
    folder = RunFolder(tmp_path / "run")
    environment = os.environ | {"ALT_HPC_PYTHON": sys.executable}
    subprocess.run(
        [
            "sbatch",
            str(ROOT / "slurm" / "controller.sbatch"),
            str(tiny_config),
            "--set",
            f"run={folder.path}",
        ],
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=60,
    )
    together: list[set[str]] = []
    sizes: dict[str, str] = {}

    def watch(queue: list[list[str]]) -> None:
        together.append({name for _, name, state in queue if state == "RUNNING"})
        for job, name, state in queue:
            if name == "run-train-1" and state == "RUNNING":
                sizes.update(
                    part.split("=", 1)
                    for part in client("scontrol", "show", "job", job).split()
                    if part.startswith(("NumNodes=", "NumTasks="))
                )

    _await_end(folder, watch)
    assert folder.ended() == ("FINISHED", "the run is finished")
    assert any({"run-sample-1", "run-score-1"} <= names for names in together), "no overlap"
    assert sizes == {"NumNodes": "2", "NumTasks": "4"}
    submitted = [e.key for e in folder.journal.of(Submitted)]
    assert sorted(submitted) == sorted(
        [f"0:{stage}:1" for stage in ("evaluate", "measure", "report")]
        + [f"{k}:{stage}:1" for k in (1, 2) for stage in folder.graph().stages(k)]
    )
    assert subprocess.run(["sacct"], capture_output=True, timeout=60).returncode != 0
    assert [_policy(folder, k) for k in (1, 2)] == [_policy(undisturbed, k) for k in (1, 2)]


def test_recovers_from_a_failing_shard_a_killed_task_and_a_killed_controller(
    slurm_with_accounting: None,
    tiny_config: Path,
    tmp_path: Path,
    undisturbed: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sample shard 1 dies before Python starts; a score task is killed; a controller too."""
    python = _script(
        tmp_path / "python",
        f"""
        element=$SLURM_JOB_NAME-$SLURM_ARRAY_TASK_ID
        if [ $element = run-sample-1-1 ] && mkdir {tmp_path}/failed; then exit 3; fi
        if [ $element = run-score-1-2 ] && mkdir {tmp_path}/killed; then kill -9 $$; fi
        exec {sys.executable} "$@"
        """,
    )
    (tmp_path / "bin").mkdir()
    _script(
        tmp_path / "bin" / "sbatch",
        f"""
        case "$*" in *controller.sh*|*test-only*) exec /usr/bin/sbatch "$@";; esac
        echo x >> {tmp_path}/calls
        if [ "$(wc -l < {tmp_path}/calls)" = 6 ]; then kill -9 $PPID; exit 1; fi
        exec /usr/bin/sbatch "$@"
        """,
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    folder = RunFolder(tmp_path / "run")
    overrides = [f"cluster.{stage}.python={python}" for stage in ("sample", "score")]
    overrides += [f"run={folder.path}", "iterations=1"]
    arguments = [a for o in overrides for a in ("--set", o)]
    assert main(["submit", str(tiny_config), *arguments]) == 0
    _await_end(folder)
    assert folder.ended() == ("FINISHED", "the run is finished")
    assert (tmp_path / "failed").exists()
    assert (tmp_path / "killed").exists()
    assert len((tmp_path / "calls").read_text().splitlines()) > 6
    assert _policy(folder, 1) == _policy(undisturbed, 1)
    untouched = folder.manifests.get(Piece(1, "sample", 0))
    again = folder.manifests.get(Piece(1, "sample", 1))
    assert untouched is not None
    assert again is not None
    assert (untouched.attempt, again.attempt) == (1, 2)
    assert "COMPLETED" in client("sacct", "--noheader", "--format=State")


def _script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_piece_that_always_fails_stops_the_run_with_one_sentence(
    slurm: None, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Followed with --wait: what the stages are doing is seen until the run has ended."""
    folder = RunFolder(tmp_path / "run")
    arguments = [f"run={folder.path}", "cluster.sample.python=/bin/false", "iterations=1"]
    command = ["submit", "--wait", str(tiny_config)]
    assert main([*command, *[a for o in arguments for a in ("--set", o)]]) == 1
    seen = capsys.readouterr().out
    assert "sample 1        shards 0/3" in seen
    _await_end(folder)
    how, sentence = folder.ended() or ("", "")
    assert how == "STOPPED"
    assert "sample 1 shard 0 failed 3 times" in sentence
    assert str(folder.path / "jobs") in sentence


def test_plan_shows_the_scripts_byte_for_byte(
    slurm: None, tiny_config: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    overrides = [f"run={folder.path}", "cluster.sample.python=/bin/false"]
    config = start.absolute(configs.load(tiny_config, overrides))
    shown = preview.preview(config)
    assert not folder.path.exists()
    assert _queue() == []
    assert main(["submit", str(tiny_config), *[a for o in overrides for a in ("--set", o)]]) == 0
    _await_end(folder)
    submissions = {s.key: s for s in folder.journal.submissions()[0]}
    for key, submission in submissions.items():
        script = folder.path / "jobs" / key.replace(":", "-") / f"{submission.job}_submission.sh"
        if submission.attempt > 1 or not script.exists():
            continue
        planned = shown.split(f"===== {{{key}}}\n")[1].split("\n=====")[0].rstrip("\n")
        for other in submissions.values():
            planned = planned.replace(f"{{{other.key}}}", str(other.job))
        planned = planned.replace("--dependency='", "--dependency=").replace(":'", ":")
        assert script.read_text().rstrip("\n").replace("'", "") == planned.replace("'", "")


BOTH = ["submit", "plan"]
ASKED = {  # what is asked -> the field that is to blame, words about it, who says so
    "partition: nowhere": ("cluster.partition", "no partition 'nowhere'", BOTH),
    "partition: 'main,nowhere'": ("cluster.partition", "no partition 'nowhere'", BOTH),
    "sft: {nodes: 8}": (
        "cluster.sft.nodes",
        "8 nodes asked of partition 'main', which has 4",
        BOTH,
    ),
    "sample: {gpus: 9}": ("cluster.sample", "Slurm would not take this job", ["submit"]),
    "score: {sbatch: {no-such: 1}}": ("cluster.score", "option '--no-such=1'", ["submit"]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_the_cluster_has_not_got_is_refused_before_anything_is_queued(
    slurm: None,
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
) -> None:
    cluster = yaml.safe_load(f"{{{asked}}}")
    config = yaml.safe_load(tiny_config.read_text()) | {"run": str(tmp_path / "run")}
    config["cluster"] = {"backend": "slurm", **cluster}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    field, words, commands = ASKED[asked]
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text == "cluster:")
    for command in commands:
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        found = re.fullmatch(r"alt-hpc: .*config.yaml:(\d+): ([a-z.]+): (.*)", error[0])
        assert found is not None, error[0]
        assert int(found[1]) > line
        assert found[2] == field
        assert words in found[3]
    assert _queue() == []


# ------------------------------------------------------------------ what Slurm tells


def test_a_job_whose_id_was_never_noted_is_seen_whole(slurm: None, tmp_path: Path) -> None:
    """A controller was killed behind its sbatch, and some elements have started since."""
    calls = [Call("sleep_or_fail", (str(tmp_path), f"a{i}", "60", "0")) for i in range(5)]
    place = tmp_path / "job"
    place.mkdir(mode=0o700)
    stage = StageCluster(parallel=2)
    real = Slurm()
    job = real.submit(Request("a", "run", "a", place, calls, stage, ClusterConfig()), [])
    deadline = time.monotonic() + 60
    while len(client("squeue", "--noheader", "--states=RUNNING").splitlines()) < 2:
        assert time.monotonic() < deadline, client("squeue", "--array")
        time.sleep(0.3)
    by_script = real.look([Asked("a", place, None)])
    assert set(by_script["a"]) == {0, 1, 2, 3, 4}
    assert by_script == real.look([Asked("a", place, job)])
    real.cancel(job)
