"""Start a run: check a config, freeze it, then hand over to a controller or run it here."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Literal

from alt_hpc.clusters import queue
from alt_hpc.clusters.cluster import QueueUnknown, SubmissionRefused
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.slurm import Slurm
from alt_hpc.config import Config, rules
from alt_hpc.control import chain, named, status
from alt_hpc.control.step import finish, looked, request, scripts, step
from alt_hpc.data import frozen, texts
from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES
from alt_hpc.plan import Job
from alt_hpc.report import text
from alt_hpc.run import code, models
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submit

ZERO2: dict[str, object] = {  # configs/deepspeed/zero2.json, which an installation has not
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
}


def submit(config: Config, wait: bool = False, accept_packages: bool = False) -> int:
    """Check a config, freeze its data and models, and queue the first controller on Slurm."""
    config = _on("slurm", config)
    slurm = _slurm()
    slurm.check(config.cluster)
    if set("%\\") & set(config.run):
        raise InputError(
            f"{config.run}: Slurm reads % and \\ in paths of logs; choose another", "run"
        )
    folder = prepare(config)
    chain.check_cluster(folder, slurm)
    _test_jobs(folder, slurm)
    waiting = slurm.controllers(scripts(folder))
    if waiting:
        print(f"{folder.path}: goes on already (controller {', '.join(waiting)} is in the queue)")
        return status.follow(folder) if wait else 0
    if accept_packages:
        code.accept_packages(folder)
    folder.reopen()
    folder.journal.record(Submit(who=_who(), cluster=slurm.name()))
    try:
        if config.cluster.chain == "presubmitted":
            job = chain.presubmit(folder, slurm)
        else:
            job = chain.queue_controller(folder, slurm, "")
    except SubmissionRefused as error:
        raise InputError(f"Slurm refused the controller: {error}", "cluster.controller") from error
    print(
        f"submitted controller {job} of run {folder.path}\n"
        f"  squeue --me\n"
        f"  alt-hpc status {folder.path}\n"
        f"  tensorboard --logdir {folder.layout.tensorboard}"
    )
    return status.follow(folder) if wait else 0


def _slurm() -> Slurm:
    try:
        slurm = Slurm()
        queue.mine()  # or slurmctld does not answer
        return slurm
    except QueueUnknown as error:
        raise InputError(f"Slurm does not answer: {error}") from error


def prepare(config: Config) -> RunFolder:
    """Everything that can be found wrong now is; then data and settings are frozen.

    To a run that exists is added what is new: sets and policies to be evaluated.

    Raises
    ------
    InputError
        One sentence; see `errors`.
    """
    config = absolute(config)
    folder = RunFolder.create(config)
    fresh = not folder.exists()
    try:
        deepspeed = deepspeed_settings(config) if fresh else {}
        frozen.freeze(config, folder)
        found = named.places(config, None if fresh else folder)
        if fresh:
            from alt_hpc.control import checks

            checks.deepspeed(config, deepspeed)
        code.freeze(folder)
        models.freeze(folder, found)
    except BaseException:
        if fresh:
            folder.abandon()
        raise
    folder.freeze(config, deepspeed)
    return folder


def _who() -> str:
    return os.environ.get("USER", str(os.getuid()))


def _on(backend: Literal["local", "slurm"], config: Config) -> Config:
    """The config with the backend that the command says."""
    cluster = config.cluster.model_copy(update={"backend": backend})
    return config.model_copy(update={"cluster": cluster})


def absolute(config: Config) -> Config:
    """The run folder as an absolute path, so that jobs find it from anywhere."""
    try:
        place = Path(config.run).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{config.run}: {error}", "run") from error
    return config.model_copy(update={"run": str(place)})


def deepspeed_settings(config: Config) -> dict[str, dict[str, object]]:
    """The DeepSpeed JSONs that the config names: path -> content; "" stands for none."""
    found: dict[str, dict[str, object]] = {"": ZERO2}
    for name in rules.trainings():
        training = getattr(config, name)
        if training is not None and training.deepspeed is not None:
            found[training.deepspeed] = read_deepspeed(training.deepspeed, f"{name}.deepspeed")
    return found


def read_deepspeed(path: str, field: str) -> dict[str, object]:
    """A DeepSpeed JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", field) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text", field) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg})", field) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object", field)
    return value


def fetch(config: Config) -> None:
    """Models and data into the caches of this machine's home, for nodes without a network."""
    for name, place in named.places(config).items():
        print(f"{name}: {place}")
    for one in frozen.wanted(config):
        rows = sum(1 for _ in texts.read(one.source, one.split, one.columns, one.field))
        print(f"{one.source.path} {getattr(one.source, one.split)}: {rows} rows")


def cancel(folder: RunFolder) -> int:
    """Cancel a run's jobs, controllers first; submitting again goes on from there.

    It looks again until it finds nothing more: a controller may have been at work.
    """
    slurm = _slurm()
    ended: set[str] = set()
    try:
        chain.check_cluster(folder, slurm)
        while found := _in_the_queue(folder, slurm) - ended:
            slurm.cancel(*dict.fromkeys(element.partition("_")[0] for element in sorted(found)))
            ended |= found
    except QueueUnknown as error:
        raise InputError(f"not known whether all was cancelled: {error}; try again") from error
    count = len(ended)
    if not count:
        print(f"{folder.path}: nothing was found to cancel")
        return 0
    folder.end("STOPPED", "cancelled; submit again to go on")
    tasks = "1 task" if count == 1 else f"{count} tasks"
    print(f"{folder.path}: {tasks} cancelled; submit again to go on")
    return 0


def _in_the_queue(folder: RunFolder, slurm: Slurm) -> set[str]:
    """Ids of a run's controllers and elements that have not ended."""
    controllers = slurm.controllers(scripts(folder))
    return {*controllers, *(element.id for _, element in looked(folder, slurm))}


def _test_jobs(folder: RunFolder, slurm: Slurm) -> None:
    """Let Slurm itself judge what each stage asks for, before anything is queued."""
    config = folder.config()
    made = {*folder.graph().stages(0), *folder.graph().stages(1)}
    for name, stage in STAGES.items():
        if name in made:
            asked = request(folder, config, Job(name, 1, 0, (0,)))
            slurm.test(asked, f"cluster.{stage.key}")


# ---------------------------------------------------------------------- local


def run(config: Config, accept_packages: bool = False) -> int:
    """Run everything on this machine, with progress and the final table on stdout."""
    folder = prepare(_on("local", config))
    if accept_packages:
        code.accept_packages(folder)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with folder.only_one():
            return _run(config, folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(config: Config, folder: RunFolder) -> int:
    folder.reopen()
    folder.journal.record(Submit(who=_who()))
    local = Local(config.cluster.slots)
    screen = status.Screen(folder, local)
    try:
        while True:
            done = step(folder, local)
            if done.plan.finished or done.plan.stop:
                break
            screen.tell(local.turn(screen.tick))
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to go on ({folder.path})", file=sys.stderr)
        return 130
    finally:
        local.end_all()
    if done.plan.stop:
        sentence = f"stopped: {done.plan.stop}; logs are in {folder.layout.jobs}"
        folder.end("STOPPED", sentence)
        print(sentence, file=sys.stderr)
        return 1
    folder.end("FINISHED", finish(done.plan))
    print("\n" + text.summary(folder), flush=True)
    for why in done.plan.given_up.values():
        print(why, file=sys.stderr)
    return 0
