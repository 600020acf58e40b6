"""One optimisation, from examples to a published model: what sft, reward-model and train share."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from alt_hpc import interrupt
from alt_hpc.lm import check, save
from alt_hpc.run.checkpoints import Checkpoints
from alt_hpc.run.files import append_line, link, make_private, read_lines, write_atomically
from alt_hpc.run.layout import METRICS_FILE, POLICY_FOLDER
from alt_hpc.settings import digest
from alt_hpc.stages.work import Policy, Work
from alt_hpc.training import loop, ranks
from alt_hpc.training.examples import Trainable
from alt_hpc.training.losses import Loss
from alt_hpc.training.settings import Training


def optimise(
    work: Work, module: nn.Module, examples: Sequence[Trainable], loss: Loss, settings: Training
) -> Mapping[str, Tensor] | None:
    """Train and return the weights on the first rank, None elsewhere. Every rank calls it.

    What the steps measured is kept beside the checkpoints, so that an attempt which goes on from
    one leaves neither doubled nor missing points.
    """
    place = make_private(_training_folder(work))
    curves = _Curves(work, work.run.layout.metrics(place))
    result = loop.train(
        module,
        examples,
        loss,
        settings,
        deepspeed_config=work.run.deepspeed(settings.deepspeed),
        seed=_seed(work),
        ranks=work.ranks,
        checkpoints=Checkpoints(work.run.layout.steps(place)),
        log=curves.add,
        stop=interrupt.asked,
    )
    ranks.disconnect()
    return result.weights


def make_policy(
    work: Work,
    before: Policy,
    model: PreTrainedModel,
    examples: Sequence[Trainable],
    loss: Loss,
    settings: Training,
    card: str,
    rows: int,
    shortened: int,
) -> None:
    """Train `model`; export it with the tokenizer and the ends of `before`, check and publish it.

    Every rank calls it; the first exports and publishes.
    """
    shape, tokenizer, dtype = model.config, before.tokenizer, settings.export_dtype
    weights = optimise(work, model, examples, loss, settings)
    if weights is None:
        return
    folder, silent = work.attempt.folder / POLICY_FOLDER, work.config.method.silent(tokenizer)
    save.policy(folder, shape, weights, tokenizer, dtype, card, before.ends, silent)
    check.weights(folder)  # it loads, with every weight present and finite
    link(work.run.layout.policy(work.piece.iteration), folder)
    steps = len(loop.global_batches(len(examples), settings, _seed(work)))
    publish(work, POLICY_FOLDER, rows, {"steps": steps, "prompts_shortened": shortened})


def publish(work: Work, model: str, rows: int, facts: Mapping[str, Any]) -> None:
    """Commit the exported folder `model` of this attempt, with its metrics; drop checkpoints."""
    folder, layout = work.attempt.folder, work.run.layout
    shutil.copyfile(layout.metrics(_training_folder(work)), folder / METRICS_FILE)
    files = [str(p.relative_to(folder)) for p in (folder / model).rglob("*") if p.is_file()]
    work.attempt.commit([*files, METRICS_FILE], rows=rows, facts=facts)
    shutil.rmtree(layout.trainings(work.piece), ignore_errors=True)


def _seed(work: Work) -> int:
    return work.config.seed + work.piece.iteration


def _training_folder(work: Work) -> Path:
    """Of all attempts, but left alone by one whose sources have other checksums."""
    return work.run.layout.training(work.piece, digest(work.sources))


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Dropout while training: every dropout layer, and attention where it takes a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p  # type: ignore[assignment]


class _Curves:
    """Writes each optimiser step to a file and to TensorBoard, on the first rank."""

    def __init__(self, work: Work, file: Path) -> None:
        self.work, self.file, self.started, self.writer = work, file, time.time(), cast(Any, None)
        past = [replace(work.piece, iteration=k) for k in range(1, work.piece.iteration)]
        found = map(work.run.manifests.get, past)
        self.before = sum(made.facts["steps"] for made in found if made)  # the curves go on

    def add(self, record: loop.StepRecord) -> None:
        if self.writer is None:
            self._begin(record.step)
        append_line(self.file, asdict(record))
        values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
        values |= record.parts | {"tokens_per_s": record.tokens / max(record.seconds, 1e-6)}
        for name, value in values.items():
            tag = f"{self.work.piece.stage}/{name}"
            self.writer.add_scalar(tag, value, self.before + record.step)
        self.writer.flush()
        self.work.show(record.step, record.steps, "steps", self.started)

    def _begin(self, step: int) -> None:
        """Remove what earlier attempts wrote from this step on."""
        from torch.utils.tensorboard import SummaryWriter

        kept = [json.dumps(row) + "\n" for row in read_lines(self.file) if row["step"] < step]
        write_atomically(self.file, "".join(kept))
        place = str(self.work.run.layout.events(self.work.piece.stage))
        self.writer = SummaryWriter(place, purge_step=self.before + step)
