"""The sbatch scripts of a run: what Slurm is told of a job, through submitit, and of a controller.

submitit's methods that begin with an underscore are no public interface:
`tests/test_private_names.py` says which release broke them.
"""

import re
import shlex
import sys
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from alt_hpc.clusters import queue
from alt_hpc.clusters.cluster import QueueUnknown, Request, SubmissionRefused
from alt_hpc.config import Cluster as ClusterConfig
from alt_hpc.config import StageCluster
from alt_hpc.plan import Dependency

CONTROLLER_MINUTES = 30
NICE = 1000  # of what no training waits for
WRONG_FOR_GOOD = (
    *("invalid partition", "invalid account", "invalid qos", "invalid feature"),
    *("invalid generic resource", "invalid job array", "node configuration is not available"),
    *("partition configuration not available", "node count specification invalid"),
    *("time limit is invalid", "more processors requested", "permission denied"),
    *("memory specification can not be satisfied", "unrecognized option"),
)
LIMITED = ("limit", "job violates accounting", "temporarily unable to accept")


def script(request: Request, after: Sequence[Dependency]) -> str:
    """The sbatch script byte for byte as `Slurm.submit` would hand it over; needs no Slurm."""
    executor = Executor(request, after)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


class Executor(SlurmExecutor):
    """submitit's, but for sbatch, which waits for ever where there is no room for a job.

    Its answer is read with care, options that the config takes away are left out, and it can be
    had without srun, as `alt-hpc plan` may run anywhere.
    """

    def __init__(self, request: Request, after: Sequence[Dependency]) -> None:
        python = shlex.quote(request.stage.python or sys.executable)
        super().__init__(folder=request.folder, python=python)
        self.request = request
        self.update_parameters(**_parameters(request, after))
        if len(request.tasks) > 1:
            self.parameters["map_count"] = len(request.tasks)

    @classmethod
    def affinity(cls) -> int:
        return 2  # not -1, as without srun

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text: str = super()._make_submission_file_text(command, uid)
        for option, value in given(self.request.common, self.request.stage).items():
            if value is False:
                text = re.sub(rf"(?m)^#SBATCH --{re.escape(option)}(=.*)?\n", "", text)
        return text

    def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
        """submitit would hand an array to an executor of its own, which knows none of this."""
        if len(delayed_submissions) == 1:
            return list(super()._internal_process_submissions(delayed_submissions))
        pickles = [self.request.folder / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        for submission, file in zip(delayed_submissions, pickles, strict=True):
            submission.set_timeout(self.parameters["time"], self.max_num_timeout)
            submission.dump(file)
        first = self._submit_command(self._submitit_command_str)
        for index, file in enumerate(pickles):
            job = self.job_class(self.folder, f"{first.job_id}_{index}", [0])
            job.paths.move_temporary_file(file, "submitted_pickle")
        return [first]

    def _submit_command(self, command: str) -> Any:
        uid = uuid.uuid4().hex
        file = self.request.folder / f".submission_file_{uid}.sh"
        file.write_text(self._make_submission_file_text(command, uid))
        job_id = sbatch([str(file)], decided(self.request.common, self.request.stage))
        job = self.job_class(self.folder, job_id, list(range(self._num_tasks())))
        job.paths.move_temporary_file(file, "submission_file", keep_as_symlink=True)
        return job


def _parameters(request: Request, after: Sequence[Dependency]) -> dict[str, Any]:
    """What submitit is told."""
    stage, common = request.stage, request.common
    asked = given(common, stage)
    cpus, minutes = stage.cpus or request.threads, stage.minutes or common.minutes
    container = [f"--container-image={stage.container}"] if stage.container else []
    further = {
        "requeue": True,
        "mem": _megabytes(stage.mem_gb) if stage.mem_gb else None,
        "exclude": ",".join(request.exclude) or None,
        "kill-on-invalid-dep": "yes" if after and common.kill_invalid_dependencies else None,
        "dependency": ",".join(f"{d.kind}:{d.target}" for d in after) or None,
        "nice": NICE if request.side else None,
        **{k: v for k, v in asked.items() if v is not False and k != "comment"},
    }
    parameters = {
        **_account(common, stage),
        "job_name": request.name,
        "comment": _comment(request.run_id, request.key, asked),
        "time": minutes,
        "nodes": stage.nodes,
        "ntasks_per_node": stage.tasks_per_node,
        "cpus_per_task": cpus,
        "gpus_per_node": stage.gpus * stage.tasks_per_node or None,
        "signal_delay_s": min(90, 6 * minutes),
        "array_parallelism": stage.parallel,
        "stderr_to_stdout": True,
        "setup": imports(request.code) if request.code else None,
        # srun does not inherit --cpus-per-task; one dead rank must end the others
        "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", *container],
        "additional_parameters": {k: v for k, v in further.items() if v is not None},
    }
    return {k: v for k, v in parameters.items() if v is not None}


def _account(common: ClusterConfig, stage: StageCluster) -> dict[str, str | None]:
    """On whose account a job runs, and where."""
    partition = stage.partition or common.partition
    return {"partition": partition, "account": common.account, "qos": common.qos}


def imports(code: Path) -> list[str]:
    """Shell lines: Python imports the product from a folder, and not from where it starts."""
    return [
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def controller_options(run: str, run_id: str, common: ClusterConfig) -> list[str]:
    """What sbatch is told of every controller of a run.

    Its name is unique to the run: `singleton` lets one job of a name run at a time.
    """
    stage = common.controller
    asked = given(common, stage)
    options: dict[str, Any] = {
        "job-name": f"{run}-controller-{run_id[-6:]}",
        "time": stage.minutes or CONTROLLER_MINUTES,
        "cpus-per-task": stage.cpus or 1,
        "mem": _megabytes(stage.mem_gb or 1),
        **_account(common, stage),
        **asked,
        "comment": _comment(run_id, "controller", asked) if asked.get("comment", True) else None,
    }
    told = {k: v for k, v in options.items() if v is not None and v is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in told.items()]


def given(common: ClusterConfig, stage: StageCluster) -> dict[str, Any]:
    """Further options of sbatch that the config gives (False: takes away)."""
    return {**common.sbatch, **stage.sbatch}


def decided(common: ClusterConfig, stage: StageCluster) -> set[str]:
    """The options of sbatch that the config decides, so that no variable may."""
    named = {name for name, value in _account(common, stage).items() if value}
    return named | {key.replace("-", "_") for key in given(common, stage)}


def _megabytes(gigabytes: float) -> str:
    return f"{max(1, round(gigabytes * 1024))}M"  # Slurm takes whole numbers only


def _comment(run_id: str, key: str, asked: Mapping[str, Any]) -> str:
    """Says for people which run a job is of; behind the comment that a site or a user wants."""
    wanted, mark = asked.get("comment"), f"alt-hpc:{run_id}:{key}"
    return f"{wanted} {mark}" if isinstance(wanted, str) else mark


def sbatch(arguments: Sequence[str], decided: Collection[str]) -> str:
    """The id of a new job.

    SubmissionRefused where Slurm would not take it, did not answer, or gave no id; its kind is told
    by sbatch's words: they are all that there is.
    """
    try:
        status, out, err = queue.call(["sbatch", "--parsable", *arguments], decided)
    except QueueUnknown as error:
        raise SubmissionRefused(str(error)) from error
    job = queue.job_id(out)
    if job is not None and not status:
        return job
    said = err or out
    words = queue.telling(said) or "sbatch gave no job id"
    if any(text in said.lower() for text in WRONG_FOR_GOOD):
        raise SubmissionRefused(words, "wrong")
    raise SubmissionRefused(words, "limit" if any(t in said.lower() for t in LIMITED) else "busy")
