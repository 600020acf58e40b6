"""`alt-hpc plan`: every job that is up next, as it would be submitted, and its tasks' memory."""

import shlex
from dataclasses import replace

from alt_hpc.clusters import script
from alt_hpc.clusters.cluster import Cluster
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.config import Config
from alt_hpc.control import chain, share
from alt_hpc.control.step import finish, read_state, request, scripts
from alt_hpc.plan import Dependency, Plan, plan
from alt_hpc.run.folder import RunFolder


def preview(config: Config) -> str:
    """The plan as text: jobs, dependencies, resources, memory, scripts. Writes and submits nothing.

    It is what the next controller submits, read from the same state by the same function. A script
    is byte for byte what sbatch would get, but for ids not yet given (`{ITERATION:STAGE:ATTEMPT}`).
    InputError where no partition has what is asked for; QueueUnknown where Slurm does not answer.
    """
    from alt_hpc.control import memory  # a controller has no use for it

    folder = RunFolder.preview(config)
    jobs, started = _planned(folder, config)
    return "\n".join([*jobs, "", *memory.table(config, folder), *started])


def _planned(folder: RunFolder, config: Config) -> tuple[list[str], list[str]]:
    """A line a job, or why there is none; and what each job is started with."""
    cluster = Cluster()
    if config.cluster.backend == "slurm" and available():
        cluster = Slurm()
        cluster.check(config.cluster)
        chain.check_cluster(folder, cluster)
    state = read_state(folder, cluster)
    if start := share.offered(folder):
        if start.missing and folder.exists():
            return [f"{folder.path}: waits for what {start.of.path} makes of their start"], []
        share.require(start)
        state = replace(state, graph=start.graph, done=start.done())
    chained = isinstance(cluster, Slurm) and bool(cluster.controllers(scripts(folder)))
    if not chained or folder.ended():  # it is a person who submits next: no try counts
        state = replace(state, counted_from=len(state.submissions))
    todo = plan(state, cluster.limits(config.cluster, scripts(folder)))
    if todo.finished:
        return [f"{folder.path}: {finish(todo)}: nothing to submit"], []
    if todo.stop:
        return [f"{folder.path}: {todo.stop}"], []
    return _lines(folder, config, todo, cluster)


def _lines(
    folder: RunFolder, config: Config, todo: Plan, cluster: Cluster
) -> tuple[list[str], list[str]]:
    """A line a job and the controllers', then what each job is started with."""
    backend, shown = config.cluster.backend, {job.key: f"{{{job.key}}}" for job in todo.jobs}
    lines, started = [f"run {folder.path} on {backend}: {len(todo.jobs)} jobs"], []
    for job in todo.jobs:
        asked = cluster.spared(request(folder, config, job))
        after = [Dependency(d.kind, shown.get(d.target, d.target)) for d in job.after]
        stage, key = asked.stage, shown[job.key]
        size = f"{len(job.elements)} x {stage.nodes} nodes x {stage.tasks_per_node} tasks"
        asks = f"{stage.cpus or asked.threads} cpus, {stage.gpus} gpus a task"
        waits = " ".join(f"{d.kind}:{d.target}" for d in after) or "-"
        lines.append(f"{key:22} {size:28} {asks:24} {asked.name:32} {waits}")
        command = shlex.join(["python", *asked.tasks[0].command()])
        started.append(f"\n===== {key}")
        started.append(script.Executor(asked, after).text() if backend == "slurm" else command)
    lines.append(f"next controller   afterany:{':'.join(shown.get(t, t) for t in todo.wait_for)}")
    if backend == "slurm":
        options = script.controller_options(folder.path.name, folder.run_id, config.cluster)
        lines.append(f"every controller  sbatch {shlex.join(options)}")
    return lines, started
