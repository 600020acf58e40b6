"""What a cluster starts: one task of one stage, which makes one or several pieces of a run."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from alt_hpc import interrupt, process
from alt_hpc.errors import Final, one_line
from alt_hpc.graph import STAGES, Piece
from alt_hpc.plan import Array, State, is_whole
from alt_hpc.run import attempt, code, progress
from alt_hpc.run.folder import RunFolder

STOPPED = 75  # exit status of a task that was asked to stop (EX_TEMPFAIL)
WRONG = 2  # of one that no further try would mend
REQUEUE_WITHIN_S = 90.0  # Slurm kills the job that it was told to requeue


@dataclass(frozen=True)
class StageTask:
    """The pieces of one element of a planned job, made one after the other."""

    run: str
    stage: str
    iteration: int
    shards: tuple[int, ...]
    attempt: int

    @classmethod
    def of(cls, run: RunFolder, job: Array) -> list[StageTask]:
        """The tasks of a job, in the order of its elements."""
        return [
            cls(
                str(run.path),
                job.stage,
                job.iteration,
                tuple(piece.shard for piece in element),
                job.attempt,
            )
            for element in job.elements
        ]

    def command(self) -> list[str]:
        """What stands behind `python`: see `main`."""
        shards = ",".join(map(str, self.shards))
        numbers = [str(self.iteration), shards, str(self.attempt)]
        return ["-m", "alt_hpc.task", self.run, self.stage, *numbers]

    def __call__(self) -> None:
        """Make the pieces, in a process that a cluster has started."""
        process.begin()
        self.make()

    def make(self) -> None:
        """Make the pieces, but those that are whole (Slurm reran it)."""
        run = RunFolder(self.run)
        run.check_owner()
        config = run.config()
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # read when torch is imported
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        interrupt.install()
        interrupt.watch(config.cluster.hung_minutes * 60)
        made = 0
        for shard in self.shards:
            piece = Piece(self.iteration, self.stage, shard)
            if _is_whole(run, piece):
                print(f"{piece}: whole already", flush=True)
                continue
            before = progress.saved(run, piece)
            try:
                if process.first():
                    attempt.go_on(run, piece, self.attempt)
                _make(run, piece, self.attempt)
            except Final as error:
                attempt.tell(run, piece, self.attempt, attempt.FINAL, one_line(str(error)))
                print(f"{piece}: {error}", file=sys.stderr, flush=True)
                sys.exit(WRONG)
            except interrupt.Interrupted as reason:
                saved = progress.saved(run, piece)
                print(f"{piece}: {reason}; {saved} units of work are safe", flush=True)
                attempt.tell(run, piece, self.attempt, attempt.STOPPED, str(reason))
                if interrupt.wants_requeue() and (made or saved > before):
                    _requeue()
                sys.exit(STOPPED)
            made += 1


def _is_whole(run: RunFolder, piece: Piece) -> bool:
    """As the plan sees it: a piece made from other sources than are there now is made again."""
    graph = run.graph()
    done = run.manifests.done([piece, *graph.sources(piece)])
    return is_whole(State(graph, done), piece)


def _make(run: RunFolder, piece: Piece, attempt: int) -> None:
    """Let the stage's module make a piece."""
    from alt_hpc.stages.work import Work

    code.check_packages(run, piece.stage)
    module = importlib.import_module(f"alt_hpc.stages.{STAGES[piece.stage].key}")
    module.run(Work.begin(run, piece, attempt))


def _requeue() -> None:
    """Have Slurm start exactly this job or array element again; the first rank asks for all.

    One that saved nothing new is not: it ends badly, and the controller counts its attempt.
    """
    me = process.element()
    if not me:
        return
    if process.first() and shutil.which("scontrol"):
        asked = subprocess.run(
            ["scontrol", "requeue", me], capture_output=True, text=True, timeout=REQUEUE_WITHIN_S
        )
        print(f"scontrol requeue {me}: {asked.stderr.strip() or 'done'}", flush=True)
        if asked.returncode:
            return
    time.sleep(REQUEUE_WITHIN_S)


def main(run: str, stage: str, iteration: str, shards: str, attempt: str) -> None:
    """`python -m alt_hpc.task RUN STAGE ITERATION 0,1,2 ATTEMPT`."""
    numbers = tuple(map(int, shards.split(",")))
    StageTask(run, stage, int(iteration), numbers, int(attempt))()


if __name__ == "__main__":
    main(*sys.argv[1:])
