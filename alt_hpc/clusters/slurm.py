"""Slurm: jobs through submitit, states and limits from its clients, asked by id."""

import contextlib
import getpass
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
# a line of sinfo about a node that can run a job by and by
USABLE = re.compile(r"^ *([^|\n]*?) *\| *(?:idle|mixed|alloc|comp)", re.MULTILINE)


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
        several = process.wish("clusters")
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

        The same before a controller of this run and within it: they have room of their own.
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
        show, cell = ("sacctmgr", "--noheader", "--parsable2", "show"), r"([^|\n]*)"
        asked = ("assoc", f"user={getpass.getuser()}", "format=Account,MaxSubmitJobs,DefaultQOS")
        own = re.findall(rf"(?m)^{cell}\|{cell}\|{cell}$", self._ask(*show, *asked))
        text = self._ask(*show, "qos", "format=Name,MaxSubmitJobsPerUser")
        of_qos = dict(re.findall(rf"(?m)^{cell}\|{cell}$", text))
        mine = [row for row in own if account in (None, row[0])]
        limits = [n for row in mine for n in (row[1], of_qos.get(qos or row[2] or "normal", ""))]
        return [int(limit) for limit in limits if limit.isdigit()]

    def submit(self, request: Request, after: Sequence[Dependency]) -> str:
        """One sbatch: an array, or a plain job for a single element."""
        return script.Executor(request, after).send()

    def spared(self, request: Request) -> Request:
        """It excludes the first nodes without which the partition still has enough."""
        if not request.exclude:
            return request
        partition = request.stage.partition or request.common.partition
        where = (f"--partition={partition}",) if partition else ()
        text = self._ask("sinfo", "--noheader", "--all", "--Node", "--format=%N|%T", *where)
        left, excluded = set(USABLE.findall(text)), []
        for node in request.exclude:
            if node not in left or len(left) > request.stage.nodes:
                left.discard(node)
                excluded.append(node)
        return replace(request, exclude=excluded)

    def look(self, asked: Sequence[Asked]) -> dict[str, dict[int, Seen]]:
        """Each job by its id (`scontrol show job`); by its script where no id was noted."""
        found: dict[str, dict[int, Seen]] = {one.key: {} for one in asked}
        for one in asked:
            for job in [one.job] if one.job else queue.mine(one.folder, self.patience):
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
        waits = ",".join(filter(None, [after, "singleton"]))
        flags = [f"--output={log}", "--open-mode=append", f"--dependency={waits}", str(batch)]
        decided = script.options(common, common.controller, run_id, "controller")
        return script.sbatch(script.controller_options(run, run_id, common) + flags, decided)

    def controllers(self, folder: Path) -> dict[str, str]:
        """Controllers in the queue whose script lies in this folder: job id -> state."""
        return queue.mine(folder, self.patience)

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
            named = stage.partition or common.partition or process.wish("partition") or first
            partitions = named.split(",")  # Slurm takes the one that can start the job first
            if unknown := [partition for partition in partitions if partition not in known]:
                problem = f"no partition '{unknown[0]}' here (there are: {', '.join(known)})"
                raise InputError(problem, f"{own if stage.partition else 'cluster'}.partition")
            nodes, most = (max(known[partition][i] for partition in partitions) for i in (0, 1))
            if stage.nodes > nodes:
                problem = f"{stage.nodes} nodes asked of partition '{named}', which has {nodes}"
                raise InputError(problem, f"{own}.nodes")
            default = script.CONTROLLER_MINUTES if name == "controller" else common.minutes
            minutes = stage.minutes or default
            if minutes > most:
                problem = f"{minutes} minutes asked of partition '{named}', which gives {most:g}"
                asks = own if stage.minutes or name == "controller" else "cluster"
                raise InputError(problem, f"{asks}.minutes")

    def _partitions(self) -> tuple[dict[str, tuple[int, float]], str]:
        """Partition -> its nodes and the most minutes that it gives; and the default one."""
        found: dict[str, tuple[int, float]] = {}
        first = ""
        text = self._ask("sinfo", "--noheader", "--all", "--format=%P|%D|%l")
        form = r"^([^|\n]+?)(\*?)\|[ \t]*(\d+)[ \t]*\|([^|\n]*)$"  # which no greeting has
        for name, star, nodes, limit in re.findall(form, text, re.MULTILINE):
            first = name if star else first
            found[name] = found.get(name, (0,))[0] + int(nodes), _minutes(limit.strip())
        return found, first

    def test(self, request: Request, field: str) -> None:
        """Ask Slurm itself whether it would take such a job (`sbatch --test-only`)."""
        job = script.Executor(request, ())
        try:
            done = queue.call(["sbatch", "--test-only"], job.decided, job.text())
        except QueueUnknown as error:
            raise InputError(f"Slurm does not answer: {error}", field) from error
        if done.returncode:
            words = queue.telling(done.stderr.replace("allocation failure: ", ""))
            raise InputError(f"Slurm would not take this job: {words}", field)


def _minutes(text: str) -> float:
    """Slurm's `1-02:30:00`, `30:00` or `infinite` in minutes."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return float("inf")
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60
