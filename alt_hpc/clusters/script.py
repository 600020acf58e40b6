"""The sbatch scripts of a run: what Slurm is told of a job, through submitit, and of a controller.

submitit's methods that begin with an underscore are no public interface:
`tests/test_private_names.py` says which release broke them.
"""

import operator
import re
import shlex
import sys
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmExecutor

from alt_hpc.clusters import queue
from alt_hpc.clusters.cluster import QueueUnknown, Request, SubmissionRefused
from alt_hpc.config import Cluster, StageCluster
from alt_hpc.plan import Dependency

CONTROLLER_MINUTES = 30
NICE = 1000  # of what no training waits for
JOB_ID = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?$", re.MULTILINE)
WRONG_FOR_GOOD = (
    *("invalid partition", "invalid account", "invalid qos", "invalid feature"),
    *("invalid generic resource", "invalid job array", "node configuration is not available"),
    *("partition configuration not available", "node count specification invalid"),
    *("time limit is invalid", "more processors requested", "permission denied"),
    *("memory specification can not be satisfied", "unrecognized option"),
)
LIMITED = ("limit", "job violates accounting", "temporarily unable to accept")


class Executor(SlurmExecutor):
    """submitit's for one job, but for how it submits: without end where there is no room for a job.

    It would also hand an array to an executor that knows none of this. Options that the config
    takes away are left out, and it can be had without srun, as `alt-hpc plan` may run anywhere.
    """

    def __init__(self, request: Request, after: Sequence[Dependency]) -> None:
        stage, common, self.request = request.stage, request.common, request
        super().__init__(request.folder, python=shlex.quote(stage.python or sys.executable))
        self.decided = options(common, stage, request.run_id, request.key)
        cpus, minutes = stage.cpus or request.threads, stage.minutes or common.minutes
        container = [f"--container-image={stage.container}"] if stage.container else []
        further = {
            "job_name": request.name,
            "cpus_per_task": cpus,
            "gpus_per_node": stage.gpus * stage.tasks_per_node or None,
            "requeue": True,
            "mem": _megabytes(stage.mem_gb) if stage.mem_gb else None,
            "exclude": ",".join(request.exclude) or None,
            "kill-on-invalid-dep": "yes" if after and common.kill_invalid_dependencies else None,
            "dependency": ",".join(f"{d.kind}:{d.target}" for d in after) or None,
            "nice": NICE if request.side else None,
            **self.decided,
        }
        asked = {k: v for k, v in further.items() if v is not None and v is not False}
        self.update_parameters(
            time=minutes,
            nodes=stage.nodes,
            ntasks_per_node=stage.tasks_per_node,
            signal_delay_s=min(90, 6 * minutes),
            array_parallelism=stage.parallel,
            stderr_to_stdout=True,
            setup=imports(request.code) if request.code else None,
            # srun does not inherit --cpus-per-task; one dead rank must end the others
            srun_args=[f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", *container],
            additional_parameters=asked,
        )
        if len(request.tasks) > 1:
            self.parameters["map_count"] = len(request.tasks)

    @classmethod
    def affinity(cls) -> int:
        return 2  # not -1, as without srun

    def text(self) -> str:
        """The script byte for byte as sbatch gets it; needs no Slurm."""
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        for option in (name for name, value in self.decided.items() if value is False):
            text = re.sub(rf"(?m)^#SBATCH --{re.escape(option)}(=.*)?\n", "", text)
        return text

    def send(self) -> str:
        """One sbatch, an array or a plain job for a single task; returns its id."""
        folder, tasks = self.request.folder, self.request.tasks
        pickles = [folder / f"{uuid.uuid4().hex}.pkl" for _ in tasks]
        for task, file in zip(tasks, pickles, strict=True):
            submission = DelayedSubmission(operator.call, task)
            submission.set_timeout(self.parameters["time"], self.max_num_timeout)
            submission.dump(file)
        script = folder / f".submission_file_{uuid.uuid4().hex}.sh"
        script.write_text(self.text())
        job = sbatch([str(script)], self.decided)
        JobPaths(folder, job).move_temporary_file(script, "submission_file", keep_as_symlink=True)
        for index, file in enumerate(pickles):
            name = f"{job}_{index}" if len(tasks) > 1 else job
            JobPaths(folder, name).move_temporary_file(file, "submitted_pickle")
        return job


def options(common: Cluster, stage: StageCluster, run_id: str, key: str) -> dict[str, Any]:
    """Options of sbatch that the config decides, so that no variable may; False takes one away."""
    told: dict[str, Any] = {"partition": stage.partition or common.partition}
    told |= {"account": common.account, "qos": common.qos, **common.sbatch, **stage.sbatch}
    wanted, mark = told.get("comment"), f"alt-hpc:{run_id}:{key}"  # tells people of its run
    if wanted is not False:  # what a site or a user wants stands in front
        told["comment"] = f"{wanted} {mark}" if isinstance(wanted, str) else mark
    return {option: value for option, value in told.items() if value is not None}


def controller_options(run: str, run_id: str, common: Cluster) -> list[str]:
    """What sbatch is told of every controller; its name is the run's own, for `singleton`."""
    stage = common.controller
    told: dict[str, Any] = {
        "job-name": f"{run}-controller-{run_id[-6:]}",
        "time": stage.minutes or CONTROLLER_MINUTES,
        "cpus-per-task": stage.cpus or 1,
        "mem": _megabytes(stage.mem_gb or 1),
        **options(common, stage, run_id, "controller"),
    }
    left = {key: value for key, value in told.items() if value is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in left.items()]


def imports(code: Path) -> list[str]:
    """Shell lines: Python imports the product from a folder, and not from where it starts."""
    path = shlex.quote(str(code)) + "${PYTHONPATH:+:$PYTHONPATH}"
    return ["export PYTHONSAFEPATH=1", f"export PYTHONPATH={path}"]


def _megabytes(gigabytes: float) -> str:
    return f"{max(1, round(gigabytes * 1024))}M"  # Slurm takes whole numbers only


def sbatch(arguments: Sequence[str], decided: Collection[str]) -> str:
    """The id of a new job.

    SubmissionRefused where Slurm would not take it, did not answer, or gave no id; its kind is told
    by sbatch's words: they are all that there is.
    """
    try:
        done = queue.call(["sbatch", "--parsable", *arguments], decided)
    except QueueUnknown as error:
        raise SubmissionRefused(str(error)) from error
    jobs = JOB_ID.findall(done.stdout)  # whatever is printed around it
    if jobs and not done.returncode:
        return str(jobs[-1])
    said = done.stderr or done.stdout
    words = queue.telling(said) or "sbatch gave no job id"
    if any(text in said.lower() for text in WRONG_FOR_GOOD):
        raise SubmissionRefused(words, "wrong")
    raise SubmissionRefused(words, "limit" if any(t in said.lower() for t in LIMITED) else "busy")
