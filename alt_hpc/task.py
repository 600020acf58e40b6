"""What a cluster starts: one task of one stage, its ranks and threads from the environment."""

from __future__ import annotations

import importlib
import os
import sys

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


def stage(run: str, stage: str, iteration: str, shard: str, attempt: str) -> None:
    """Run one piece of a run; nothing when it is whole already (Slurm reran the job)."""
    folder = RunFolder(run)
    folder.check_owner()
    piece = Piece(int(iteration), stage, int(shard))
    if folder.manifest(piece) is not None:
        print(f"{piece}: whole already", flush=True)
        return
    os.environ["OMP_NUM_THREADS"] = str(folder.config().threads)  # read when torch is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    module = importlib.import_module(f"alt_hpc.stages.{stage.replace('-', '_')}")
    module.run(folder, piece, int(attempt))


if __name__ == "__main__":
    call(*sys.argv[1:])
