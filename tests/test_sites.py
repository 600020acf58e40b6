"""Sites that differ: profiles, banners, refusals and clients that time out, before a real cluster.

Each case was found in public reports of comparable software. A site's peculiarity is a wrapper
before Slurm's command, or a variable of everyone's profile. Stages are stubs (see faulty.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_faults import STUB, Site, _cluster, client, interpreter, queue, running, script, settings

from alt_hpc.__main__ import main
from alt_hpc.clusters.queue import hostnames
from alt_hpc.graph import Piece
from alt_hpc.run import files
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Intent, Submit, Submitted


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    yield from _cluster(Path("/tmp") / f"alt-hpc-sites-{os.getpid()}")


@pytest.fixture
def site(
    cluster: None, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """A run of one iteration with stub stages, and a folder `bin` before Slurm's commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    python = interpreter(tmp_path, stubs=True)
    chosen = [*settings(python), *STUB, "iterations=1"]
    yield Site(tmp_path, tiny_config, {}, "site", settings=chosen, began=time.monotonic())
    subprocess.run(["/usr/bin/scancel", "--user", os.environ.get("USER", "root")], timeout=60)
    deadline = time.monotonic() + 60
    while queue():
        assert time.monotonic() < deadline, queue()
        time.sleep(0.2)


def finished(site: Site, sentence: str = "the run is finished") -> None:
    assert site.ended() == ("FINISHED", sentence), site.state()
    keys = [entry.key for entry in site.run.journal.of(Submitted)]
    assert len(keys) == len(set(keys))


def told(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says; its exit status stands in front."""
    capsys.readouterr()
    status = main(list(command))
    said = capsys.readouterr()
    return f"{status} {said.out}{said.err}"


# ---------------------------------------------------------------------- A: an empty answer


PROFILES = [
    {"SQUEUE_PARTITION": "nowhere"},
    {"SQUEUE_STATES": "RUNNING"},
    {
        **{"SQUEUE_USERS": "nobody", "SQUEUE_ACCOUNT": "none", "SQUEUE_NAMES": "x"},
        **{"SQUEUE_FORMAT": "%u", "SQUEUE_FORMAT2": "user", "SLURM_TIME_FORMAT": "relative"},
        **{"SQUEUE_QOS": "y", "SQUEUE_LICENSES": "z", "SINFO_FORMAT": "%N"},
    },
]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: next(iter(profile)))
def test_a_profile_that_filters_hides_no_job(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    profile: dict[str, str],
) -> None:
    for name, value in profile.items():
        monkeypatch.setenv(name, value)
    site.fault("sample-1-0", "group1 slow")
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    assert "goes on (controller" in told(capsys, "status", str(site.run.path))
    assert site.submit() == 0
    assert "goes on already" in capsys.readouterr().out
    most = len(_all())  # some may end meanwhile
    said = told(capsys, "cancel", str(site.run.path))
    assert 5 <= int(said.partition(" tasks cancelled")[0].split()[-1]) <= most
    site.wait("an empty queue", lambda: not _all())
    again = told(capsys, "cancel", str(site.run.path))
    assert "nothing was found to cancel" in again
    assert len(site.run.journal.of(Intent)) == 9
    site.tell(
        "a profile that filters squeue; cancelled",
        "status, submit and cancel see every job",
        site.began,
    )


def _all() -> list[str]:
    """Every element in the queue, whatever the environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE")}
    command = ["/usr/bin/squeue", "--noheader", "--array", "--all", "--format=%i"]
    return subprocess.run(command, env=clean, capture_output=True, text=True).stdout.split()


def test_one_folder_by_two_names_is_one_run(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = site.place / "real"
    real.mkdir()
    (site.place / "scratch").symlink_to(real)
    site.name = "scratch/s1"
    site.fault("sample-1-0", "group1 slow")
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    submitted = len(site.run.journal.of(Intent))
    monkeypatch.chdir(site.place / "scratch")
    for name in ("s1", str(real / "s1"), f"{site.place}/scratch/../real/s1"):
        assert "goes on (controller" in told(capsys, "status", name)
    site.name = "real/s1"
    assert site.submit() == 0
    assert "goes on already" in capsys.readouterr().out
    assert len(site.run.journal.of(Intent)) == submitted
    assert len([job for job in queue() if "controller" in job[1]]) == 1
    assert "tasks cancelled" in told(capsys, "cancel", str(real / "s1"))
    site.wait("an empty queue", lambda: not queue())
    site.tell("one folder by two names; cancelled", "one run, submitted once")


def test_an_error_at_exit_status_0_is_no_answer(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.fault("sample-1-0", "group1 slow")
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    silent = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 0\n"
    script(site.place / "bin/squeue", silent)
    assert "not known whether it goes on" in told(capsys, "status", str(site.run.path))
    assert told(capsys, "cancel", str(site.run.path)).startswith("2 alt-hpc: Slurm does not answer")
    (site.place / "bin/squeue").unlink()
    finished(site)
    site.tell("squeue prints an error, exit status 0", "not known, asked again")


def test_a_site_that_takes_the_comment_away_loses_no_job(site: Site) -> None:
    """And a controller that dies between sbatch and its note of the id: found by its script."""
    drop = 'sed -i "/--comment/d" "${@: -1}"; exec /usr/bin/sbatch "${@/--comment=*/--comment=x}"\n'
    script(site.place / "bin/sbatch", drop)
    site.fault("sample-1-1", "group1 kill")
    assert site.submit() == 0
    finished(site)
    assert [i.attempt for i in site.run.journal.of(Intent) if i.stage == "sample"] == [1, 2]
    site.tell(
        "a site that drops comments; a task is killed",
        "jobs are known by their scripts",
        site.began,
    )


# ---------------------------------------------------------------------- B: what can never start


def test_more_time_than_the_partition_gives_is_refused(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    client("scontrol", "update", "PartitionName=main", "MaxTime=5")
    try:
        assert site.submit() == 2
        assert "cluster.controller.minutes: 30 minutes asked" in capsys.readouterr().err
        assert site.submit("cluster.controller.minutes=5") == 2
        said = capsys.readouterr().err
        assert ": cluster.minutes: " in said
        assert "20 minutes asked of partition 'main', which gives 5" in said
        assert queue() == []
    finally:
        client("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE")


def test_what_can_never_start_is_told(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """The partition's limit falls after the jobs were taken, and is raised again."""
    site.fault("sample-1-0", "group1 slow")
    assert site.submit() == 0
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    client("scontrol", "update", "PartitionName=main", "MaxTime=5")
    try:
        (score,) = [e.job for e in site.run.journal.of(Submitted) if e.key == "1:score:1"]
        seen = lambda: client("squeue", "--noheader", "--format=%r", f"--jobs={score}")  # noqa: E731
        site.wait("the reason", lambda: "PartitionTimeLimit" in seen())
        said = told(capsys, "status", str(site.run.path))
        assert "can never start: it asks for more time than its partition gives" in said
    finally:
        client("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE")
    finished(site)
    site.tell(
        "a partition's limit falls under its jobs, and rises again",
        "status says which never start; goes on",
        site.began,
    )


def test_a_controller_cancels_what_can_never_start_and_says_why(site: Site) -> None:
    site.fault("sample-1-0", "group1 slow")
    assert site.submit("cluster.controller.sbatch={hold: true}") == 0
    controller = [sys.executable, "-m", "alt_hpc", "controller", str(site.run.path)]
    subprocess.run(controller, capture_output=True, timeout=120, check=True)
    site.wait("sampling", lambda: bool(list(site.faults.glob(".sample-1-0*"))))
    client("scontrol", "update", "PartitionName=main", "MaxTime=5")
    try:
        (score,) = [e.job for e in site.run.journal.of(Submitted) if e.key == "1:score:1"]
        seen = lambda: client("squeue", "--noheader", "--format=%r", f"--jobs={score}")  # noqa: E731
        site.wait("the reason", lambda: "PartitionTimeLimit" in seen())
        subprocess.run(controller, capture_output=True, timeout=120)
        how, sentence = site.run.ended() or ("", "")
        assert how == "STOPPED"
        assert "Slurm would never start it: it asks for more time" in sentence
        site.wait("an empty queue", lambda: not queue())
    finally:
        client("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE")


def test_dependants_that_slurm_leaves_waiting_are_cancelled_and_made_again(site: Site) -> None:
    """Where a site forbids --kill-on-invalid-dep=yes."""
    forbid = (
        'for a in "$@"; do grep -qs -e --kill-on-invalid-dep "$a" && '
        "{ echo 'sbatch: error: do not use that' >&2; exit 1; }; done\n"
        'exec /usr/bin/sbatch "$@"\n'
    )
    script(site.place / "bin/sbatch", forbid)
    site.fault("sample-1-1", "group1 kill")
    assert site.submit("cluster.kill_invalid_dependencies=false") == 0
    finished(site)
    scores = [i.attempt for i in site.run.journal.of(Intent) if i.stage == "score"]
    assert max(scores) >= 2
    site.tell(
        "no --kill-on-invalid-dep; a task is killed",
        "controllers cancel what waits for it, made again",
        site.began,
    )


# ---------------------------------------------------------------------- C: decorated output


BANNER = r"""printf 'Welcome to job 7 of 99\nmaintenance on job 12345 tomorrow\n'
/usr/bin/{name} "$@"; status=$?
printf 'have a nice day\n'; printf 'caf\351 is open\n' >&2
exit $status
"""


def test_banners_and_bytes_of_another_encoding_are_read_over(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sbatch", "squeue", "sinfo", "scontrol", "scancel"):
        script(site.place / "bin" / name, BANNER.format(name=name))
    assert site.submit() == 0
    assert "goes on (controller" in told(capsys, "status", str(site.run.path))
    site.wait("the end", lambda: site.run.ended() is not None and not _all())
    assert site.run.ended() == ("FINISHED", "the run is finished")
    assert len(site.run.journal.of(Intent)) == 9
    site.tell("every client greets, and writes Latin-1", "read over")
    for name in ("sbatch", "squeue", "sinfo", "scontrol", "scancel"):
        (site.place / "bin" / name).unlink()


def test_lists_of_nodes_are_read_as_slurm_reads_them(cluster: None) -> None:
    for listed in ("n1", "n[1-3]", "a1,b[08-11,20],c", "gpu[1-2]-r[3,5]"):
        expected = client("scontrol", "show", "hostnames", listed).split()
        assert list(hostnames(listed)) == expected
    assert hostnames("(null)") == hostnames("") == ()


# ---------------------------------------------------------------------- D: controllers that end


def test_a_file_system_without_locks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock answers ENOSYS, here and in the controllers."""
    hooks = site.place / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import errno, fcntl\n"
        "def flock(*_):\n    raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "fcntl.flock = flock\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{hooks}:{os.environ['PYTHONPATH']}")
    assert site.submit() == 0
    finished(site)
    site.tell("flock answers ENOSYS", "goes on without")


def test_an_error_in_a_controller_is_written_where_status_finds_it(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.submit("cluster.controller.sbatch={hold: true}") == 0
    site.run.layout.config.write_text("{")
    command = [sys.executable, "-m", "alt_hpc", "controller", str(site.run.path)]
    subprocess.run(command, capture_output=True, timeout=120)
    how, sentence = site.run.ended() or ("", "")
    assert how == "STOPPED"
    assert "config.json" in sentence
    site.wait("an empty queue", lambda: not queue())


def test_an_overloaded_slurmctld_stops_no_healthy_run(site: Site) -> None:
    """scontrol update times out four times in a row."""
    busy = "echo 'slurm_update error: Socket timed out on send/recv operation' >&2; exit 1"
    count = f"n=$(ls {site.place} | grep -c ^try$1-); touch {site.place}/try$1-$n-$$"
    script(
        site.place / "bin/scontrol",
        f'if [ "$1" = update ]; then {count}; [ "$n" -lt 4 ] && {{ {busy}; }}; fi\n'
        'exec /usr/bin/scontrol "$@"\n',
    )
    assert site.submit() == 0
    finished(site)
    assert len(list(site.place.glob("tryupdate-*"))) > 4
    site.tell("scontrol update times out four times", "asked again")


# ---------------------------------------------------------------------- E: progress counts


def test_a_time_limit_is_no_failure_where_requeue_is_refused(site: Site) -> None:
    """Asked to stop five times; each time two more groups are safe, and no node is to blame."""
    script(
        site.place / "bin/scontrol",
        '[ "$1" = requeue ] && { echo "Requested operation is presently disabled" >&2; exit 1; }\n'
        'exec /usr/bin/scontrol "$@"\n',
    )
    groups = " ".join(f"group{n}" for n in range(12))
    site.fault("sample-1-0", f"always {groups} wait")
    site.settings += ["sample.group=1", "cluster.sample.shards=1"]
    assert site.submit() == 0
    sample = Piece(1, "sample")
    from alt_hpc.run import attempt

    for stop in range(5):
        more = attempt.saved(site.run, sample) + 1
        site.wait("another group", lambda more=more: attempt.saved(site.run, sample) >= more)
        site.wait("the task", lambda: bool(running("run-sample-1")))
        job = running("run-sample-1")[0][0]
        client("scancel", "--signal=USR2", job)
        site.wait(f"stop {stop}", lambda job=job: job not in [j[0] for j in queue()])
    (site.faults / "sample-1-0").unlink()
    finished(site)
    ends = [e for (_, p), e in site.run.journal.outcomes().items() if p == sample]
    assert [end.state for end in ends] == ["STOPPED"] * 5
    scripts = [p.read_text() for p in site.run.path.glob("jobs/1-sample-*/*_submission.sh")]
    assert not any("--exclude" in text for text in scripts)
    site.tell(
        "asked to stop five times, requeue refused",
        "no try is counted, no node excluded",
        site.began,
    )


# ---------------------------------------------------------------------- F: a site's dialect


def test_options_that_a_site_refuses_are_left_out_and_its_comment_is_given(site: Site) -> None:
    refuse = (
        'all="$*"; [ -f "${@: -1}" ] && all="$all $(grep ^#SBATCH "${@: -1}")"\n'
        'for no in --mem --wckey --requeue; do case "$all" in *$no*) '
        'echo "sbatch: error: $no is not allowed here" >&2; exit 1;; esac; done\n'
        'case "$all" in *project-7*) ;; *) echo "sbatch: error: no comment" >&2; exit 1;; esac\n'
        'exec /usr/bin/sbatch "$@"\n'
    )
    script(site.place / "bin/sbatch", refuse.replace("[ -f", '[[ "$*" != *test-only* ]] && [ -f'))
    test_only = '[[ "$*" == *test-only* ]] && exec /usr/bin/sbatch "$@"\n'
    text = (
        (site.place / "bin/sbatch")
        .read_text()
        .replace("#!/bin/bash\n", "#!/bin/bash\n" + test_only)
    )
    script(site.place / "bin/sbatch", text.removeprefix("#!/bin/bash\n"))
    options = "{mem: false, wckey: false, requeue: false, comment: project-7}"
    assert site.submit(f"cluster.sbatch={options}") == 0
    finished(site)
    site.tell(
        "a site refuses --mem, --wckey, --requeue; wants a comment",
        "left out by false; given beside ours",
        site.began,
    )


def test_the_users_account_and_partition_are_obeyed_but_for_what_the_config_says(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "scavenge")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")  # no wish of this kind: the config has its own
    monkeypatch.setenv("SBATCH_ARRAY_INX", "0-3")
    assert site.submit("cluster.score.partition=main") == 0
    finished(site)
    used = {}
    for entry in site.run.journal.of(Submitted):
        shown = client("scontrol", "show", "job", entry.job)
        used[entry.key] = shown.partition("Partition=")[2].split()[0]
    assert used.pop("1:score:1") == "main"
    assert set(used.values()) == {"scavenge"}
    niced = {p.parent.name for p in site.run.path.glob("jobs/*/*.sh") if "--nice" in p.read_text()}
    sides = ("evaluate", "measure", "report")
    assert niced == {f"{k}-{stage}-1" for k in (0, 1) for stage in sides}


def test_several_clusters_at_once_are_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "dev,other")
    assert site.submit() == 2
    assert "several clusters (dev,other): a run takes one" in capsys.readouterr().err
    monkeypatch.undo()
    assert queue() == []


def test_another_cluster_that_answers_is_not_believed(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """It knows none of the run's jobs, though they may run on."""
    assert site.submit("cluster.controller.sbatch={hold: true}") == 0
    site.run.journal.record(Submit(who="me", cluster="elsewhere"))
    run = str(site.run.path)
    assert "not known whether it goes on" in told(capsys, "status", run)
    assert "its jobs are on cluster 'elsewhere'" in told(capsys, "cancel", run)
    assert site.submit() == 2
    assert "its jobs are on cluster 'elsewhere'" in capsys.readouterr().err
    assert len(queue()) == 1


def test_a_folder_that_keeps_no_modes_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "chmod", lambda *_, **__: None)
    site.run.path.mkdir(mode=0o755)
    assert site.submit() == 2
    assert "must belong to you, with mode 0700" in capsys.readouterr().err
    monkeypatch.undo()
    assert queue() == []


# ---------------------------------------------------------------------- H: errors that stay


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_an_error_that_does_not_get_better_is_tried_once(
    site: Site, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """It ends the run with its own sentence; in a side stage it is kept, and the run goes on."""
    site.fault(f"{stage}-1-0", "always start wrong")
    assert site.submit() == 0
    sentence = f"{stage} 1 shard 0: posts.jsonl:3: a line on purpose"
    tries = lambda: [i for i in site.run.journal.of(Intent) if i.stage == stage and i.iteration]  # noqa: E731
    if stage == "evaluate":
        finished(site, f"the run is finished; but {sentence}")
    else:
        how, said = site.ended()
        assert how == "STOPPED"
        assert sentence in said
    assert len(tries()) == 1
    assert sentence in told(capsys, "status", str(site.run.path))
    assert "exclude" not in "".join(p.read_text() for p in site.run.path.glob("jobs/*/*.sh"))


def test_two_processes_at_once_where_there_are_locks(tmp_path: Path) -> None:
    with files.locked(tmp_path / "lock", 0.0), pytest.raises(files.Locked):  # noqa: SIM117
        with files.locked(tmp_path / "lock", 0.0):
            pass
    assert RunFolder(tmp_path).in_use() is False
