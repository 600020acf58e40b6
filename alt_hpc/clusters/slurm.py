"""Slurm: jobs through submitit, states from squeue, limits from scontrol."""

from __future__ import annotations

import contextlib
import getpass
import operator
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from alt_hpc import process
from alt_hpc.clusters import QueueUnknown, Request, SubmissionRefused
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.errors import InputError
from alt_hpc.plan import Dependency, Limits

CLIENT_TIMEOUT_S = 60  # Slurm's clients retry for long when slurmctld is away
CONTROLLER = "controller"  # the key of a controller's own job
CONTROLLERS = 3  # of a run for which room is left: one that runs, its successor, and the next
WRONG_FOR_GOOD = (
    "invalid partition",
    "invalid account",
    "invalid qos",
    "invalid feature",
    "invalid generic resource",
    "invalid job array",
    "node configuration is not available",
    "partition configuration not available",
    "node count specification invalid",
    "time limit is invalid",
    "more processors requested",
    "memory specification can not be satisfied",
    "permission denied",
    "unrecognized option",
)
LIMITED = ("limit", "job violates accounting", "temporarily unable to accept")


def client(*command: str, timeout: float = CLIENT_TIMEOUT_S) -> str:
    """Output of a Slurm client; raises `subprocess.SubprocessError` or `OSError`."""
    with process.outside_the_job():
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    return done.stdout


def available() -> bool:
    """Whether this machine has Slurm's clients."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol", "srun"))


class Slurm:
    """The Slurm cluster that SLURM_CONF (or the site's default) names."""

    def __init__(self) -> None:
        if not available():
            raise InputError("Slurm's commands (sbatch, squeue, scontrol, srun) are not on PATH")

    def limits(self, common: ClusterConfig, run_id: str) -> Limits:
        """What Slurm says that it takes: MaxArraySize, MaxJobCount, and this user's own limits.

        This run's controllers have room of their own, so that it is the same before one of them
        and within it.
        """
        settings = _settings()
        # submitit's indices run from 0, and the largest that Slurm takes is MaxArraySize - 1.
        array = max(1, int(settings.get("MaxArraySize", "1001")))
        rooms = [int(settings.get("MaxJobCount", "10000")) - len(_all_jobs("--states=all"))]
        if "limits" in settings.get("AccountingStorageEnforce", ""):
            mine = len(_all_jobs(f"--user={getpass.getuser()}"))
            rooms += [limit - mine for limit in _submit_limits(common.account, common.qos)]
        room = min(rooms) + len(self.controllers(run_id)) - CONTROLLERS
        return Limits(array, max(0, room))

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """One sbatch: an array through submitit, or a plain job for a single element."""
        executor = _executor(request, after)
        try:
            with process.outside_the_job():
                jobs = executor.map_array(operator.call, request.tasks)
        except (FailedJobError, RuntimeError) as error:
            raise refused(error) from error
        return jobs[0].job_id.partition("_")[0]

    def element(self, job: str, index: int, count: int) -> str:
        """submitit turns a one-element array into a plain job."""
        return job if count == 1 else f"{job}_{index}"

    def in_flight(self, run_id: str) -> dict[str, dict[int, str]]:
        """Elements of this run's jobs that squeue lists as pending, running or about to end.

        One that is COMPLETING may yet be started again: Slurm shows what it requeues so.
        """
        found: dict[str, dict[int, str]] = {}
        for job, comment, _, _ in _squeue():
            if not comment.startswith(_comment(run_id)):
                continue
            index = job.partition("_")[2]
            key = comment.removeprefix(_comment(run_id))
            found.setdefault(key, {})[int(index) if index.isdigit() else 0] = job
        return found

    def held(self, run_id: str) -> dict[str, str]:
        """This run's jobs that will not start by themselves, with Slurm's reason."""
        mine = (row for row in _squeue() if row[1].startswith(_comment(run_id)))
        return {
            job: why for job, _, state, why in mine if state == "PENDING" and "held" in why.lower()
        }

    def release(self, job: str) -> None:
        """Let a held job start again."""
        client("scontrol", "release", job)

    def ends(self, jobs: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """State and nodes of elements as slurmctld remembers them (`scontrol show job`)."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        for job in jobs:
            with contextlib.suppress(subprocess.CalledProcessError):  # purged
                for block in client("scontrol", "show", "job", job).split("\n\n"):
                    facts = dict(re.findall(r"(\w+)=(\S+)", block))
                    if "JobId" in facts:
                        end = facts["JobState"], _hostnames(facts.get("NodeList", ""))
                        found |= dict.fromkeys(_elements(facts), end)
        return found

    # ------------------------------------------------------------------ the controller's own job

    def submit_controller(
        self, script: Path, log: Path, run: str, run_id: str, common: ClusterConfig, after: str
    ) -> str:
        """Queue a controller: `singleton` under a name of its own, so that one runs at a time."""
        flags = controller_options(run, run_id, common)
        flags += [f"--output={log}", "--open-mode=append"]
        flags += [f"--dependency={','.join(filter(None, [after, 'singleton']))}"]
        try:
            return client("sbatch", "--parsable", *flags, str(script)).split(";")[0].strip()
        except (subprocess.SubprocessError, OSError) as error:
            raise refused(error) from error

    def controllers(self, run_id: str) -> dict[str, str]:
        """Controllers of this run in the queue: job id -> state."""
        comment = _comment(run_id, CONTROLLER)
        return {job: state for job, c, state, _ in _squeue() if c == comment}

    def depend(self, job: str, dependency: str) -> None:
        """Change what a pending job waits for."""
        client("scontrol", "update", f"JobId={job}", f"Dependency={dependency}")

    def start_after(self, job: str, minutes: int) -> None:
        """Keep a pending job from starting for a while."""
        client("scontrol", "update", f"JobId={job}", f"StartTime=now+{minutes}minutes")

    def cancel(self, *jobs: str) -> None:
        if jobs:
            client("scancel", *jobs)

    # ------------------------------------------------------------------ checks before submitting

    def check(self, common: ClusterConfig) -> None:
        """Stop with one sentence on an unknown partition or more nodes than a partition has."""
        known: dict[str, int] = {}
        first = None
        for line in _sinfo("%P|%D").splitlines():
            name, _, nodes = line.partition("|")
            first = name.rstrip("*") if name.endswith("*") else first
            known[name.rstrip("*")] = known.get(name.rstrip("*"), 0) + int(nodes)
        for name, stage in common.stages().items():
            named = stage.partition or common.partition or first or ""
            where = "cluster.partition" if not stage.partition else f"cluster.{name}.partition"
            partitions = named.split(",")  # Slurm takes the one that can start the job first
            for partition in partitions:
                if partition not in known:
                    raise InputError(
                        f"no partition '{partition}' here (there are: {', '.join(known)})", where
                    )
            most = max(known[partition] for partition in partitions)
            if stage.nodes > most:
                raise InputError(
                    f"{stage.nodes} nodes asked of partition '{named}', which has {most}",
                    f"cluster.{name}.nodes",
                )

    def test(self, request: Request, field: str) -> None:
        """Ask Slurm itself whether it would take such a job (`sbatch --test-only`)."""
        text = script(request, ())
        with process.outside_the_job():
            done = subprocess.run(
                ["sbatch", "--test-only"],
                input=text,
                capture_output=True,
                text=True,
                timeout=CLIENT_TIMEOUT_S,
            )
        if done.returncode:
            words = _telling(done.stderr.replace("allocation failure: ", ""))
            raise InputError(f"Slurm would not take this job: {words}", field)


def script(request: Request, after: Sequence[Dependency]) -> str:
    """The sbatch script byte for byte as `Slurm.submit` would hand it over; needs no Slurm."""
    executor = _executor(request, after)
    if len(request.tasks) > 1:
        executor.parameters["map_count"] = len(request.tasks)
    command = executor._submitit_command_str
    text: str = executor._make_submission_file_text(command, "")
    return text


def _executor(request: Request, after: Sequence[Dependency]) -> SlurmExecutor:
    stage, common = request.stage, request.common
    python = shlex.quote(stage.python or sys.executable)
    executor = _Executor(folder=request.folder, python=python)
    cpus = stage.cpus or request.threads
    minutes = stage.minutes or common.minutes
    excluded = _sparable(request, stage.partition or common.partition)
    container = [f"--container-image={stage.container}"] if stage.container else []
    parameters: dict[str, Any] = {
        "job_name": request.name,
        "comment": _comment(request.run_id, request.key),
        "time": minutes,
        "nodes": stage.nodes,
        "ntasks_per_node": stage.tasks_per_node,
        "cpus_per_task": cpus,
        "gpus_per_node": stage.gpus * stage.tasks_per_node or None,
        "partition": stage.partition or common.partition,
        "account": common.account,
        "qos": common.qos,
        "signal_delay_s": min(90, 6 * minutes),
        "array_parallelism": stage.parallel,
        "stderr_to_stdout": True,
        # srun does not inherit --cpus-per-task; one dead rank must end the others
        "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", *container],
        "additional_parameters": {
            "requeue": True,
            **({"mem": megabytes(stage.mem_gb)} if stage.mem_gb else {}),
            **({"exclude": ",".join(excluded)} if excluded else {}),
            **({"kill-on-invalid-dep": "yes"} if after else {}),
            **({"dependency": dependency_text(after)} if after else {}),
            **common.sbatch,
            **stage.sbatch,
        },
    }
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    return executor


def _sparable(request: Request, partition: str | None) -> list[str]:
    """Of the nodes to exclude, the first ones without which the partition still has enough."""
    if not request.exclude:
        return []
    where = (f"--partition={partition}",) if partition else ()
    usable = "--states=idle,mixed,alloc,comp"
    try:
        text = client("sinfo", "--noheader", "--Node", "--format=%N", usable, *where)
    except (subprocess.SubprocessError, OSError):
        return []
    left, excluded = set(text.split()), []
    for node in request.exclude:
        if node not in left or len(left) > request.stage.nodes:
            left.discard(node)
            excluded.append(node)
    return excluded


class _Executor(SlurmExecutor):
    """submitit's, but for sbatch, which waits for ever where there is no room for a job.

    And it can be had without srun, as `alt-hpc plan` may run anywhere.
    """

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", str(CLIENT_TIMEOUT_S), "sbatch", str(submission_file_path)]


def megabytes(gigabytes: float) -> str:
    """Slurm takes whole numbers only."""
    return f"{max(1, round(gigabytes * 1024))}M"


def dependency_text(after: Sequence[Dependency]) -> str:
    """sbatch's `--dependency`: all conditions must hold."""
    return ",".join(f"{d.kind}:{d.target}" for d in after)


def controller_options(run: str, run_id: str, common: ClusterConfig) -> list[str]:
    """What sbatch is told of every controller of a run."""
    asked = common.controller
    options: dict[str, Any] = {
        "job-name": controller_name(run, run_id),
        "comment": _comment(run_id, CONTROLLER),
        "time": asked.minutes or 30,
        "cpus-per-task": asked.cpus or 1,
        "mem": megabytes(asked.mem_gb or 1),
        "partition": asked.partition or common.partition,
        "account": common.account,
        "qos": common.qos,
        **common.sbatch,
        **asked.sbatch,
    }
    return [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in options.items()
        if value is not None
    ]


def controller_name(run: str, run_id: str) -> str:
    """Unique to the run: `singleton` lets one job of a name run at a time."""
    return f"{run}-controller-{run_id[-6:]}"


def _comment(run_id: str, key: str = "") -> str:
    """What marks a job as one of a run's."""
    return f"alt-hpc:{run_id}:{key}"


def _sinfo(form: str) -> str:
    try:
        return client("sinfo", "--noheader", f"--format={form}")
    except (subprocess.SubprocessError, OSError) as error:
        raise InputError(f"Slurm does not answer: sinfo: {_own_words(error)}") from error


def refused(error: BaseException) -> SubmissionRefused:
    """sbatch's refusal, told apart by its words: they are all that there is."""
    words = _own_words(error)
    said = str(getattr(error, "stderr", None) or error).lower()
    if any(text in said for text in WRONG_FOR_GOOD):
        return SubmissionRefused(words, "wrong")
    return SubmissionRefused(words, "limit" if any(t in said for t in LIMITED) else "busy")


def _settings() -> dict[str, str]:
    """slurmctld's configuration."""
    try:
        text = client("scontrol", "show", "config")
    except (subprocess.SubprocessError, OSError) as error:
        raise QueueUnknown(f"scontrol show config: {_own_words(error)}") from error
    return dict(re.findall(r"^(\w+)\s*=\s*(\S+)", text, re.MULTILINE))


def _submit_limits(account: str | None, qos: str | None) -> list[int]:
    """How many jobs this user may have in the queue, by association and QOS (slurmdbd)."""
    me = getpass.getuser()
    try:
        own = _table("assoc", f"user={me}", form="Account,MaxSubmitJobs,DefaultQOS")
        listed = _table("qos", form="Name,MaxSubmitJobsPerUser")
    except (subprocess.SubprocessError, OSError) as error:
        raise QueueUnknown(f"sacctmgr: {_own_words(error)}") from error
    named = {row[0]: row[1] for row in listed}
    mine = [row for row in own if account in (None, row[0])]
    limits = [row[1] for row in mine] + [named.get(qos or row[2] or "normal", "") for row in mine]
    return [int(limit) for limit in limits if limit]


def _table(*what: str, form: str) -> list[list[str]]:
    text = client("sacctmgr", "--noheader", "--parsable2", "show", *what, f"format={form}")
    return [line.split("|") for line in text.splitlines()]


def _all_jobs(*which: str) -> list[str]:
    try:
        return client("squeue", "--noheader", "--array", "--format=%i", *which).splitlines()
    except (subprocess.SubprocessError, OSError) as error:
        raise QueueUnknown(f"squeue: {_own_words(error)}") from error


def _hostnames(listed: str) -> tuple[str, ...]:
    """`n[1-2],n4` as names; none for `(null)`."""
    if not listed or listed.startswith("("):
        return ()
    return tuple(client("scontrol", "show", "hostnames", listed).split())


def _elements(facts: dict[str, str]) -> list[str]:
    """Ids of the elements that a block of `scontrol show job` is about."""
    if "ArrayTaskId" not in facts:
        return [facts["JobId"]]
    return [f"{facts['ArrayJobId']}_{index}" for index in _indices(facts["ArrayTaskId"])]


def _squeue() -> list[tuple[str, str, str, str]]:
    """(element id, comment, state, reason) of all my jobs, array elements one a line."""
    command = ("squeue", "--noheader", "--array", f"--user={getpass.getuser()}")
    try:
        text = client(*command, "--format=%i|%T|%r|%k")
    except (subprocess.SubprocessError, OSError) as error:
        raise QueueUnknown(f"squeue: {_own_words(error)}") from error
    rows = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return [(row[0].strip(), row[3].strip(), row[1], row[2]) for row in rows]


def _indices(text: str) -> list[int]:
    """Indices of an array expression such as `0-3,7%2`."""
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last or first) + 1)
    return found


def _own_words(error: BaseException) -> str:
    """What Slurm itself said, on one line."""
    said = getattr(error, "stderr", None) or str(error)
    text = said.decode() if isinstance(said, bytes) else said
    return _telling(text) or type(error).__name__


def _telling(text: str) -> str:
    """The line of a client's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = ("error", "unrecognized", "invalid")
    told = [line for line in lines if any(word in line.lower() for word in words)] or lines
    return told[0].removeprefix("sbatch: ").removeprefix("error: ") if told else ""
