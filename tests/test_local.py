"""This machine as a cluster: real processes, and the end states of Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_tasks import Call, Module

from alt_hpc.clusters.cluster import Asked, Request
from alt_hpc.clusters.local import Element, Local
from alt_hpc.config import Cluster, StageCluster
from alt_hpc.control import start
from alt_hpc.control import status as told

TESTS = str(Path(__file__).parent)
GOOD, BAD = ("0.1", "0"), ("0.1", "1")


@pytest.fixture(autouse=True)
def _stubs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(TESTS).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, root]))


def request(
    folder: Path,
    name: str,
    elements: Sequence[Sequence[str]],
    tasks: int = 1,
    entry: str = "sleep_or_fail",
) -> Request:
    calls = [Call(entry, (str(folder), f"{name}{i}", *words)) for i, words in enumerate(elements)]
    stage = StageCluster(tasks_per_node=tasks)
    return Request(name, "run", name, folder, calls, stage, Cluster())


def running(local: Local) -> dict[str, dict[int, str]]:
    """Elements that have not ended: key -> index -> id."""
    seen = local.look([Asked(key, Path(), None) for key in "ab"])
    found = {key: {i: e.id for i, e in mine.items() if not e.ended} for key, mine in seen.items()}
    return {key: mine for key, mine in found.items() if mine}


def when(folder: Path, name: str, what: str, rank: int = 0) -> float:
    return float((folder / f"{name}.{rank}.{what}").read_text())


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def dies(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def run_out(local: Local) -> dict[str, str]:
    """Run until nothing is left; the states of all elements."""
    while local.turn():
        pass
    return {element.id: element.state for element in local.elements}


def test_a_turn_ends_when_some_element_has(tmp_path: Path) -> None:
    local = Local(slots=3)
    first = local.submit(request(tmp_path, "a", [GOOD, ("1.5", "0")]), ())
    assert [element.id for element in local.turn()] == [f"{first}_0"]
    later = local.submit(request(tmp_path, "b", [BAD]), ())
    assert [element.id for element in local.turn()] == [later]
    assert run_out(local) == {f"{first}_0": "COMPLETED", f"{first}_1": "COMPLETED", later: "FAILED"}
    assert local.turn() == []
    assert when(tmp_path, "b0", "start") < when(tmp_path, "a1", "end")


def test_a_failed_rank_ends_the_others(tmp_path: Path) -> None:
    local = Local(slots=3)
    job = local.submit(request(tmp_path, "a", [()], 3, "one_rank_fails"), ())
    began = time.monotonic()
    assert run_out(local) == {job: "FAILED"}
    assert time.monotonic() - began < 20
    for pid in tmp_path.glob("a0.*.pid"):
        assert dies(int(pid.read_text()))


def test_no_more_processes_at_once_than_slots(tmp_path: Path) -> None:
    local = Local(slots=2)
    local.submit(request(tmp_path, "a", [("0.3", "0")] * 3), ())
    local.submit(request(tmp_path, "b", [("0.3", "0")], tasks=2), ())
    most = 0

    def tick() -> None:
        nonlocal most
        most = max(most, sum(p.poll() is None for e in local.running() for p in e.processes))

    while local.turn(tick):
        pass
    assert most == 2
    ended = max(when(tmp_path, f"a{i}", "end") for i in range(3))
    assert min(when(tmp_path, "b0", "start", rank) for rank in range(2)) >= ended


def test_what_training_waits_for_goes_first(tmp_path: Path) -> None:
    """Evaluations wait while anything else is ready, however early they were submitted."""
    local = Local(slots=1)
    side = replace(request(tmp_path, "a", [GOOD] * 2), side=True)
    local.submit(side, ())
    local.submit(request(tmp_path, "b", [GOOD] * 2), ())
    run_out(local)
    assert when(tmp_path, "a0", "start") >= when(tmp_path, "b1", "end")


def test_a_job_wider_than_the_machine_runs_alone(tmp_path: Path) -> None:
    local = Local(slots=1)
    job = local.submit(request(tmp_path, "a", [GOOD], tasks=2), ())
    assert run_out(local) == {job: "COMPLETED"}


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_the_wait_leaves_no_process_behind(
    tmp_path: Path, reason: type[BaseException]
) -> None:
    local = Local(slots=1)
    local.submit(request(tmp_path, "a", [(), ()], entry="with_child"), ())
    child = tmp_path / "a0.child"

    def tick() -> None:
        if child.exists() and child.read_text():
            raise reason

    with pytest.raises(reason):
        local.turn(tick)
    assert {element.state for element in local.elements} == {"CANCELLED"}
    assert running(local) == {}
    assert dies(int(child.read_text()))
    assert not (tmp_path / "a1.child").exists()


def test_a_task_knows_its_rank_and_nothing_of_an_outer_slurm_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_PROCID", "7")
    seen = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID")
    local = Local(slots=2)
    job = local.submit(request(tmp_path, "a", [seen], tasks=2, entry="show"), ())
    assert running(local) == {"a": {0: job}}
    run_out(local)
    assert running(local) == {}
    for rank in range(2):
        text = (tmp_path / f"a0.{rank}.seen").read_text().split("\n")
        assert text == [f"RANK={rank}", "WORLD_SIZE=2", f"LOCAL_RANK={rank}", "SLURM_JOB_ID=None"]


def test_what_a_task_prints_and_its_traceback_are_in_its_log(tmp_path: Path) -> None:
    local = Local(slots=1)
    job = local.submit(request(tmp_path, "a", [()], entry="no_such_function"), ())
    assert run_out(local) == {job: "FAILED"}
    (log,) = tmp_path.glob("*_log.out")
    assert "no_such_function" in log.read_text()


# ------------------------------------------------------------------ a warm parent


WARM = """
import os, sys, threading
print("torch" in sys.modules, len(os.listdir("/proc/self/task")), os.getsid(0) == os.getpid())
print(os.environ["OMP_NUM_THREADS"], sys.argv[1:])
sys.exit(int(sys.argv[1]))
"""


def warm_request(folder: Path, name: str, statuses: Sequence[str], **more: str) -> Request:
    calls = [Module("warm_stub", (status,)) for status in statuses]
    stage = StageCluster(**more)  # type: ignore[arg-type]
    return Request(name, "run", name, folder, calls, stage, Cluster(), warm=True)


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that says what it finds, where warm and plain processes import it from."""
    (tmp_path / "warm_stub.py").write_text(WARM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    return tmp_path


def test_tasks_are_forked_from_a_parent_that_has_imported_torch(stubs: Path) -> None:
    local = Local(slots=2)
    job = local.submit(warm_request(stubs, "a", ["0", "3"]), ())
    assert run_out(local) == {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED"}
    for index, status in enumerate("03"):
        text = (stubs / f"{job}_{index}_0_log.out").read_text()
        assert text == f"True 1 True\n2 ['{status}']\n"
    local.end_all()
    assert local.warm is not None
    assert not local.warm.lives()


def test_a_stage_with_its_own_interpreter_is_not_forked(stubs: Path) -> None:
    local = Local(slots=1)
    job = local.submit(warm_request(stubs, "a", ["0"], python=sys.executable), ())
    assert run_out(local) == {job: "COMPLETED"}
    assert (stubs / f"{job}_0_log.out").read_text().startswith("False 1 True")
    assert local.warm is None


@pytest.mark.parametrize("early", [True, False])
def test_what_was_forked_ends_with_its_parent(stubs: Path, early: bool) -> None:
    """Also while the parent still imports."""
    (stubs / "warm_stub.py").write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(stubs)!r}, sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    local = Local(slots=1)
    local.submit(warm_request(stubs, "a", ["pid"]), ())

    def tick() -> None:
        if early or ((stubs / "pid").exists() and (stubs / "pid").read_text()):
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        local.turn(tick)
    assert not early or time.monotonic() - began < 5
    assert {element.state for element in local.elements} == {"CANCELLED"}
    assert local.warm is not None
    assert not local.warm.lives()
    assert early or dies(int((stubs / "pid").read_text()))


def test_a_parent_that_dies_takes_its_tasks_along_and_the_next_are_plain(stubs: Path) -> None:
    note = f"import os, pathlib; pathlib.Path({str(stubs / 'pid')!r}).write_text(str(os.getpid()))"
    (stubs / "warm_stub.py").write_text(f"{note}\nimport time; time.sleep(60)")
    local = Local(slots=1)
    first = local.submit(warm_request(stubs, "a", ["0"]), ())

    def tick() -> None:
        if (stubs / "pid").exists() and (stubs / "pid").read_text():
            assert local.warm is not None
            local.warm.process.kill()

    assert [element.state for element in local.turn(tick)] == ["FAILED"]
    assert dies(int((stubs / "pid").read_text()))
    (stubs / "warm_stub.py").write_text(WARM)
    second = local.submit(warm_request(stubs, "b", ["0"]), ())
    assert run_out(local) == {first: "FAILED", second: "COMPLETED"}
    assert (stubs / f"{second}_0_log.out").read_text().startswith("False")


def test_a_parent_that_dies_over_its_imports_costs_no_task(stubs: Path) -> None:
    local = Local(slots=1)
    job = local.submit(warm_request(stubs, "a", ["0"]), ())
    local._start()
    assert local.warm is not None
    local.warm.process.kill()
    assert run_out(local) == {job: "COMPLETED"}


@pytest.mark.parametrize("forked", [True, False])
def test_whoever_is_killed_leaves_no_task_behind(stubs: Path, forked: bool) -> None:
    """The controller itself dies: its parent of tasks notices, and so do plain tasks."""
    note = f"import os, pathlib; pathlib.Path({str(stubs / 'pid')!r}).write_text(str(os.getpid()))"
    (stubs / "warm_stub.py").write_text(f"{note}\nimport time; time.sleep(60)")
    code = (
        "import pathlib; from test_local import Local, warm_request\n"
        f"asked = warm_request(pathlib.Path({str(stubs)!r}), 'a', ['0'])\n"
        f"import dataclasses; asked = dataclasses.replace(asked, warm={forked})\n"
        "local = Local(1); local.submit(asked, ()); local.turn()"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not ((stubs / "pid").exists() and (stubs / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starter.kill()
    starter.wait()
    assert dies(int((stubs / "pid").read_text()))


def test_a_failed_task_is_told_with_the_last_line_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Local(slots=1)
    job = local.submit(request(tmp_path, "a", [()], entry="no_such_function"), ())
    (ended,) = local.turn()
    screen, about = told.Screen(None, local), SimpleNamespace(stage="train", iteration=1)  # type: ignore[arg-type]
    monkeypatch.setattr(Element, "task", about)
    monkeypatch.setattr(told, "_stages", lambda elements: set())  # none is whole
    screen.tell([ended])
    log = tmp_path / f"{job}_0_log.out"
    why = "KeyError: 'no_such_function'"
    assert log.read_text().endswith(f"{why}\n")
    assert capsys.readouterr().err == f"train 1: task 0 failed ({why}); see {log}\n"


# ------------------------------------------------------------------ a person ends a run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_run_leaves_nothing_that_runs(
    tiny_config: Path, tmp_path: Path, number: int
) -> None:
    """Ctrl-C, a terminal that closes; with nohup that changes nothing."""
    program = [sys.executable, "-m", "alt_hpc", "run", str(tiny_config)]
    program += ["--set", f"run={tmp_path}/run"]
    for nohup in [False, True] if number == signal.SIGHUP else [False]:
        command = ["nohup", *program] if nohup else program
        with subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # The tests themselves may be run in the background, or with nohup.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        ) as run:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("run/jobs/*/*_log.out")):
                assert time.monotonic() < deadline
                assert run.poll() is None
                time.sleep(0.1)
            run.send_signal(number)
            if nohup:
                time.sleep(1)
                assert run.poll() is None
                run.send_signal(signal.SIGTERM)
            assert run.wait(30) == start.INTERRUPTED
            assert b"run the same command again to go on" in run.stderr.read()  # type: ignore[union-attr]
        found = subprocess.run(["pgrep", "-f", f"{tmp_path}/run"], capture_output=True, text=True)
        assert found.stdout == ""
        shutil.rmtree(tmp_path / "run")
