"""`alt-hpc plan`, printed just before a controller, is what that controller submits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_faults import STUB, _cluster, client, interpreter, queue, settings

from alt_hpc.__main__ import main
from alt_hpc.graph import Piece
from alt_hpc.run import attempt
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Intent, Submitted

PREEMPTIONS = 3


class Chain:
    """A run whose controllers wait, held, in the queue: each is let go by a call of `step`."""

    def __init__(self, place: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place = place
        self.config = config
        self.capsys = capsys
        self.run = RunFolder(place / "run")
        self.forgetful = False
        self.chosen = [
            f"run={self.run.path}",
            *settings(interpreter(place, stubs=True)),
            *STUB,
            "cluster.controller.sbatch={hold: true}",
        ]

    def fault(self, name: str, action: str) -> None:
        (self.place / "faults" / name).write_text(action)

    def call(self, command: str, *more: str) -> str:
        arguments = [a for chosen in [*self.chosen, *more] for a in ("--set", chosen)]
        self.capsys.readouterr()
        assert main([command, str(self.config), *arguments]) == 0
        return self.capsys.readouterr().out

    def refused(self, command: str, *more: str) -> str:
        arguments = [a for chosen in [*self.chosen, *more] for a in ("--set", chosen)]
        self.capsys.readouterr()
        assert main([command, str(self.config), *arguments]) == 2
        return self.capsys.readouterr().err

    def submit(self, *more: str) -> None:
        self.chosen += more
        self.call("submit")

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.state()}"
            time.sleep(0.2)

    def state(self) -> str:
        """What is known of the run, for people who mend it."""
        jobs = client("squeue", "--array", "--format=%i %j %T %r %N", "--noheader")
        return "\n".join([*map(str, list(self.run.journal)[-30:]), jobs, client("sinfo", "-N")])

    def met(self, fault: str) -> bool:
        """Whether a task has met its fault."""
        return bool(list((self.place / "faults").glob(f".{fault}-*")))

    def restarts(self, name: str) -> int:
        """How often Slurm has started a job again."""
        (job,) = [job for job in queue() if job[1] == name]
        return int(client("scontrol", "show", "job", job[0]).partition("Restarts=")[2].split()[0])

    def quiet(self) -> None:
        """Wait until all that can run has run, and is forgotten where Slurm forgets."""

        def empty() -> bool:
            for line in client("squeue", "--noheader", "--array", "--format=%i %r").splitlines():
                job, _, why = line.partition(" ")
                if "launch failed" in why:  # a busy machine; a chain's controller lets it go too
                    client("scontrol", "release", job)
            return not [job for job in queue() if "controller" not in job[1]]

        self.wait("an empty queue", empty)
        if self.forgetful:
            ended = ["squeue", "--noheader", "--states=all", "--format=%j"]
            self.wait("forgotten", lambda: "run-sample" not in client(*ended))

    def files(self) -> dict[Path, int] | None:
        """When each file of the run was written; None while tasks may write."""
        if any("controller" not in job[1] for job in queue()):
            return None
        return {path: path.lstat().st_mtime_ns for path in self.run.path.rglob("*")}

    def step(self, first: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Print the plan, run the controller, compare; the scripts that it submitted, by key."""
        before = self.files()
        shown = _planned(self.call("plan"))
        assert before is None or before == self.files(), "the plan has written something"
        first()
        known = len(self.run.journal.of(Intent))
        command = [sys.executable, "-m", "alt_hpc", "controller", str(self.run.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        ids = {entry.key: entry.job for entry in self.run.journal.of(Submitted)}
        intents = self.run.journal.of(Intent)[known:]
        happened = {i.key: self._script(i, ids[i.key]) for i in intents}
        assert list(shown) == list(happened), done.stdout + done.stderr
        for key, text in shown.items():
            assert _plain(text, ids) == _plain(happened[key], ids), key
        return happened

    def _script(self, intent: Intent, job: str) -> str:
        folder = self.run.layout.job(intent.iteration, intent.stage, intent.attempt)
        return (folder / f"{job}_submission.sh").read_text()

    def finish(self) -> None:
        for _ in range(20):
            self.quiet()
            if self.run.ended():
                break
            self.step()
        assert self.run.ended() == ("FINISHED", "the run is finished"), self.state()
        assert _planned(self.call("plan")) == {}


def _planned(shown: str) -> dict[str, str]:
    """Scripts of `alt-hpc plan` by the keys of their jobs, in their order."""
    _, *parts = shown.split("\n===== ")
    return {part.split("\n")[0].strip("{}"): part.partition("\n")[2] for part in parts}


def _plain(script: str, ids: dict[str, str]) -> str:
    """With the ids that were given since, and without the quotes that they make needless."""
    for key, job in ids.items():
        script = script.replace(f"{{{key}}}", job)
    return script.replace("'", "").strip()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    yield from _cluster(Path("/tmp") / f"alt-hpc-plan-{os.getpid()}")


@pytest.fixture
def chain(
    cluster: None, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Chain]:
    yield Chain(tmp_path, tiny_config, capsys)
    subprocess.run(["scancel", "--user", os.environ.get("USER", "root")], timeout=60)
    for node in ("n1", "n2", "n3", "n4"):
        resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(resume, timeout=60, capture_output=True)


@pytest.mark.parametrize(("name", "action"), [("sample-1-1", "kill"), ("score-1-2", "exit")])
def test_after_a_task_that_died(chain: Chain, name: str, action: str) -> None:
    """Killed, or ended by exit status 3."""
    chain.fault(name, f"group1 {action}")
    chain.submit("iterations=1")
    assert len(chain.step()) == 9
    chain.quiet()
    again = chain.step()
    assert any("--exclude=n" in text for text in again.values())
    chain.finish()


def test_after_a_node_failed(chain: Chain) -> None:
    """While Slurm's own second start of its task waits, and after that."""
    chain.fault("sample-1-0", "group1 slow")
    chain.submit("iterations=1")
    chain.step()
    chain.wait("the slow task", lambda: chain.met("sample-1-0"))
    (job,) = [j for j in queue() if j[1] == "run-sample-1" and j[0].endswith("_0")]
    client("scontrol", "update", f"NodeName={job[3]}", "State=DOWN", "Reason=test")
    assert chain.step() == {}
    chain.finish()


def test_after_three_preemptions_with_progress(chain: Chain) -> None:
    groups = " ".join(f"group{group}" for group in range(1, 12))
    chain.fault("sample-1-0", f"always {groups} wait")
    chain.chosen += ["sample.group=1", "cluster.sample.shards=1"]
    chain.submit("iterations=1", "cluster.sample.partition=scavenge")
    chain.step()
    piece = Piece(1, "sample")
    for count in range(1, PREEMPTIONS + 1):
        more = attempt.saved(chain.run, piece) + 1
        chain.wait("more groups", lambda more=more: attempt.saved(chain.run, piece) >= more)
        asked = ["--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
        client("sbatch", "--partition=main", "--job-name=controller-of-another", *asked)
        chain.wait("a start anew", lambda n=count: chain.restarts("run-sample-1") >= n)
    assert chain.step() == {}
    chain.finish()
    assert [i.attempt for i in chain.run.journal.of(Intent) if i.stage == "sample"] == [1]


def test_after_a_manifest_was_withdrawn_and_a_policy_made_again(chain: Chain) -> None:
    chain.submit("iterations=2")
    chain.step()
    chain.quiet()
    run, shard = chain.run, Piece(1, "sample", 1)
    run.manifests.withdraw(shard)
    run.manifests.withdraw(Piece(1, "score", 1))
    run.manifests.withdraw(Piece(1, "train"))
    again = chain.step()
    assert [key for key in again if key.startswith("1:")] == [
        "1:sample:2",
        "1:score:2",
        "1:train:2",
    ]
    chain.quiet()
    chain.step()
    chain.quiet()
    made = RunFolder(run.path)
    old = made.manifests.get(Piece(1, "train"))
    assert old is not None
    work = attempt.begin(made, Piece(1, "train"), 9, old.inputs)
    (work.folder / "policy").mkdir()
    (work.folder / "policy/model.safetensors").write_text("other bytes")
    work.commit(["policy/model.safetensors"], rows=1)
    assert {"1:evaluate:2", "2:sample:2", "2:train:2"} <= set(chain.step())
    chain.finish()


def test_after_a_run_was_cancelled_and_when_one_more_iteration_is_asked_for(chain: Chain) -> None:
    """Then a person submits: what was tried before no longer counts."""
    chain.fault("sample-1-0", "group1 slow")
    chain.submit("iterations=1")
    chain.step()
    chain.wait("the slow task", lambda: chain.met("sample-1-0"))
    assert main(["cancel", str(chain.run.path)]) == 0
    chain.quiet()
    chain.step(first=chain.submit)
    chain.finish()
    chain.chosen.append("iterations=2")
    more = chain.step(first=chain.submit)
    assert [key for key in more if not key.startswith("2:")] == []
    chain.finish()


def test_where_an_array_does_not_fit_and_jobs_are_forgotten(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--conf", "MaxJobCount=9", "--conf", "MinJobAge=2", "--max-array", "4")
    for _ in _cluster(Path("/tmp") / f"alt-hpc-small-{os.getpid()}", *options):
        chain = Chain(tmp_path, tiny_config, capsys)
        chain.forgetful = True
        chain.fault("sample-1-1", "group0 kill")
        chain.submit("iterations=1", "cluster.sample.shards=6")
        first = chain.step()
        assert "1:train:1" not in first
        chain.quiet()
        assert "1:sample:2" in chain.step()
        ends = chain.run.journal.outcomes()
        assert ends["1:sample:1", Piece(1, "sample", 1)].state == "UNKNOWN"
        chain.finish()


def test_a_refused_command_leaves_a_queued_run_as_it_is(chain: Chain) -> None:
    """`run` beside its controller, and `submit` with what the cluster has not got."""
    chain.submit("iterations=1")
    before, posts = chain.run.config(), "evaluate.prompts=5"
    ((job, *_),) = queue()
    assert f"goes on on Slurm (controller {job})" in chain.refused("run", posts)
    assert "nowhere" in chain.refused("submit", posts, "cluster.sample.partition=nowhere")
    assert RunFolder(chain.run.path).config() == before
    assert [entry[0] for entry in queue()] == [job]
    assert main(["cancel", str(chain.run.path)]) == 0
