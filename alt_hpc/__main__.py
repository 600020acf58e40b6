"""`alt-hpc`: the command line. Light to start: each command imports what it needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES

WRONG_INPUT = 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; wrong input prints one sentence and returns 2."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
        return status
    except InputError as error:
        print(f"alt-hpc: {' '.join(str(_located(error, options)).splitlines())}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        return 0


def _located(error: InputError, options: argparse.Namespace) -> InputError:
    """With file and line, where a config was given."""
    from alt_hpc import config

    return config.located(error, options.config, options.set) if "config" in options else error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alt-hpc", description="Align language models with textual feedback on Slurm."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, words in (
        ("submit", _submit, "check a config and start its run on Slurm"),
        ("run", _run, "run a config on this machine"),
        ("plan", _plan, "print every job that would be submitted next, and submit nothing"),
        ("fetch", _fetch, "get a config's models and data into the cache, for offline nodes"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("config", type=Path, metavar="CONFIG")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a key, such as --set sample.prompts=64 (may be repeated)",
        )
        if name == "submit":
            command.add_argument("--wait", action="store_true", help="show progress to the end")
        if name in ("submit", "run"):
            command.add_argument(
                "--accept-packages",
                action="store_true",
                help="go on with other versions of packages than the run began with",
            )
        command.set_defaults(command=function)
    for name, function, words in (
        ("status", _status, "show how far a run is"),
        ("report", _report, "print a run's table and sample summaries"),
        ("cancel", _cancel, "cancel a run's jobs; submitting again goes on from there"),
        ("controller", _controller, "plan and submit once (what the controller job runs)"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("run", type=Path, metavar="RUN")
        command.set_defaults(command=function)
    stage = commands.add_parser("stage", help="run one piece of a run by hand")
    stage.add_argument("name", choices=[*STAGES], metavar="STAGE")
    stage.add_argument("run", type=Path, metavar="RUN")
    stage.add_argument("--iteration", type=int, default=0)
    stage.add_argument("--shard", type=int, default=0)
    stage.set_defaults(command=_stage)
    return parser


def _submit(options: argparse.Namespace) -> int:
    from alt_hpc import config
    from alt_hpc.control import start

    chosen = config.load(options.config, options.set)
    return start.submit(chosen, wait=options.wait, accept_packages=options.accept_packages)


def _run(options: argparse.Namespace) -> int:
    from alt_hpc import config
    from alt_hpc.control import start

    chosen = config.load(options.config, options.set)
    return start.run(chosen, accept_packages=options.accept_packages)


def _plan(options: argparse.Namespace) -> int:
    from alt_hpc import config
    from alt_hpc.control import preview, start

    print(preview.preview(start.absolute(config.load(options.config, options.set))))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from alt_hpc import config
    from alt_hpc.control import start

    start.fetch(config.load(options.config, options.set))
    return 0


def _status(options: argparse.Namespace) -> int:
    from alt_hpc.control import status
    from alt_hpc.run.folder import RunFolder

    print(status.status(RunFolder(options.run)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from alt_hpc.report import text
    from alt_hpc.run.folder import RunFolder

    print(text.summary(RunFolder(options.run)))
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from alt_hpc.control import start
    from alt_hpc.run.folder import RunFolder

    folder = RunFolder(options.run)
    folder.facts()  # or it is no run folder
    return start.cancel(folder)


def _controller(options: argparse.Namespace) -> int:
    from alt_hpc.control import chain
    from alt_hpc.run.folder import RunFolder

    folder = RunFolder(options.run)
    folder.facts()  # or it is no run folder
    return chain.run(folder)


def _stage(options: argparse.Namespace) -> int:
    from alt_hpc.graph import Piece
    from alt_hpc.run.folder import RunFolder
    from alt_hpc.run.manifests import PieceDamaged
    from alt_hpc.task import StageTask

    folder, piece = RunFolder(options.run), Piece(options.iteration, options.name, options.shard)
    folder.facts()  # or it is no run folder
    if piece not in folder.graph().pieces():
        raise InputError(f"{folder.path}: {piece}: the run has no such piece (yet)")
    try:
        StageTask(str(options.run), piece.stage, piece.iteration, (piece.shard,), 0).make()
    except PieceDamaged as error:
        raise InputError(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
