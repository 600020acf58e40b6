"""One optimisation, from examples to a published model: what sft, reward-model and train share."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from alt_hpc import interrupt
from alt_hpc.lm import check, save
from alt_hpc.run.checkpoints import Checkpoints
from alt_hpc.run.files import append_line, link, make_private, read_lines, replacing
from alt_hpc.run.layout import METRICS_FILE, POLICY_FOLDER
from alt_hpc.settings import digest
from alt_hpc.stages.work import Policy, Work
from alt_hpc.training import loop, ranks
from alt_hpc.training.examples import Trainable
from alt_hpc.training.losses import Loss
from alt_hpc.training.settings import Training

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def optimise(
    work: Work,
    module: nn.Module,
    examples: Sequence[Trainable],
    loss: Loss,
    settings: Training,
    seed: int,
    *,
    first_step: int = 0,
) -> Mapping[str, Tensor] | None:
    """Train and return the weights on the first rank, None elsewhere.

    Every rank calls it. `first_step` continues the curves. What the steps measured is kept beside
    the checkpoints, so that an attempt which goes on from one leaves neither doubled nor missing
    points.
    """
    place = make_private(training_folder(work))
    curves = Curves(work, work.run.layout.metrics(place), first_step)
    result = loop.train(
        module,
        examples,
        loss,
        settings,
        deepspeed_config=work.run.deepspeed(settings.deepspeed),
        seed=seed,
        ranks=work.ranks,
        checkpoints=Checkpoints(work.run.layout.steps(place)),
        log=curves.add,
        stop=interrupt.asked,
    )
    ranks.disconnect()
    curves.close()
    return result.weights


def training_folder(work: Work) -> Path:
    """Checkpoints of a training and what its steps measured.

    Shared by its attempts, and left alone by one whose sources have other checksums.
    """
    return work.run.layout.training(work.piece, digest(work.sources))


def commit(work: Work, model: str, *, rows: int, facts: Mapping[str, Any]) -> None:
    """Publish the exported folder `model` of this attempt, with its metrics; drop checkpoints."""
    folder, layout = work.attempt.folder, work.run.layout
    (folder / METRICS_FILE).write_bytes(layout.metrics(training_folder(work)).read_bytes())
    files = [str(p.relative_to(folder)) for p in (folder / model).rglob("*") if p.is_file()]
    work.attempt.commit([*files, METRICS_FILE], rows=rows, facts=facts)
    shutil.rmtree(layout.trainings(work.piece), ignore_errors=True)


def export_policy(
    work: Work, shape: PretrainedConfig, weights: Any, policy: Policy, dtype: str, card: str
) -> None:
    """Write a Hugging Face folder and check that it loads with every weight present and finite.

    It has the tokenizer and the ends of the policy that it was made from.
    """
    target, tokenizer = work.attempt.folder / POLICY_FOLDER, policy.tokenizer
    silent = work.config.method.silent(tokenizer)
    save.policy(target, shape, weights, tokenizer, dtype, card, policy.ends, silent)
    check.weights(target)


def publish_policy(work: Work, *, rows: int, facts: Mapping[str, Any]) -> None:
    """Link `policies/NNN` to the exported folder, and commit it."""
    link(work.run.layout.policy(work.piece.iteration), work.attempt.folder / POLICY_FOLDER)
    commit(work, POLICY_FOLDER, rows=rows, facts=facts)


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Dropout while training: every dropout layer, and attention where it takes a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p  # type: ignore[assignment]


class Curves:
    """Writes each optimiser step to a file and to TensorBoard, on the first rank."""

    def __init__(self, work: Work, file: Path, first_step: int) -> None:
        self.work = work
        self.file = file
        self.first_step = first_step
        self.started = time.time()
        self.writer: Any = None

    def add(self, record: loop.StepRecord) -> None:
        """One step. The first of an attempt removes what earlier attempts wrote from there on."""
        if self.writer is None:
            self._begin(record.step)
        append_line(self.file, dataclasses.asdict(record))
        step = self.first_step + record.step
        values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
        values |= record.parts | {"tokens_per_s": record.tokens / max(record.seconds, 1e-6)}
        for name, value in values.items():
            self.writer.add_scalar(f"{self.work.piece.stage}/{name}", value, step)
        self.writer.flush()
        self.work.show(record.step, record.steps, "steps", self.started)

    def _begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_lines(self.file) if row["step"] < step]
        with replacing(self.file) as fresh:
            fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        place = self.work.run.layout.events(self.work.piece.stage)
        self.writer = SummaryWriter(str(place), purge_step=self.first_step + step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
