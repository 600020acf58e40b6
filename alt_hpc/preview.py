"""`alt-hpc plan`: every job of the iteration that is up next, as it would be submitted."""

from __future__ import annotations

import dataclasses
import shlex

from alt_hpc import controller, data
from alt_hpc.clusters import QueueUnknown, Request
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.slurm import Slurm, available, controller_options, script
from alt_hpc.config import Config
from alt_hpc.plan import Dependency, Job, Limits, Plan, State, current_iteration, plan
from alt_hpc.runfolder import RunFolder


def preview(config: Config) -> str:
    """The plan as text: jobs, dependencies, resources and scripts. Writes and submits nothing.

    A script is byte for byte what sbatch would get, but for the ids of jobs not yet submitted:
    they stand as `{ITERATION:STAGE:ATTEMPT}`.
    """
    folder = RunFolder.preview(config)
    limits, in_flight = _queue(config, folder)
    todo = plan(config, _state(config, folder, in_flight), limits)
    return "\n".join([_summary(folder, config, todo), *_scripts(folder, config, todo)])


def _queue(config: Config, folder: RunFolder) -> tuple[Limits, dict[str, dict[int, str]]]:
    """The cluster's limits and what is in its queue; Slurm's defaults where there is none here.

    Raises
    ------
    InputError
        A partition or a number of nodes that the cluster has not.
    """
    if config.cluster.backend == "local":
        return Local(1).limits(config.cluster), {}
    if not available():
        return Limits(), {}
    slurm = Slurm()
    try:
        limits, in_flight = slurm.limits(config.cluster), slurm.in_flight(folder.run_id)
    except QueueUnknown:
        return Limits(), {}
    slurm.check(config.cluster)
    return limits, in_flight


def _state(config: Config, folder: RunFolder, in_flight: dict[str, dict[int, str]]) -> State:
    """The run folder's and the queue's state as if the iteration up next had begun."""
    submissions, counted_from = folder.submissions()
    shardings = dict(folder.shardings())
    shardings.setdefault(0, data.sharding(config, folder, 0))
    state = State(shardings, folder.done(), submissions, counted_from)
    horizon = current_iteration(config, state)
    shardings.setdefault(horizon, data.sharding(config, folder, horizon))
    flying = controller.flying(submissions, in_flight)
    return dataclasses.replace(state, shardings=shardings, in_flight=flying)


def _summary(folder: RunFolder, config: Config, todo: Plan) -> str:
    if todo.finished:
        return f"{folder.path}: finished, nothing to submit"
    if todo.stop:
        return f"{folder.path}: {todo.stop}"
    lines = [f"run {folder.path} on {config.cluster.backend}: {len(todo.jobs)} jobs"]
    lines += [_line(controller.request(folder, config, job), job) for job in todo.jobs]
    lines.append(f"next controller   afterany:{':'.join(_brace(t) for t in todo.wait_for)}")
    if config.cluster.backend == "slurm":
        options = controller_options(folder.path.name, folder.run_id, config.cluster)
        lines.append(f"every controller  sbatch {shlex.join(options)}")
    return "\n".join(lines)


def _line(request: Request, job: Job) -> str:
    stage = request.stage
    size = f"{len(job.elements)} x {stage.nodes} nodes x {stage.tasks_per_node} tasks"
    asks = f"{stage.cpus or request.threads} cpus, {stage.gpus} gpus a task"
    after = " ".join(f"{d.kind}:{_brace(d.target)}" for d in job.after) or "-"
    return f"{_brace(job.key):22} {size:28} {asks:24} {request.name:32} {after}"


def _brace(target: str) -> str:
    return f"{{{target}}}" if ":" in target else target


def _scripts(folder: RunFolder, config: Config, todo: Plan) -> list[str]:
    parts = []
    slurm = config.cluster.backend == "slurm"
    for job in todo.jobs:
        request = controller.request(folder, config, job)
        after = [Dependency(d.kind, _brace(d.target)) for d in job.after]
        parts.append(f"\n===== {_brace(job.key)}")
        parts.append(script(request, after) if slurm else _command(request))
    return parts


def _command(request: Request) -> str:
    return shlex.join(["python", "-m", "alt_hpc.task", *request.calls[0]])
