"""`alt-hpc`: the command line. Light to start: each command imports what it needs."""

import argparse
import re
import sys
from pathlib import Path

from alt_hpc import process
from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES, Piece

OF_A_CONFIG = {
    "submit": "check a config and start its run on Slurm",
    "run": "run a config on this machine",
    "evaluate": "answer and measure: references, policies, the start; trains nothing",
    "plan": "print every job that would be submitted next, and submit nothing",
    "fetch": "get a config's models and data into the cache, for offline nodes",
}
OF_A_RUN = {
    "status": "show how far a run is",
    "report": "tables, pictures and examples of a run, or of several side by side",
    "cancel": "cancel a run's jobs; submitting again goes on from there",
    "controller": "plan and submit once (what the controller job runs)",
    "stage": "run one piece of a run by hand",
}
OF_SEVERAL = ("submit", "run", "status", "report")
SEEDS = "one run of each config and seed, in its `run` folder's name with -seedN behind"
A_SEED = re.compile(r"0|[1-9]\d*", re.ASCII)
SET = "override a key, such as --set sample.prompts=64 (may be repeated)"
TO = "where the files are written (default: report/ in the first run)"
ACCEPT = "go on with other versions of packages than the run began with"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; wrong input prints one sentence and returns 2."""
    options = _parser().parse_args(arguments)
    process.print_anything()
    from alt_hpc import config
    from alt_hpc.clusters.cluster import QueueUnknown
    from alt_hpc.run.manifests import PieceDamaged

    try:
        return _run(options)
    except InputError as error:
        if error.field and "config" in options:  # then with file and line
            path, overrides, _ = _given(options)[error.number]
            error = config.located(error, path, overrides)
        problem = str(error)
    except QueueUnknown as error:
        problem = f"Slurm does not answer: {error}"
    except PieceDamaged as error:
        problem = str(error)
    except BrokenPipeError:
        return 0
    print(f"alt-hpc: {' '.join(problem.splitlines())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    about = "Align language models with textual feedback on Slurm."
    parser = argparse.ArgumentParser(prog="alt-hpc", description=about)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, words in {**OF_A_CONFIG, **OF_A_RUN}.items():
        add = commands.add_parser(name, help=words, description=words).add_argument
        if name == "stage":
            add("stage", choices=[*STAGES], metavar="STAGE")
            add("--iteration", type=int, default=0)
            add("--shard", type=int, default=0)
        if name in OF_A_RUN:
            add("run", type=Path, metavar="RUN", nargs="+" if name in OF_SEVERAL else None)
            if name == "report":
                add("--to", type=Path, metavar="FOLDER", help=TO)
            continue
        add("config", type=Path, metavar="CONFIG", nargs="+" if name in OF_SEVERAL else 1)
        add("--set", action="append", default=[], metavar="KEY=VALUE", help=SET)
        if name in ("submit", "evaluate"):
            add("--wait", action="store_true", help="on Slurm: show progress to the end")
        if name in ("submit", "run"):
            add("--seeds", metavar="1,2,3", help=SEEDS)
        if name in ("submit", "run", "evaluate"):
            add("--accept-packages", action="store_true", help=ACCEPT)
    return parser


def _given(options: argparse.Namespace) -> list[tuple[Path, list[str], str]]:
    """Each run that a command names: its config, what overrides it, what its folder's name gets.

    InputError where the seeds are none.
    """
    seeds = (getattr(options, "seeds", None) or "").split(",")
    if seeds == [""]:
        return [(path, options.set, "") for path in options.config]
    if len(set(seeds)) < len(seeds) or not all(map(A_SEED.fullmatch, seeds)):
        raise InputError(f"--seeds {options.seeds}: expected whole numbers, such as 1,2,3")
    both = [(path, seed) for path in options.config for seed in seeds]
    return [(path, [*options.set, f"seed={seed}"], f"-seed{seed}") for path, seed in both]


def _run(options: argparse.Namespace) -> int:
    from alt_hpc import config as configs
    from alt_hpc.control import chain, preview, start, status
    from alt_hpc.report import page, results
    from alt_hpc.run.folder import RunFolder
    from alt_hpc.task import StageTask

    if options.command in OF_A_CONFIG:
        given = _given(options)
        chosen = [configs.load(path, overrides).behind(end) for path, overrides, end in given]
    else:
        places = options.run if options.command in OF_SEVERAL else [options.run]
        folder, *further = map(RunFolder, places)
        for run in (folder, *further):
            run.facts()  # or it is no run folder
    match options.command:
        case "submit":
            return start.submit(*chosen, wait=options.wait, accept_packages=options.accept_packages)
        case "run":
            return start.run(*chosen, accept_packages=options.accept_packages)
        case "evaluate":
            return start.evaluate(chosen[0], options.wait, options.accept_packages)
        case "plan":
            print(preview.preview(start.absolute(chosen[0])))
        case "fetch":
            start.fetch(chosen[0])
        case "status":
            several = status.together([folder, *further]) if further else ""
            print(several or status.status(folder))
        case "report":
            if not further:
                print(results.last_words(folder) + "\n")
            if further or results.reports(folder):
                print(page.write([folder, *further], options.to))
        case "cancel":
            return start.cancel(folder)
        case "controller":
            return chain.run(folder)
        case "stage":
            piece = Piece(options.iteration, options.stage, options.shard)
            if piece not in folder.graph().pieces():
                raise InputError(f"{folder.path}: {piece}: the run has no such piece (yet)")
            StageTask(str(folder.path), piece.stage, piece.iteration, (piece.shard,), 0).make()
    return 0


if __name__ == "__main__":
    sys.exit(main())
