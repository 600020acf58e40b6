"""Start a run: check a config, freeze it, then hand over to a controller or run it here."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from alt_hpc.clusters import queue
from alt_hpc.clusters.cluster import QueueUnknown
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.slurm import Slurm
from alt_hpc.config import Config
from alt_hpc.control import chain, checks, costs, status
from alt_hpc.control.step import finish, looked, request, scripts, step
from alt_hpc.data import texts
from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES, TRAIN, TRAININGS, Graph, Piece
from alt_hpc.plan import Job
from alt_hpc.report import results
from alt_hpc.run import code, models
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submit

ZERO2: dict[str, Any] = {  # configs/deepspeed/zero2.json, which an installation has not
    "zero_optimization": {
        **{"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
        **{"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
    },
    "data_types": {"grad_accum_dtype": "fp32"},
}


def submit(config: Config, wait: bool = False, accept_packages: bool = False) -> int:
    """Check a config, freeze its data and models, and queue the first controller on Slurm."""
    slurm = Slurm()
    queue.mine()  # or slurmctld does not answer
    slurm.check(config.cluster)
    if set("%\\") & set(config.run):
        problem = f"{config.run}: Slurm reads % and \\ in paths of logs; choose another"
        raise InputError(problem, "run")
    folder = prepare(config, "slurm")
    chain.check_cluster(folder, slurm)
    first = [folder.graph().stages(k) for k in range(min(1, config.iterations) + 1)]
    for name in dict.fromkeys(itertools.chain(*first)):
        asked = request(folder, folder.config(), Job(name, 1, 0, (0,)))  # which Slurm itself judges
        slurm.test(asked, f"cluster.{STAGES[name].key}")
    if waiting := ", ".join(slurm.controllers(scripts(folder))):
        print(f"{folder.path}: goes on already (controller {waiting} is in the queue)")
    else:
        _begin(folder, accept_packages, slurm.name())
        print(f"submitted controller {chain.begin(folder, slurm)} of run {folder.path}")
        print(f"  squeue --me\n  alt-hpc status {folder.path}")
        print(f"  tensorboard --logdir {folder.layout.tensorboard}")
    return status.follow(folder) if wait else 0


def evaluate(config: Config, wait: bool = False, accept_packages: bool = False) -> int:
    """Answer and measure what is there, where the config says, and train nothing.

    Of a run that has not begun this is its iteration 0; of another also the last that was trained.
    InputError where a model has yet to be trained.
    """
    config = absolute(config)
    folder = RunFolder.preview(config)
    graph = Graph(config, {})
    needed = {"policy.model": graph.policy(0), "reward.model": graph.reward_model()}
    for field, piece in needed.items():
        if piece and not (folder.exists() and folder.manifests.get(piece)):
            raise InputError(f"{piece.stage} has not made it, and this trains nothing", field)
    begun = folder.graph().shardings if folder.exists() else ()
    trained = [k for k in begun if k and folder.manifests.get(Piece(k, TRAIN))]
    config = config.model_copy(update={"iterations": max(trained, default=0)})
    if config.cluster.backend == "slurm":
        return submit(config, wait, accept_packages)
    return run(config, accept_packages)


def prepare(config: Config, backend: str = "") -> RunFolder:
    """Everything that can be found wrong now is (InputError); then data and settings are frozen.

    To a run that exists is added what is new (sets, policies). `backend`: what the command says.
    """
    cluster = config.cluster.model_copy(update={"backend": backend or config.cluster.backend})
    config = absolute(config).model_copy(update={"cluster": cluster})
    folder = RunFolder.create(config)
    fresh = not folder.exists()
    try:
        deepspeed = _deepspeed(config) if fresh else {}
        texts.freeze(config, folder)
        found = checks.places(config, None if fresh else folder)
        costs.check(config, folder)
        code.keep(folder)
        code.keep_files(folder, checks.files(config))
        models.record(folder, found)
    except BaseException:
        folder.abandon()
        raise
    folder.freeze(config, deepspeed)
    return folder


def absolute(config: Config) -> Config:
    """The run folder as an absolute path, so that jobs find it from anywhere."""
    try:
        place = Path(config.run).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{config.run}: {error}", "run") from error
    return config.model_copy(update={"run": str(place)})


def _deepspeed(config: Config) -> dict[str, dict[str, Any]]:
    """The DeepSpeed JSONs that the config names, none that training would refuse; "": of none."""
    from alt_hpc.training.deepspeed import check

    found = {"": ZERO2}
    for name in TRAININGS:
        path = getattr(getattr(config, name), "deepspeed", None)
        if path is None:
            continue
        try:
            found[path] = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found[path], dict):
                raise InputError("expected a JSON object")
            check(found[path])
            continue
        except OSError as error:
            problem = f": cannot be read ({error.strerror})"
        except UnicodeDecodeError:
            problem = ": not UTF-8 text"
        except json.JSONDecodeError as error:
            problem = f":{error.lineno}: not valid JSON ({error.msg})"
        except InputError as error:
            problem = f": {error}"
        raise InputError(path + problem, f"{name}.deepspeed")
    return found


def fetch(config: Config) -> None:
    """Models and data into the caches of this machine's home, for nodes without a network."""
    for name, place in checks.places(config).items():
        print(f"{name}: {place}")
    for one in texts.wanted(config):
        rows = sum(1 for _ in texts.read(one.source, one.split, one.columns, one.field))
        print(f"{one.source.path} {getattr(one.source, one.split)}: {rows} rows")


def cancel(folder: RunFolder) -> int:
    """Cancel a run's jobs, controllers first, until none is found: one may have been at work."""
    slurm = Slurm()
    queue.mine()  # or slurmctld does not answer
    ended: set[str] = set()
    try:
        chain.check_cluster(folder, slurm)
        while found := {*slurm.controllers(scripts(folder)), *looked(folder, slurm)} - ended:
            slurm.cancel(*dict.fromkeys(element.partition("_")[0] for element in sorted(found)))
            ended |= found
    except QueueUnknown as error:
        raise InputError(f"not known whether all was cancelled: {error}; try again") from error
    if ended:
        folder.end("STOPPED", "cancelled; submit again to go on")
    tasks = "1 task" if len(ended) == 1 else f"{len(ended)} tasks"
    said = f"{tasks} cancelled; submit again to go on" if ended else "nothing was found to cancel"
    print(f"{folder.path}: {said}")
    return 0


def run(config: Config, accept_packages: bool = False) -> int:
    """Run everything on this machine, with progress and the final table on stdout."""
    folder, local = prepare(config, "local"), Local(config.cluster.slots)
    screen = status.Screen(folder, local)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with folder.only_one():
        try:
            _begin(folder, accept_packages)
            while not ((todo := step(folder, local).plan).finished or todo.stop):
                screen.tell(local.turn(screen.tick))
        except KeyboardInterrupt:
            words = f"stopped; run the same command again to go on ({folder.path})"
            print(f"\n{words}", file=sys.stderr)
            return 130
        finally:
            local.end_all()
        if todo.stop:
            sentence = f"stopped: {todo.stop}; logs are in {folder.layout.jobs}"
            folder.end("STOPPED", sentence)
            print(sentence, file=sys.stderr)
            return 1
        folder.end("FINISHED", finish(todo))
    print("\n" + results.last_words(folder), flush=True)
    for why in todo.given_up.values():
        print(why, file=sys.stderr)
    return 0


def _begin(folder: RunFolder, accept_packages: bool, cluster: str = "") -> None:
    """A person submits: how the run ended, and what was tried, no longer holds."""
    if accept_packages:
        code.accept_packages(folder)
    folder.reopen()
    folder.journal.record(Submit(who=os.environ.get("USER", str(os.getuid())), cluster=cluster))
