"""Slurm: jobs through submitit, states from squeue, limits from scontrol."""

from __future__ import annotations

import contextlib
import getpass
import operator
import os
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from alt_hpc import process
from alt_hpc.clusters import Asked, QueueUnknown, Request, Seen, SubmissionRefused, queue
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.config import StageCluster
from alt_hpc.errors import InputError
from alt_hpc.plan import Dependency, Limits

CONTROLLERS = 3  # of a run for which room is left: one that runs, its successor, and the next
CONTROLLER_MINUTES = 30
NICE = 1000  # of what no training waits for
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


def available() -> bool:
    """Whether this machine has Slurm's clients."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol", "srun"))


class Slurm:
    """The Slurm cluster that SLURM_CONF (or the site's default) names.

    With `patience` (seconds) a question that gets no answer is asked again after each wait.
    """

    def __init__(self, patience: Sequence[float] = ()) -> None:
        if not available():
            raise InputError("Slurm's commands (sbatch, squeue, scontrol, srun) are not on PATH")
        several = process.clusters() or ""
        if "," in several or several == "all":
            raise InputError(f"the environment names several clusters ({several}): a run takes one")
        self.patience = patience

    def _ask(self, *command: str) -> str:
        return queue.client(*command, patience=self.patience)

    def _settings(self) -> dict[str, str]:
        """slurmctld's configuration."""
        text = self._ask("scontrol", "show", "config")
        return dict(re.findall(r"^(\w+)\s*=\s*(\S+)", text, re.MULTILINE))

    def name(self) -> str:
        """The cluster that answers."""
        return self._settings().get("ClusterName", "")

    def limits(self, common: ClusterConfig, controllers: Path) -> Limits:
        """What Slurm says that it takes: MaxArraySize, MaxJobCount, and this user's own limits.

        This run's controllers have room of their own, so that it is the same before one of them
        and within it.
        """
        settings = self._settings()
        # submitit's indices run from 0, and the largest that Slurm takes is MaxArraySize - 1.
        array = max(1, int(settings.get("MaxArraySize", "1001")))
        rooms = [int(settings.get("MaxJobCount", "10000")) - self._count("--states=all")]
        if "limits" in settings.get("AccountingStorageEnforce", ""):
            mine = self._count(f"--user={os.getuid()}")
            rooms += [limit - mine for limit in self._submit_limits(common.account, common.qos)]
        room = min(rooms) + len(self.controllers(controllers)) - CONTROLLERS
        return Limits(array, max(0, room))

    def _count(self, which: str) -> int:
        """How many elements there are of all or my jobs."""
        text = self._ask("squeue", "--noheader", "--all", "--array", "--format=%i", which)
        return len(re.findall(r"^\s*\d+(_\d+)?\s*$", text, re.MULTILINE))

    def _submit_limits(self, account: str | None, qos: str | None) -> list[int]:
        """How many jobs this user may have in the queue, by association and QOS (slurmdbd)."""
        me = f"user={getpass.getuser()}"
        own = self._table("assoc", me, form="Account,MaxSubmitJobs,DefaultQOS")
        listed = self._table("qos", form="Name,MaxSubmitJobsPerUser")
        named = {row[0]: row[1] for row in listed}
        mine = [row for row in own if account in (None, row[0])]
        limits = [row[1] for row in mine]
        limits += [named.get(qos or row[2] or "normal", "") for row in mine]
        return [int(limit) for limit in limits if limit.isdigit()]

    def _table(self, *what: str, form: str) -> list[list[str]]:
        asked = ("sacctmgr", "--noheader", "--parsable2", "show", *what, f"format={form}")
        width = form.count(",")
        return [
            line.split("|") for line in self._ask(*asked).splitlines() if line.count("|") == width
        ]

    # ------------------------------------------------------------------ jobs

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """One sbatch: an array through submitit, or a plain job for a single element."""
        executor = _executor(request, after, self.patience)
        jobs = executor.map_array(operator.call, request.tasks)
        return str(jobs[0].job_id).partition("_")[0]

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """Each job by its id (`scontrol show job`); by its script where no id was noted.

        Elements that have started are jobs of their own in Slurm's list: each tells of itself.
        """
        lost = any(one.job is None for one in asked)
        unknown = queue.mine(self.patience) if lost else []
        found: dict[str, dict[int, Seen]] = {}
        for one in asked:
            jobs = {one.job} if one.job else {j.id for j in queue.running_from(one.folder, unknown)}
            for job in jobs:
                if elements := queue.show(job, one.folder, self.patience):
                    found.setdefault(one.key, {}).update(elements)
        return found

    def release(self, job: str) -> None:
        """Let a held job start again."""
        self._ask("scontrol", "release", job)

    def cancel(self, *elements: str) -> None:
        """Cancel jobs or elements; one that has ended meanwhile is no error."""
        for element in elements:
            with contextlib.suppress(queue.UnknownJob):
                self._ask("scancel", element)

    # ------------------------------------------------------------------ the controller's own job

    def submit_controller(
        self, script: Path, log: Path, run: str, run_id: str, common: ClusterConfig, after: str
    ) -> str:
        """Queue a controller: `singleton` under a name of its own, so that one runs at a time."""
        flags = controller_options(run, run_id, common)
        flags += [f"--output={log}", "--open-mode=append"]
        flags += [f"--dependency={','.join(filter(None, [after, 'singleton']))}"]
        return _sbatch([*flags, str(script)], _decided(common, common.controller))

    def controllers(self, folder: Path) -> dict[str, str]:
        """Controllers in the queue whose script lies in this folder: job id -> state."""
        jobs = queue.running_from(folder, queue.mine(self.patience))
        return {job.id: job.state for job in jobs}

    def depend(self, job: str, dependency: str) -> None:
        """Change what a pending job waits for."""
        self._ask("scontrol", "update", f"JobId={job}", f"Dependency={dependency}")

    def start_after(self, job: str, minutes: int) -> None:
        """Keep a pending job from starting for a while."""
        self._ask("scontrol", "update", f"JobId={job}", f"StartTime=now+{minutes}minutes")

    # ------------------------------------------------------------------ checks before submitting

    def check(self, common: ClusterConfig) -> None:
        """Stop with one sentence on what no job of the run could be given.

        An unknown partition, more nodes or more time than a partition gives (a site may take such
        a job and never start it).
        """
        known, first = self._partitions()
        for name, stage in common.stages().items():
            named = stage.partition or common.partition or process.wish("partition") or first or ""
            where = "cluster.partition" if not stage.partition else f"cluster.{name}.partition"
            partitions = named.split(",")  # Slurm takes the one that can start the job first
            for partition in partitions:
                if partition not in known:
                    raise InputError(
                        f"no partition '{partition}' here (there are: {', '.join(known)})", where
                    )
            nodes = max(known[partition][0] for partition in partitions)
            if stage.nodes > nodes:
                raise InputError(
                    f"{stage.nodes} nodes asked of partition '{named}', which has {nodes}",
                    f"cluster.{name}.nodes",
                )
            most = max(known[partition][1] for partition in partitions)
            minutes = minutes_of(name, stage, common)
            if minutes > most:
                own = stage.minutes or name == "controller"
                raise InputError(
                    f"{minutes} minutes asked of partition '{named}', which gives {most:g}",
                    f"cluster.{name}.minutes" if own else "cluster.minutes",
                )

    def _partitions(self) -> tuple[dict[str, tuple[int, float]], str | None]:
        """Partition -> its nodes and the most minutes that it gives; and the default one."""
        found: dict[str, tuple[int, float]] = {}
        first = None
        try:
            text = self._ask("sinfo", "--noheader", "--all", "--format=%P|%D|%l")
        except QueueUnknown as error:
            raise InputError(f"Slurm does not answer: {error}") from error
        for line in text.splitlines():
            name, *numbers = line.split("|")
            if len(numbers) != 2 or not numbers[0].strip().isdigit():
                continue  # a greeting
            first = name.rstrip("*") if name.endswith("*") else first
            name = name.rstrip("*")
            nodes, _ = found.get(name, (0, 0.0))
            found[name] = nodes + int(numbers[0]), _minutes(numbers[1].strip())
        return found, first

    def test(self, request: Request, field: str) -> None:
        """Ask Slurm itself whether it would take such a job (`sbatch --test-only`)."""
        decided = _decided(request.common, request.stage)
        try:
            status, _, said = queue.call(["sbatch", "--test-only"], decided, script(request, ()))
        except QueueUnknown as error:
            raise InputError(f"Slurm does not answer: {error}", field) from error
        if status:
            words = queue.telling(said.replace("allocation failure: ", ""))
            raise InputError(f"Slurm would not take this job: {words}", field)


def minutes_of(name: str, stage: StageCluster, common: ClusterConfig) -> int:
    """The time limit of a stage's tasks, or of the controller."""
    return stage.minutes or (CONTROLLER_MINUTES if name == "controller" else common.minutes)


def _minutes(text: str) -> float:
    """Slurm's `1-02:30:00`, `30:00` or `infinite` in minutes."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or (days and not days.isdigit()):
        return float("inf")
    hours, minutes, seconds = ([0, 0, 0] + [int(part) for part in parts])[-3:]
    if days and len(parts) < 3:  # days-hours[:minutes]
        hours, minutes, seconds = (*(int(part) for part in parts), 0, 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _sbatch(arguments: Sequence[str], decided: Collection[str]) -> str:
    """The id of a new job.

    Raises
    ------
    SubmissionRefused
        Slurm would not take it, did not answer, or answered with no id.
    """
    try:
        status, out, err = queue.call(["sbatch", "--parsable", *arguments], decided)
    except QueueUnknown as error:
        raise SubmissionRefused(str(error)) from error
    job = queue.job_id(out)
    if status or job is None:
        raise refused(err or out)
    return job


def _decided(common: ClusterConfig, stage: StageCluster) -> set[str]:
    """The options of sbatch that the config decides, so that no variable may."""
    named = {"partition": stage.partition or common.partition}
    named |= {"account": common.account, "qos": common.qos}
    given = {key.replace("-", "_") for key in {**common.sbatch, **stage.sbatch}}
    return {name for name, value in named.items() if value} | given


def script(request: Request, after: Sequence[Dependency]) -> str:
    """The sbatch script byte for byte as `Slurm.submit` would hand it over; needs no Slurm."""
    executor = _executor(request, after)
    if len(request.tasks) > 1:
        executor.parameters["map_count"] = len(request.tasks)
    command = executor._submitit_command_str
    text: str = executor._make_submission_file_text(command, "")
    return text


def _executor(
    request: Request, after: Sequence[Dependency], patience: Sequence[float] = ()
) -> SlurmExecutor:
    stage, common = request.stage, request.common
    python = shlex.quote(stage.python or sys.executable)
    executor = _Executor(folder=request.folder, python=python)
    executor.request = request
    asked = {**common.sbatch, **stage.sbatch}
    mark = _comment(request.run_id, request.key, asked)
    cpus = stage.cpus or request.threads
    minutes = stage.minutes or common.minutes
    partition = stage.partition or common.partition
    excluded = _sparable(request, partition, patience)
    container = [f"--container-image={stage.container}"] if stage.container else []
    parameters: dict[str, Any] = {
        "job_name": request.name,
        "comment": mark,
        "time": minutes,
        "nodes": stage.nodes,
        "ntasks_per_node": stage.tasks_per_node,
        "cpus_per_task": cpus,
        "gpus_per_node": stage.gpus * stage.tasks_per_node or None,
        "partition": partition,
        "account": common.account,
        "qos": common.qos,
        "signal_delay_s": min(90, 6 * minutes),
        "array_parallelism": stage.parallel,
        "stderr_to_stdout": True,
        "setup": imports(request.code) if request.code else None,
        # srun does not inherit --cpus-per-task; one dead rank must end the others
        "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", *container],
        "additional_parameters": {
            "requeue": True,
            **({"mem": megabytes(stage.mem_gb)} if stage.mem_gb else {}),
            **({"exclude": ",".join(excluded)} if excluded else {}),
            **(
                {"kill-on-invalid-dep": "yes"} if after and common.kill_invalid_dependencies else {}
            ),
            **({"dependency": dependency_text(after)} if after else {}),
            **({"nice": NICE} if request.side else {}),
            **{k: v for k, v in asked.items() if v is not False and k != "comment"},
        },
    }
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    return executor


def imports(code: Path) -> list[str]:
    """Shell lines: Python imports the product from a folder, and not from where it starts."""
    return [
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _sparable(request: Request, partition: str | None, patience: Sequence[float]) -> list[str]:
    """Of the nodes to exclude, the first ones without which the partition still has enough."""
    if not request.exclude or not available():
        return []
    where = (f"--partition={partition}",) if partition else ()
    command = ("sinfo", "--noheader", "--all", "--Node", "--format=%N|%T", *where)
    lines = queue.client(*command, patience=patience).splitlines()
    usable = ("idle", "mixed", "alloc", "comp")
    left = {line.split("|")[0].strip() for line in lines if _state(line).startswith(usable)}
    excluded = []
    for node in request.exclude:
        if node not in left or len(left) > request.stage.nodes:
            left.discard(node)
            excluded.append(node)
    return excluded


def _state(line: str) -> str:
    return line.partition("|")[2].strip()


class _Executor(SlurmExecutor):
    """submitit's, but for sbatch, which waits for ever where there is no room for a job.

    Its answer is read with care, options that the config takes away are left out, and it can be
    had without srun, as `alt-hpc plan` may run anywhere.
    """

    request: Request

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text: str = super()._make_submission_file_text(command, uid)
        given = {**self.request.common.sbatch, **self.request.stage.sbatch}
        gone = "|".join(re.escape(key) for key, value in given.items() if value is False)
        return (
            re.sub(rf"^#SBATCH --({gone})(=.*)?\n", "", text, flags=re.MULTILINE) if gone else text
        )

    def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
        """submitit hands an array to a plain executor of its own, which knows nothing of these."""
        if len(delayed_submissions) == 1:
            return list(super()._internal_process_submissions(delayed_submissions))
        pickles = [self.request.folder / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        for submission, file in zip(delayed_submissions, pickles, strict=True):
            submission.set_timeout(self.parameters["time"], self.max_num_timeout)
            submission.dump(file)
        self.parameters["map_count"] = len(delayed_submissions)
        first = self._submit_command(self._submitit_command_str)
        jobs = [
            self.job_class(self.folder, f"{first.job_id}_{index}", list(range(first.num_tasks)))
            for index in range(len(delayed_submissions))
        ]
        for job, file in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(file, "submitted_pickle")
        return jobs

    def _submit_command(self, command: str) -> Any:
        uid = uuid.uuid4().hex
        file = self.request.folder / f".submission_file_{uid}.sh"
        file.write_text(self._make_submission_file_text(command, uid))
        decided = _decided(self.request.common, self.request.stage)
        job_id = _sbatch([str(file)], decided)
        job = self.job_class(
            folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks()))
        )
        job.paths.move_temporary_file(file, "submission_file", keep_as_symlink=True)
        return job


def megabytes(gigabytes: float) -> str:
    """Slurm takes whole numbers only."""
    return f"{max(1, round(gigabytes * 1024))}M"


def dependency_text(after: Sequence[Dependency]) -> str:
    """sbatch's `--dependency`: all conditions must hold."""
    return ",".join(f"{d.kind}:{d.target}" for d in after)


def controller_options(run: str, run_id: str, common: ClusterConfig) -> list[str]:
    """What sbatch is told of every controller of a run."""
    asked = common.controller
    given = {**common.sbatch, **asked.sbatch}
    options: dict[str, Any] = {
        "job-name": controller_name(run, run_id),
        "time": minutes_of("controller", asked, common),
        "cpus-per-task": asked.cpus or 1,
        "mem": megabytes(asked.mem_gb or 1),
        "partition": asked.partition or common.partition,
        "account": common.account,
        "qos": common.qos,
        **given,
        "comment": _comment(run_id, "controller", given) if given.get("comment", True) else False,
    }
    return [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in options.items()
        if value is not None and value is not False
    ]


def controller_name(run: str, run_id: str) -> str:
    """Unique to the run: `singleton` lets one job of a name run at a time."""
    return f"{run}-controller-{run_id[-6:]}"


def _comment(run_id: str, key: str, given: Mapping[str, Any]) -> str:
    """Says for people which run a job is of; behind the comment that a site or a user wants."""
    wanted = given.get("comment")
    mark = f"alt-hpc:{run_id}:{key}"
    return f"{wanted} {mark}" if isinstance(wanted, str) else mark


def refused(said: str) -> SubmissionRefused:
    """sbatch's refusal, told apart by its words: they are all that there is."""
    words = queue.telling(said) or "sbatch gave no job id"
    if any(text in said.lower() for text in WRONG_FOR_GOOD):
        return SubmissionRefused(words, "wrong")
    return SubmissionRefused(words, "limit" if any(t in said.lower() for t in LIMITED) else "busy")
