"""`alt-hpc plan`: every job of the iteration that is up next, as it would be submitted."""

from __future__ import annotations

import dataclasses
import shlex

from alt_hpc.clusters.cluster import Cluster, QueueUnknown, Request, Unseen
from alt_hpc.clusters.script import controller_options, script
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.config import Config
from alt_hpc.control import chain
from alt_hpc.control.step import finish, read_state, request, scripts
from alt_hpc.errors import InputError
from alt_hpc.plan import Dependency, Job, Plan, State, plan
from alt_hpc.run.folder import RunFolder


def preview(config: Config) -> str:
    """The plan as text: jobs, dependencies, resources and scripts. Writes and submits nothing.

    It is what the next controller submits, read from the same state by the same function. A script
    is byte for byte what sbatch would get, but for the ids of jobs not yet submitted: they stand
    as `{ITERATION:STAGE:ATTEMPT}`.

    Raises
    ------
    InputError
        A partition or a number of nodes that the cluster has not, or a queue that does not answer.
    """
    folder = RunFolder.preview(config)
    cluster = _cluster(config)
    try:
        if isinstance(cluster, Slurm):
            chain.check_cluster(folder, cluster)
        state = _as_next(folder, cluster, read_state(folder, cluster))
        todo = plan(state, cluster.limits(config.cluster, scripts(folder)))
    except QueueUnknown as error:
        raise InputError(f"Slurm does not answer: {error}") from error
    return "\n".join([_summary(folder, config, todo), *_scripts(folder, config, todo)])


def _cluster(config: Config) -> Cluster:
    """What can be asked from here."""
    if config.cluster.backend == "local" or not available():
        return Unseen()
    slurm = Slurm()
    slurm.check(config.cluster)
    return slurm


def _as_next(folder: RunFolder, cluster: Cluster, state: State) -> State:
    """The state that is planned from next: by the chain, or by a person who submits again.

    A person does where the run has ended or no controller is left: then no try counts.
    """
    chained = isinstance(cluster, Slurm) and bool(cluster.controllers(scripts(folder)))
    if chained and not folder.ended():
        return state
    return dataclasses.replace(state, counted_from=len(state.submissions))


def _summary(folder: RunFolder, config: Config, todo: Plan) -> str:
    if todo.finished:
        return f"{folder.path}: {finish(todo)}: nothing to submit"
    if todo.stop:
        return f"{folder.path}: {todo.stop}"
    lines = [f"run {folder.path} on {config.cluster.backend}: {len(todo.jobs)} jobs"]
    lines += [_line(request(folder, config, job), job) for job in todo.jobs]
    lines.append(f"next controller   afterany:{':'.join(_brace(t) for t in todo.wait_for)}")
    if config.cluster.backend == "slurm":
        options = controller_options(folder.path.name, folder.run_id, config.cluster)
        lines.append(f"every controller  sbatch {shlex.join(options)}")
    return "\n".join(lines)


def _line(asked: Request, job: Job) -> str:
    stage = asked.stage
    size = f"{len(job.elements)} x {stage.nodes} nodes x {stage.tasks_per_node} tasks"
    asks = f"{stage.cpus or asked.threads} cpus, {stage.gpus} gpus a task"
    after = " ".join(f"{d.kind}:{_brace(d.target)}" for d in job.after) or "-"
    return f"{_brace(job.key):22} {size:28} {asks:24} {asked.name:32} {after}"


def _brace(target: str) -> str:
    return f"{{{target}}}" if ":" in target else target


def _scripts(folder: RunFolder, config: Config, todo: Plan) -> list[str]:
    parts = []
    slurm = config.cluster.backend == "slurm"
    for job in todo.jobs:
        asked = request(folder, config, job)
        after = [Dependency(d.kind, _brace(d.target)) for d in job.after]
        parts.append(f"\n===== {_brace(job.key)}")
        parts.append(script(asked, after) if slurm else _command(asked))
    return parts


def _command(asked: Request) -> str:
    return shlex.join(["python", *asked.tasks[0].command()])
