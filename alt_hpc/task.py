"""What a cluster starts: one task of one stage, which makes one or several pieces of a run."""

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
from alt_hpc.plan import State, is_whole
from alt_hpc.run import attempt, code
from alt_hpc.run.folder import RunFolder

REQUEUE_WITHIN_S = 90.0  # Slurm kills the job that it was told to requeue


@dataclass(frozen=True)
class StageTask:
    """The pieces of one element of a planned job, made one after the other."""

    run: str
    stage: str
    iteration: int
    shards: tuple[int, ...]
    attempt: int

    def command(self) -> list[str]:
        """What stands behind `python`: `-m alt_hpc.task RUN STAGE ITERATION 0,1,2 ATTEMPT`."""
        shards = ",".join(map(str, self.shards))
        words = [self.run, self.stage, str(self.iteration), shards, str(self.attempt)]
        return ["-m", "alt_hpc.task", *words]

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
        interrupt.install(config.cluster.hung_minutes * 60)
        graph, made = run.graph(), False
        for piece in (Piece(self.iteration, self.stage, shard) for shard in self.shards):
            found = run.manifests.done([piece, *graph.sources(piece)])
            if is_whole(State(graph, found), piece):  # made from the sources as they are now
                print(f"{piece}: whole already", flush=True)
                continue
            before = attempt.saved(run, piece)
            try:
                from alt_hpc.stages.work import Work

                if process.first():
                    run.layout.verdict(piece, self.attempt).unlink(missing_ok=True)  # it goes on
                code.check_packages(run, self.stage)
                stage = importlib.import_module(f"alt_hpc.stages.{STAGES[self.stage].key}")
                stage.run(Work(run, piece, self.attempt))
                made = True
            except Final as error:
                attempt.tell(run, piece, self.attempt, attempt.FINAL, one_line(str(error)))
                print(f"{piece}: {error}", file=sys.stderr, flush=True)
                sys.exit(2)
            except interrupt.Interrupted as reason:
                saved = attempt.saved(run, piece)
                print(f"{piece}: {reason}; {saved} units of work are safe", flush=True)
                attempt.tell(run, piece, self.attempt, attempt.STOPPED, str(reason))
                # One that saved nothing new ends badly: the controller counts its attempt.
                if interrupt.wants_requeue() and process.element() and (made or saved > before):
                    _requeue(process.element())
                sys.exit(os.EX_TEMPFAIL)
            except Exception as error:
                attempt.tell_error(run, piece, self.attempt, error)
                raise


def _requeue(me: str) -> None:
    """Have Slurm start exactly this job or array element again; the first rank asks for all."""
    if process.first() and shutil.which("scontrol"):
        command = ["scontrol", "requeue", me]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=REQUEUE_WITHIN_S)
        print(f"scontrol requeue {me}: {asked.stderr.strip() or 'done'}", flush=True)
        if asked.returncode:
            return
    time.sleep(REQUEUE_WITHIN_S)


if __name__ == "__main__":
    place, name, k, numbers, number = sys.argv[1:]
    StageTask(place, name, int(k), tuple(map(int, numbers.split(","))), int(number))()
