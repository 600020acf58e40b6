"""Start a run: check a config, freeze it, then hand over to a controller or run it here."""

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alt_hpc.clusters import queue
from alt_hpc.clusters.cluster import QueueUnknown
from alt_hpc.clusters.local import Local
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.config import Config
from alt_hpc.control import chain, checks, costs, overlaps, share, status
from alt_hpc.control.step import finish, looked, request, scripts, step
from alt_hpc.data import texts
from alt_hpc.errors import InputError, of_config
from alt_hpc.graph import STAGES, TRAIN, TRAININGS, Graph, Piece
from alt_hpc.plan import Job
from alt_hpc.report import results
from alt_hpc.run import code, models
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submit
from alt_hpc.training.settings import ZERO2

INTERRUPTED = 130  # an exit status


def submit(*configs: Config, wait: bool = False, accept_packages: bool = False) -> int:
    """Check configs, freeze their data and models, and queue their first controllers on Slurm."""
    slurm = Slurm()
    queue.mine()  # or slurmctld does not answer
    for number, config in enumerate(configs):
        with of_config(number):
            slurm.check(config.cluster)
            if set("%\\") & set(config.run):
                problem = f"{config.run}: Slurm reads % and \\ in paths of logs; choose another"
                raise InputError(problem, "run")
    folders = prepare_all(configs, "slurm", _not_here, lambda folder: _ask_slurm(folder, slurm))
    first: dict[str | None, str] = {}  # controllers, by the run folders
    for folder in folders:
        place, waits = str(folder.path), first.get(folder.config().start_from, "")
        waiting = ", ".join(slurm.controllers(scripts(folder)))
        if waiting and not folder.ended():  # else it is about to leave the queue
            print(f"{place}: goes on already (controller {waiting} is in the queue)")
            continue
        _begin(folder, accept_packages, slurm.name())
        first[place] = chain.begin(folder, slurm, waits)
        print(f"submitted controller {first[place]} of run {place}")
        print(f"  alt-hpc status {place}\n  tensorboard --logdir {folder.layout.tensorboard}")
    print("  squeue --me")
    return status.follow(*folders) if wait else 0


def _not_here(folder: RunFolder) -> None:
    if folder.in_use():
        raise InputError(f"{folder.path}: is being run by another process", "run")


def _not_on_slurm(folder: RunFolder) -> None:
    """Raise InputError where controllers of a run are in the queue of the Slurm that answers."""
    last = folder.journal.of(Submit)[-1:]
    if not (last and last[0].cluster) or folder.ended() or not available():
        return
    with contextlib.suppress(QueueUnknown):  # then nobody can tell
        if controllers := ", ".join(Slurm().controllers(scripts(folder))):
            problem = f"goes on on Slurm (controller {controllers}): alt-hpc cancel it first"
            raise InputError(f"{folder.path}: {problem}", "run")


def _ask_slurm(folder: RunFolder, slurm: Slurm) -> None:
    """Raise InputError where Slurm itself would not take a run's jobs."""
    chain.check_cluster(folder, slurm)
    first = [folder.graph().stages(k) for k in range(min(1, folder.config().iterations) + 1)]
    for name in dict.fromkeys(itertools.chain(*first)):
        asked = request(folder, folder.config(), Job(name, 1, 0, (0,)))
        slurm.test(asked, f"cluster.{STAGES[name].key}")


def evaluate(config: Config, wait: bool = False, accept_packages: bool = False) -> int:
    """Answer and measure what is there, where the config says, and train nothing.

    Of a run that has not begun this is its iteration 0; of another also the last that was trained.
    InputError where a model has yet to be trained, and where the run goes on: it would end early.
    """
    config = absolute(config)
    folder = RunFolder.preview(config)
    graph = Graph(config, {})
    needed = {"policy.model": graph.policy(0), "reward.model": graph.reward_model()}
    for field, piece in needed.items() if config.start_from is None else ():
        if piece and not (folder.exists() and folder.manifests.get(piece)):
            raise InputError(f"{piece.stage} has not made it, and this trains nothing", field)
    begun = folder.graph().shardings if folder.exists() else ()
    trained = [k for k in begun if k and folder.manifests.get(Piece(k, TRAIN))]
    last = max(trained, default=0)
    if folder.exists() and not folder.ended() and RunFolder(folder.path).config().iterations > last:
        problem = "trains still: give it the same settings by submitting it again, or wait"
        raise InputError(f"{folder.path}: {problem}", "run")
    config = config.model_copy(update={"iterations": last})
    if config.cluster.backend == "slurm":
        return submit(config, wait=wait, accept_packages=accept_packages)
    return run(config, accept_packages=accept_packages)


def prepare(config: Config, backend: str = "") -> RunFolder:
    """As `prepare_all`, of one."""
    return prepare_all([config], backend)[0]


def prepare_all(
    configs: Sequence[Config],
    backend: str = "",
    hold: Callable[[RunFolder], None] = lambda folder: None,
    ask: Callable[[RunFolder], None] = lambda folder: None,
) -> list[RunFolder]:
    """Everything that can be found wrong now is (InputError); then data and settings are frozen.

    To a run that exists is added what is new (sets, policies). Runs that can share a start do, and
    what is whole of it is taken. `backend`: what the command says. `hold` refuses a run that is in
    use, before anything is written; `ask` one whose jobs would be, before its settings change.
    """
    asked, folders, found = list[Config](), list[RunFolder](), list[dict[str, Any]]()
    try:
        for number, config in enumerate(configs):
            with of_config(number):
                asked.append(_as_asked(config, backend, asked))
        for number, config in enumerate(asked := share.together(asked)):
            with of_config(number):
                hold(folder := RunFolder.create(config))
                folders.append(folder)
                found.append(_gather(folder, config, folders[:-1]))
                ask(folder)
    except BaseException:
        for folder in folders:
            folder.abandon()
        raise
    for folder, config, deepspeed in zip(folders, asked, found, strict=True):
        folder.freeze(config, deepspeed)
    print(*overlaps.told(folders), sep="\n", flush=True)
    for number, folder in enumerate(folders):
        with of_config(number):
            if (start := share.offered(folder)) and not start.needed:
                share.take(folder, start)
    return folders


def _as_asked(config: Config, backend: str, others: Sequence[Config]) -> Config:
    """A config with what the command says; InputError where another has its run folder."""
    cluster = config.cluster.model_copy(update={"backend": backend or config.cluster.backend})
    config = absolute(config).model_copy(update={"cluster": cluster})
    if Path(config.run).resolve() in [Path(one.run).resolve() for one in others]:
        raise InputError(f"{config.run}: is the run folder of another of these configs too", "run")
    return config


def _gather(folder: RunFolder, config: Config, earlier: Sequence[RunFolder]) -> dict[str, Any]:
    """Check a config and put what it needs into its run folder; returns its DeepSpeed JSONs.

    A run of the same command (`earlier`) may yet make what this one takes from it.
    """
    fresh, waits = not folder.exists(), share.waits(folder)
    deepspeed = _deepspeed(config) if fresh else {}
    mate = next((run for run in earlier if str(run.path) == config.start_from), None)
    other = mate or (share.named(config) if waits else None)
    texts.freeze(config, folder, other)
    found = checks.places(config, None if fresh else folder)
    costs.check(config, folder)
    code.keep(folder)
    code.keep_files(folder, checks.files(config))
    models.record(folder, found)
    if other and waits:
        share.check(folder, other, deepspeed)
        presubmitted = config.cluster.chain == "presubmitted"
        if mate is None or mate.exists() or presubmitted:
            start = share.offered(folder)
            if start and (mate is None or presubmitted):
                share.require(start)
    return deepspeed


def absolute(config: Config) -> Config:
    """The run folders as absolute paths, so that jobs find them from anywhere."""
    places: dict[str, str] = {}
    for key, field in (("run", "run"), ("start_from", "from")):
        if (place := getattr(config, key)) is not None:
            try:
                places[key] = str(Path(place).expanduser().absolute())
            except RuntimeError as error:
                raise InputError(f"{place}: {error}", field) from error
    return config.model_copy(update=places)


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


def run(*configs: Config, accept_packages: bool = False) -> int:
    """Run everything on this machine, one run after the other; the worst exit status."""
    ends, turns = [0], dict[RunFolder, contextlib.ExitStack]()
    with contextlib.ExitStack() as ours:

        def hold(folder: RunFolder) -> None:  # until its turn is over: later ones are in use too
            _not_on_slurm(folder)
            turns[folder] = ours.enter_context(contextlib.ExitStack())
            turns[folder].enter_context(folder.only_one())

        prepare_all(configs, "local", hold)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
                signal.signal(number, signal.default_int_handler)  # as Ctrl-C
        for folder, turn in turns.items():
            if len(configs) > 1:
                print(f"run {folder.path}", flush=True)
            with turn:
                ends.append(_run(folder, accept_packages))
            if max(ends) == INTERRUPTED:
                break
    return max(ends)


def _run(folder: RunFolder, accept_packages: bool) -> int:
    """Run all of a run here, with progress and the final table on stdout; its exit status."""
    local = Local(folder.config().cluster.slots)
    screen = status.Screen(folder, local)
    try:
        _begin(folder, accept_packages)
        if why := _without_start(folder):
            return _stopped(folder, why)
        while not ((todo := step(folder, local).plan).finished or todo.stop):
            screen.tell(local.turn(screen.tick))
    except KeyboardInterrupt:
        words = f"stopped; run the same command again to go on ({folder.path})"
        print(f"\n{words}", file=sys.stderr)
        return INTERRUPTED
    finally:
        local.end_all()
    if todo.stop:
        return _stopped(folder, f"{todo.stop}; logs are in {folder.layout.jobs}")
    folder.end("FINISHED", finish(todo))
    print("\n" + results.last_words(folder), flush=True)
    for why in todo.given_up.values():
        print(why, file=sys.stderr)
    return 0


def _without_start(folder: RunFolder) -> str:
    """Take what a run takes of another that has ended by now; why it cannot, if so."""
    try:
        if start := share.offered(folder):
            share.require(start)
            share.take(folder, start)
    except InputError as error:
        return str(error)
    return ""


def _stopped(folder: RunFolder, why: str) -> int:
    folder.end("STOPPED", f"stopped: {why}")
    print(f"stopped: {why}", file=sys.stderr)
    return 1


def _begin(folder: RunFolder, accept_packages: bool, cluster: str = "") -> None:
    """A person submits: how the run ended, and what was tried, no longer holds."""
    if accept_packages:
        code.accept_packages(folder)
    folder.reopen()
    folder.journal.record(Submit(who=os.environ.get("USER", str(os.getuid())), cluster=cluster))
