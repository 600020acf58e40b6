"""What a cluster starts: one task of one stage, its ranks and threads from the environment."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time

from alt_hpc import interrupt
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import RunFolder

RANKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def call(entry: str, *arguments: str) -> None:
    """Run `module:function` with text arguments, in a process that a cluster has started."""
    for name, slurm in RANKS.items():
        if slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    if "SLURM_JOB_ID" in os.environ:
        again = os.environ.get("SLURM_RESTART_COUNT", "0")
        os.environ["ALT_HPC_START"] = f"{os.environ['SLURM_JOB_ID']}-{again}"
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(*arguments)


STOPPED = 75  # exit status of a task that was asked to stop (EX_TEMPFAIL)
REQUEUE_WITHIN_S = 90.0  # Slurm kills the job that it was told to requeue


def stage(run: str, stage: str, iteration: str, shards: str, attempt: str) -> None:
    """Run the pieces of one task (`0` or `3,4,5`), but those that are whole (Slurm reran it)."""
    folder = RunFolder(run)
    folder.check_owner()
    os.environ["OMP_NUM_THREADS"] = str(folder.config().threads)  # read when torch is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    interrupt.install()
    interrupt.watch(folder.config().cluster.hung_minutes * 60)
    made = 0
    for piece in [Piece(int(iteration), stage, int(shard)) for shard in shards.split(",")]:
        if folder.manifest(piece) is not None:
            print(f"{piece}: whole already", flush=True)
            continue
        before = folder.saved(piece)
        try:
            _run(folder, piece, int(attempt))
        except interrupt.Interrupted as reason:
            saved = folder.saved(piece)
            print(f"{piece}: {reason}; {saved} units of work are safe", flush=True)
            if interrupt.wants_requeue() and (made or saved > before):
                _requeue()
            sys.exit(STOPPED)
        made += 1


def _run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    module = importlib.import_module(f"alt_hpc.stages.{piece.stage.replace('-', '_')}")
    module.run(folder, piece, attempt)


def _requeue() -> None:
    """Have Slurm start exactly this job or array element again; the first rank asks for all.

    One that saved nothing new is not: it ends badly, and the controller counts its attempt.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return
    if os.environ.get("RANK", "0") == "0" and shutil.which("scontrol"):
        array, index = (os.environ.get(f"SLURM_ARRAY_{n}") for n in ("JOB_ID", "TASK_ID"))
        me = f"{array}_{index}" if array and index else os.environ["SLURM_JOB_ID"]
        asked = subprocess.run(
            ["scontrol", "requeue", me], capture_output=True, text=True, timeout=REQUEUE_WITHIN_S
        )
        print(f"scontrol requeue {me}: {asked.stderr.strip() or 'done'}", flush=True)
        if asked.returncode:
            return
    time.sleep(REQUEUE_WITHIN_S)


if __name__ == "__main__":
    call(*sys.argv[1:])
