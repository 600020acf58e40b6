"""Slurm: jobs through submitit, states and limits from its clients, asked by id."""

import contextlib
import getpass
import operator
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alt_hpc import process
from alt_hpc.clusters import queue, script
from alt_hpc.clusters.cluster import Asked, Cluster, QueueUnknown, Request, Seen
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.errors import InputError
from alt_hpc.plan import Dependency, Limits

CONTROLLERS = 3  # of a run for which room is left: one that runs, its successor, and the next
USABLE = ("idle", "mixed", "alloc", "comp")  # states of nodes that can run a job by and by


def available() -> bool:
    """Whether this machine has Slurm's clients."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol", "srun"))


class Slurm(Cluster):
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

        def table(*what: str, form: str) -> list[list[str]]:
            asked = ("sacctmgr", "--noheader", "--parsable2", "show", *what, f"format={form}")
            rows = [line.split("|") for line in self._ask(*asked).splitlines()]
            return [row for row in rows if len(row) == form.count(",") + 1]

        me = f"user={getpass.getuser()}"
        own = table("assoc", me, form="Account,MaxSubmitJobs,DefaultQOS")
        named = dict(table("qos", form="Name,MaxSubmitJobsPerUser"))
        mine = [row for row in own if account in (None, row[0])]
        limits = [n for row in mine for n in (row[1], named.get(qos or row[2] or "normal", ""))]
        return [int(limit) for limit in limits if limit.isdigit()]

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """One sbatch: an array through submitit, or a plain job for a single element."""
        jobs = script.Executor(request, after).map_array(operator.call, request.tasks)
        return str(jobs[0].job_id).partition("_")[0]

    def spared(self, request: Request) -> Request:
        """It excludes the first nodes without which the partition still has enough."""
        if not request.exclude:
            return request
        partition = request.stage.partition or request.common.partition
        where = (f"--partition={partition}",) if partition else ()
        text = self._ask("sinfo", "--noheader", "--all", "--Node", "--format=%N|%T", *where)
        states = (line.partition("|") for line in text.splitlines())
        left = {node.strip() for node, _, state in states if state.strip().startswith(USABLE)}
        excluded = []
        for node in request.exclude:
            if node not in left or len(left) > request.stage.nodes:
                left.discard(node)
                excluded.append(node)
        return replace(request, exclude=excluded)

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """Each job by its id (`scontrol show job`); by its script where no id was noted.

        Elements that have started are jobs of their own in Slurm's list: each tells of itself.
        """
        mine = [] if all(one.job for one in asked) else queue.mine(self.patience)
        found: dict[str, dict[int, Seen]] = {one.key: {} for one in asked}
        for one in asked:
            jobs = {one.job} if one.job else {j.id for j in queue.running_from(one.folder, mine)}
            for job in jobs:
                found[one.key] |= queue.show(job, one.folder, self.patience)
        return found

    def release(self, job: str) -> None:
        """Let a held job start again."""
        self._ask("scontrol", "release", job)

    def cancel(self, *elements: str) -> None:
        """Cancel jobs or elements; one that has ended meanwhile is no error."""
        for element in elements:
            with contextlib.suppress(queue.UnknownJob):
                self._ask("scancel", element)

    def submit_controller(
        self, batch: Path, log: Path, run: str, run_id: str, common: ClusterConfig, after: str
    ) -> str:
        """Queue a controller: `singleton` under a name of its own, so that one runs at a time."""
        flags = [f"--output={log}", "--open-mode=append"]
        flags += [f"--dependency={','.join(filter(None, [after, 'singleton']))}", str(batch)]
        options = script.controller_options(run, run_id, common)
        return script.sbatch(options + flags, script.decided(common, common.controller))

    def controllers(self, folder: Path) -> dict[str, str]:
        """Controllers in the queue whose script lies in this folder: job id -> state."""
        return {j.id: j.state for j in queue.running_from(folder, queue.mine(self.patience))}

    def depend(self, job: str, dependency: str) -> None:
        """Change what a pending job waits for."""
        self._ask("scontrol", "update", f"JobId={job}", f"Dependency={dependency}")

    def start_after(self, job: str, minutes: int) -> None:
        """Keep a pending job from starting for a while."""
        self._ask("scontrol", "update", f"JobId={job}", f"StartTime=now+{minutes}minutes")

    def check(self, common: ClusterConfig) -> None:
        """Stop at an unknown partition, or more nodes or time than one gives.

        A site may take such a job and never start it.
        """
        known, first = self._partitions()
        for name, stage in common.stages().items():
            own = f"cluster.{name}"
            named = stage.partition or common.partition or process.wish("partition") or first or ""
            partitions = named.split(",")  # Slurm takes the one that can start the job first
            if unknown := [partition for partition in partitions if partition not in known]:
                raise InputError(
                    f"no partition '{unknown[0]}' here (there are: {', '.join(known)})",
                    f"{own}.partition" if stage.partition else "cluster.partition",
                )
            nodes, most = map(
                max, zip(*(known[partition] for partition in partitions), strict=True)
            )
            if stage.nodes > nodes:
                problem = f"{stage.nodes} nodes asked of partition '{named}', which has {nodes}"
                raise InputError(problem, f"{own}.nodes")
            default = script.CONTROLLER_MINUTES if name == "controller" else common.minutes
            minutes = stage.minutes or default
            if minutes > most:
                raise InputError(
                    f"{minutes} minutes asked of partition '{named}', which gives {most:g}",
                    f"{own if stage.minutes or name == 'controller' else 'cluster'}.minutes",
                )

    def _partitions(self) -> tuple[dict[str, tuple[int, float]], str | None]:
        """Partition -> its nodes and the most minutes that it gives; and the default one."""
        found: dict[str, tuple[int, float]] = {}
        first = None
        try:
            text = self._ask("sinfo", "--noheader", "--all", "--format=%P|%D|%l")
        except QueueUnknown as error:
            raise InputError(f"Slurm does not answer: {error}") from error
        form = r"^([^|\n]+?)(\*?)\|[ \t]*(\d+)[ \t]*\|([^|\n]*)$"  # which no greeting has
        for name, star, nodes, limit in re.findall(form, text, re.MULTILINE):
            first = name if star else first
            found[name] = found.get(name, (0,))[0] + int(nodes), _minutes(limit.strip())
        return found, first

    def test(self, request: Request, field: str) -> None:
        """Ask Slurm itself whether it would take such a job (`sbatch --test-only`)."""
        decided, text = script.decided(request.common, request.stage), script.script(request, ())
        try:
            status, _, said = queue.call(["sbatch", "--test-only"], decided, text)
        except QueueUnknown as error:
            raise InputError(f"Slurm does not answer: {error}", field) from error
        if status:
            words = queue.telling(said.replace("allocation failure: ", ""))
            raise InputError(f"Slurm would not take this job: {words}", field)


def _minutes(text: str) -> float:
    """Slurm's `1-02:30:00`, `30:00` or `infinite` in minutes."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [days or "0", *parts]):
        return float("inf")
    numbers = [int(part) for part in parts]  # behind days they begin with the hours
    hours, minutes, seconds = [*numbers, 0, 0][:3] if days else [0, 0, *numbers][-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
