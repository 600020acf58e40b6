"""One optimisation, from examples to a published model: what sft, reward-model and train share."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alt_hpc import interrupt, trainer
from alt_hpc import ranks as processes
from alt_hpc.config import Training
from alt_hpc.losses import Loss, Trainable
from alt_hpc.pieces import Piece
from alt_hpc.ranks import Ranks
from alt_hpc.runfolder import METRICS, Attempt, RunFolder, append_line, read_lines


def optimise(
    folder: RunFolder,
    piece: Piece,
    ranks: Ranks,
    module: nn.Module,
    examples: Sequence[Trainable],
    loss: Loss,
    settings: Training,
    seed: int,
    *,
    inputs: Mapping[str, str],
    first_step: int = 0,
) -> Mapping[str, Tensor] | None:
    """Train and return the weights on rank 0, None elsewhere. `first_step` continues the curves.

    Every rank calls it. What the steps measured is kept beside the checkpoints, so that an
    attempt which goes on from one leaves neither doubled nor missing points.
    """
    place = folder.checkpoints(piece, inputs)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    curves = Curves(folder, piece, place / METRICS, first_step)
    result = trainer.train(
        module,
        examples,
        loss,
        settings,
        deepspeed_config=folder.deepspeed(settings.deepspeed),
        seed=seed,
        ranks=ranks,
        checkpoints=place / "steps",
        log=curves.add,
        stop=interrupt.asked,
    )
    processes.disconnect()
    curves.close()
    return result.weights


def begin(folder: RunFolder, piece: Piece, attempt: int) -> tuple[Ranks, Attempt | None]:
    """Find the other ranks of this start of the job; rank 0 also begins the attempt."""
    meeting = folder.meeting_file(piece)
    meeting.parent.mkdir(parents=True, exist_ok=True)
    ranks = processes.from_environment()
    work = folder.attempt(piece, attempt) if ranks.first else None
    processes.connect(meeting, ranks)
    return ranks, work


def commit(
    folder: RunFolder,
    work: Attempt,
    model: str,
    *,
    rows: int,
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """Publish the exported folder `model` of this attempt, with its metrics; drop checkpoints."""
    source = folder.checkpoints(work.piece, inputs) / METRICS
    (work.folder / METRICS).write_bytes(source.read_bytes())
    files = [
        str(p.relative_to(work.folder)) for p in (work.folder / model).rglob("*") if p.is_file()
    ]
    work.commit([*files, METRICS], rows=rows, inputs=inputs, facts=facts)
    folder.remove_checkpoints(work.piece)


class Curves:
    """Writes each optimiser step to a file and to TensorBoard, on rank 0."""

    def __init__(self, folder: RunFolder, piece: Piece, file: Path, first_step: int) -> None:
        self.folder = folder
        self.piece = piece
        self.file = file
        self.first_step = first_step
        self.started = time.time()
        self.writer: Any = None

    def add(self, record: trainer.StepRecord) -> None:
        """One step. The first of an attempt removes what earlier attempts wrote from there on."""
        if self.writer is None:
            self._begin(record.step)
        append_line(self.file, dataclasses.asdict(record))
        step = self.first_step + record.step
        values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
        values |= record.parts | {"tokens_per_s": record.tokens / max(record.seconds, 1e-6)}
        for name, value in values.items():
            self.writer.add_scalar(f"{self.piece.stage}/{name}", value, step)
        self.writer.flush()
        self.folder.show_progress(self.piece, record.step, record.steps, "steps", self.started)

    def _begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_lines(self.file) if row["step"] < step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        place = self.folder.tensorboard(self.piece.stage)
        self.writer = SummaryWriter(str(place), purge_step=self.first_step + step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
