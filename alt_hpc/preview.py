"""`alt-hpc plan`: every job of the iteration that is up next, as it would be submitted."""

from __future__ import annotations

import dataclasses
import shlex

from alt_hpc import controller, data
from alt_hpc.clusters import QueueUnknown, Request
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.config import Config
from alt_hpc.plan import Dependency, Job, Limits, Plan, State, current_iteration, plan
from alt_hpc.runfolder import RunFolder


def preview(config: Config) -> str:
    """The plan as text: jobs, dependencies, resources and scripts. Writes and submits nothing.

    A script is byte for byte what sbatch would get, but for the ids of jobs not yet submitted:
    they stand as `{ITERATION:STAGE:ATTEMPT}`.
    """
    folder = RunFolder.preview(config)
    state = _state(config, folder)
    slurm = Slurm() if config.cluster.backend == "slurm" and available() else None
    todo = plan(config, state, _limits(config, slurm))
    return "\n".join([_summary(folder, config, todo), *_scripts(folder, config, todo, slurm)])


def _limits(config: Config, slurm: Slurm | None) -> Limits:
    """The cluster's limits; Slurm's default where it does not answer."""
    if config.cluster.backend == "local":
        return Local(1).limits(config.cluster)
    try:
        return slurm.limits(config.cluster) if slurm else Limits()
    except QueueUnknown:
        return Limits()


def _state(config: Config, folder: RunFolder) -> State:
    """The run folder's state as if the iteration up next had begun. The queue is not asked."""
    submissions, counted_from = folder.submissions()
    shardings = dict(folder.shardings())
    shardings.setdefault(0, data.sharding(config, folder, 0))
    state = State(shardings, folder.done(), submissions, counted_from)
    horizon = current_iteration(config, state)
    shardings.setdefault(horizon, data.sharding(config, folder, horizon))
    return dataclasses.replace(state, shardings=shardings)


def _summary(folder: RunFolder, config: Config, todo: Plan) -> str:
    if todo.finished:
        return f"{folder.path}: finished, nothing to submit"
    if todo.stop:
        return f"{folder.path}: {todo.stop}"
    lines = [f"run {folder.path} on {config.cluster.backend}: {len(todo.jobs)} jobs"]
    lines += [_line(controller.request(folder, config, job), job) for job in todo.jobs]
    lines.append(f"next controller   afterany:{':'.join(_brace(t) for t in todo.wait_for)}")
    return "\n".join(lines)


def _line(request: Request, job: Job) -> str:
    stage = request.stage
    size = f"{len(job.elements)} x {stage.nodes} nodes x {stage.tasks_per_node} tasks"
    asks = f"{stage.cpus or request.threads} cpus, {stage.gpus} gpus a task"
    after = " ".join(f"{d.kind}:{_brace(d.target)}" for d in job.after) or "-"
    return f"{_brace(job.key):22} {size:28} {asks:24} {request.name:32} {after}"


def _brace(target: str) -> str:
    return f"{{{target}}}" if ":" in target else target


def _scripts(folder: RunFolder, config: Config, todo: Plan, slurm: Slurm | None) -> list[str]:
    parts = []
    for job in todo.jobs:
        request = controller.request(folder, config, job)
        after = [Dependency(d.kind, _brace(d.target)) for d in job.after]
        parts.append(f"\n===== {_brace(job.key)}")
        parts.append(slurm.script(request, after) if slurm else _command(request))
    return parts


def _command(request: Request) -> str:
    return shlex.join(["python", "-m", "alt_hpc.task", *request.calls[0]])
