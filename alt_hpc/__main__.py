"""`alt-hpc`: the command line. Light to start: each command imports what it needs."""

import argparse
import sys
from pathlib import Path

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
SET = "override a key, such as --set sample.prompts=64 (may be repeated)"
TO = "where the files are written (default: report/ in the first run)"
ACCEPT = "go on with other versions of packages than the run began with"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; wrong input prints one sentence and returns 2."""
    options = _parser().parse_args(arguments)
    from alt_hpc import config
    from alt_hpc.clusters.cluster import QueueUnknown
    from alt_hpc.run.manifests import PieceDamaged

    try:
        return _run(options)
    except InputError as error:
        given = "config" in options  # then with file and line
        problem = str(config.located(error, options.config, options.set) if given else error)
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
            add("run", type=Path, metavar="RUN", nargs="+" if name == "report" else None)
            if name == "report":
                add("--to", type=Path, metavar="FOLDER", help=TO)
            continue
        add("config", type=Path, metavar="CONFIG")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help=SET)
        if name in ("submit", "evaluate"):
            add("--wait", action="store_true", help="on Slurm: show progress to the end")
        if name in ("submit", "run", "evaluate"):
            add("--accept-packages", action="store_true", help=ACCEPT)
    return parser


def _run(options: argparse.Namespace) -> int:
    from alt_hpc import config as configs
    from alt_hpc.control import chain, preview, start, status
    from alt_hpc.report import page, results
    from alt_hpc.run.folder import RunFolder
    from alt_hpc.task import StageTask

    if options.command in OF_A_CONFIG:
        config = configs.load(options.config, options.set)
    else:
        given = options.run if options.command == "report" else [options.run]
        folder, *further = map(RunFolder, given)
        for run in (folder, *further):
            run.facts()  # or it is no run folder
    match options.command:
        case "submit":
            return start.submit(config, options.wait, options.accept_packages)
        case "run":
            return start.run(config, options.accept_packages)
        case "evaluate":
            return start.evaluate(config, options.wait, options.accept_packages)
        case "plan":
            print(preview.preview(start.absolute(config)))
        case "fetch":
            start.fetch(config)
        case "status":
            print(status.status(folder))
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
