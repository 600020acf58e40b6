"""One optimisation, from examples to a published model: what sft, reward-model and train share."""

import json
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alt_hpc import interrupt
from alt_hpc.lm import check, save
from alt_hpc.run.files import append_line, link, make_private, read_lines, write_atomically
from alt_hpc.run.layout import METRICS_FILE, MOMENTS_FILE, POLICY_FOLDER
from alt_hpc.run.manifests import Checkpoints
from alt_hpc.settings import digest
from alt_hpc.stages.work import Policy, Work
from alt_hpc.training import loop, ranks
from alt_hpc.training.examples import Siblings, Trainable
from alt_hpc.training.losses import Loss
from alt_hpc.training.settings import PolicyTraining, Training


def optimise(
    work: Work, module: nn.Module, examples: Sequence[Trainable], loss: Loss, settings: Training
) -> Mapping[str, Tensor] | None:
    """Train and return the weights on the first rank, None elsewhere. Every rank calls it.

    What the steps measured is kept beside the checkpoints of all attempts, so that one which goes
    on leaves neither doubled nor missing points; one whose sources have other checksums begins.
    """
    layout = work.run.layout
    place = make_private(layout.training(work.piece, digest(work.sources)))
    curves = _curves(work, place / METRICS_FILE)
    next(curves)
    result = loop.train(
        module,
        examples,
        loss,
        settings,
        deepspeed_config=work.run.facts()["deepspeed"][settings.deepspeed or ""],
        seed=work.config.seed + work.piece.iteration,
        ranks=work.ranks,
        checkpoints=Checkpoints(layout.steps(place)),
        log=curves.send,
        stop=interrupt.asked,
        carried=_carried(work, settings),
    )
    ranks.disconnect()
    if work.ranks.first:
        folder = work.attempt.folder
        shutil.copyfile(place / METRICS_FILE, folder / METRICS_FILE)
        if result.moments is not None:
            save_file(result.moments, folder / MOMENTS_FILE)
            shutil.copymode(folder / METRICS_FILE, folder / MOMENTS_FILE)  # else the owner's alone
    return result.weights


def _carried(work: Work, settings: Training) -> dict[str, Tensor] | None:
    """Adam's moments after the iteration before, of the first none; None: they do not go on."""
    if not (isinstance(settings, PolicyTraining) and settings.carry_moments):
        return None
    before = work.piece.iteration - 1
    if before == 0:
        return {}
    folder, _ = work.run.manifests.open(replace(work.piece, iteration=before))
    return load_file(folder / MOMENTS_FILE)


def make_policy(
    work: Work,
    before: Policy,
    model: PreTrainedModel,
    examples: Sequence[Siblings],
    loss: Loss,
    settings: Training,
    card: str,
    shortened: int,
) -> None:
    """Train `model`; publish it with the tokenizer and ends of `before`. Every rank calls it."""
    shape, tokenizer, dtype = model.config, before.tokenizer, settings.export_dtype
    weights = optimise(work, model, examples, loss, settings)
    if weights is None:
        return
    folder, size = work.attempt.folder / POLICY_FOLDER, shape.get_text_config().vocab_size
    silent = work.config.method.silent(tokenizer, size)
    save.policy(folder, shape, weights, tokenizer, dtype, card, before.ends, silent)
    check.weights(folder)  # it loads, with every weight present and finite
    link(work.run.layout.policy(work.piece.iteration), folder)
    steps = len(loop.global_batches(len(examples), settings, work.config.seed))
    rows = sum(len(example.answers) for example in examples)
    tokens = sum(row["loss_tokens"] for row in read_lines(folder.parent / METRICS_FILE))
    publish(work, rows, {"steps": steps, "tokens": tokens, "prompts_shortened": shortened})


def publish(work: Work, rows: int, facts: Mapping[str, Any]) -> None:
    """Commit what is in this attempt's folder: an export and its metrics; drop checkpoints."""
    folder = work.attempt.folder
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    work.attempt.commit(files, rows=rows, facts=facts)
    shutil.rmtree(work.run.layout.trainings(work.piece), ignore_errors=True)


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Dropout while training: every dropout layer, and attention where it takes a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p  # type: ignore[assignment]


def _curves(work: Work, file: Path) -> Generator[None, loop.StepRecord, None]:
    """Write each optimiser step that is sent, on the first rank, to a file and to TensorBoard.

    What earlier attempts wrote from the first of them on is removed.
    """
    stage, started, events = work.piece.stage, time.time(), work.run.layout.tensorboard
    past = [replace(work.piece, iteration=k) for k in range(1, work.piece.iteration)]
    found = map(work.run.manifests.get, past)
    before = sum(made.facts["steps"] for made in found if made)  # the curves go on
    record = yield

    from torch.utils.tensorboard import SummaryWriter

    kept = [json.dumps(row) + "\n" for row in read_lines(file) if row["step"] < record.step]
    write_atomically(file, "".join(kept))
    writer = SummaryWriter(str(events / stage), purge_step=before + record.step)
    first = record.step
    while True:
        append_line(file, asdict(record))
        values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
        values |= record.parts | {"tokens_per_s": record.tokens / max(record.seconds, 1e-6)}
        for name, value in values.items():
            writer.add_scalar(f"{stage}/{name}", value, before + record.step)
        writer.flush()
        work.show(record.step, record.steps, "steps", started, first - 1)
        record = yield
