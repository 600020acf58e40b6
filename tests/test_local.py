"""This machine as a cluster: real processes, the dependency meanings and end states of Slurm."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from stub_tasks import Call

from alt_hpc.clusters import Asked, Request
from alt_hpc.clusters.local import Local
from alt_hpc.config import Cluster, StageCluster
from alt_hpc.plan import Dependency

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


def test_afterok_waits_for_every_element_and_runs(tmp_path: Path) -> None:
    local = Local(slots=3)
    first = local.submit(request(tmp_path, "a", [("0.1", "0"), ("0.6", "0")]), ())
    second = local.submit(request(tmp_path, "b", [GOOD]), [Dependency("afterok", first)])
    local.wait([second])
    assert local.states([first, second]) == {
        f"{first}_0": "COMPLETED",
        f"{first}_1": "COMPLETED",
        second: "COMPLETED",
    }
    assert when(tmp_path, "b0", "start") >= when(tmp_path, "a1", "end")


def test_one_failed_element_cancels_afterok_and_all_behind_it(tmp_path: Path) -> None:
    local = Local(slots=3)
    first = local.submit(request(tmp_path, "a", [GOOD, BAD]), ())
    second = local.submit(request(tmp_path, "b", [GOOD]), [Dependency("afterok", first)])
    third = local.submit(request(tmp_path, "c", [GOOD]), [Dependency("afterok", second)])
    anyway = local.submit(request(tmp_path, "d", [GOOD]), [Dependency("afterany", first)])
    element = local.submit(request(tmp_path, "e", [GOOD]), [Dependency("afterok", f"{first}_0")])
    local.wait([second, third, anyway, element])
    states = local.states([first, second, third, anyway, element])
    assert states == {
        f"{first}_0": "COMPLETED",
        f"{first}_1": "FAILED",
        second: "CANCELLED",
        third: "CANCELLED",
        anyway: "COMPLETED",
        element: "COMPLETED",
    }
    assert not (tmp_path / "b0.0.start").exists()
    assert when(tmp_path, "d0", "start") >= when(tmp_path, "a1", "end")


def test_aftercorr_pairs_elements(tmp_path: Path) -> None:
    local = Local(slots=4)
    first = local.submit(request(tmp_path, "a", [GOOD, BAD, ("1.5", "0")]), ())
    second = local.submit(request(tmp_path, "b", [GOOD] * 3), [Dependency("aftercorr", first)])
    local.wait([second])
    assert list(local.states([second]).values()) == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert when(tmp_path, "b0", "start") < when(tmp_path, "a2", "end")  # no barrier
    assert when(tmp_path, "b2", "start") >= when(tmp_path, "a2", "end")


def test_a_failed_rank_ends_the_others(tmp_path: Path) -> None:
    local = Local(slots=3)
    job = local.submit(request(tmp_path, "a", [()], 3, "one_rank_fails"), ())
    began = time.monotonic()
    local.wait([job])
    assert time.monotonic() - began < 20
    assert local.states([job]) == {job: "FAILED"}
    for pid in tmp_path.glob("a0.*.pid"):
        assert dies(int(pid.read_text()))


def test_no_more_processes_at_once_than_slots(tmp_path: Path) -> None:
    local = Local(slots=2)
    narrow = local.submit(request(tmp_path, "a", [("0.3", "0")] * 3), ())
    wide = local.submit(request(tmp_path, "b", [("0.3", "0")], tasks=2), ())
    most = 0

    def tick() -> None:
        nonlocal most
        most = max(most, sum(p.poll() is None for e in local.running() for p in e.processes))

    local.wait([narrow, wide], tick)
    assert most == 2
    ended = max(when(tmp_path, f"a{i}", "end") for i in range(3))
    assert min(when(tmp_path, "b0", "start", rank) for rank in range(2)) >= ended


def test_what_training_waits_for_goes_first(tmp_path: Path) -> None:
    """Evaluations wait while anything else is ready, however early they were submitted."""
    local = Local(slots=1)
    side = replace(request(tmp_path, "a", [GOOD] * 2), side=True)
    evaluation = local.submit(side, ())
    sampling = local.submit(request(tmp_path, "b", [GOOD] * 2), ())
    local.wait([evaluation, sampling])
    assert when(tmp_path, "a0", "start") >= when(tmp_path, "b1", "end")


def test_a_job_wider_than_the_machine_runs_alone(tmp_path: Path) -> None:
    local = Local(slots=1)
    job = local.submit(request(tmp_path, "a", [GOOD], tasks=2), ())
    local.wait([job])
    assert local.states([job]) == {job: "COMPLETED"}


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_the_wait_leaves_no_process_behind(
    tmp_path: Path, reason: type[BaseException]
) -> None:
    local = Local(slots=1)
    job = local.submit(request(tmp_path, "a", [(), ()], entry="with_child"), ())
    child = tmp_path / "a0.child"

    def tick() -> None:
        if child.exists() and child.read_text():
            raise reason

    with pytest.raises(reason):
        local.wait([job], tick)
    assert set(local.states([job]).values()) == {"CANCELLED"}
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
    local.wait([job])
    assert running(local) == {}
    for rank in range(2):
        text = (tmp_path / f"a0.{rank}.seen").read_text().split("\n")
        assert text == [f"RANK={rank}", "WORLD_SIZE=2", f"LOCAL_RANK={rank}", "SLURM_JOB_ID=None"]


def test_what_a_task_prints_and_its_traceback_are_in_its_log(tmp_path: Path) -> None:
    local = Local(slots=1)
    job = local.submit(request(tmp_path, "a", [()], entry="no_such_function"), ())
    local.wait([job])
    assert local.states([job]) == {job: "FAILED"}
    (log,) = tmp_path.glob("*_log.out")
    assert "no_such_function" in log.read_text()
