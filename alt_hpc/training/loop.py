"""The training loop over DeepSpeed: the same steps on any number of ranks, and resumable.

A caller starts one process per device; each calls `connect`, `prepare`, `train`, `disconnect`.
The first then loads the result's weights into a model made anew: the trained one is used up.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from alt_hpc.errors import InputError, TrainingDiverged
from alt_hpc.interrupt import Interrupted
from alt_hpc.lm.blocks import train_top
from alt_hpc.settings import digest
from alt_hpc.training import deepspeed, moments
from alt_hpc.training.checkpoints import Store, resume, save
from alt_hpc.training.examples import Trainable, move
from alt_hpc.training.losses import ForLoss, Loss
from alt_hpc.training.ranks import Ranks
from alt_hpc.training.settings import Training, check_batches


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, over all ranks."""

    step: int  # from 1
    steps: int
    loss: float  # mean over the step's loss tokens (or pairs)
    parts: dict[str, float]  # means too: ce, entropy, kl; accuracy
    lr: float
    grad_norm: float  # before clipping
    loss_tokens: int
    tokens: int  # all, prompts included, padding not
    seconds: float
    skipped: bool  # float16: the gradients overflowed and the weights stayed


class TrainResult(NamedTuple):
    """The whole state dict on the CPU on rank 0: in float32 what was trained, all else as given."""

    weights: dict[str, Tensor] | None  # None on other ranks
    resumed_at: int  # the step after which this attempt took over; 0: it began
    moments: dict[str, Tensor] | None = None  # Adam's, where carried, on rank 0


def order(n: int, epochs: int, seed: int) -> list[NDArray[np.int64]]:
    """Which examples each epoch visits, in turn: a function of its arguments alone."""
    return [np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(epochs)]


def global_batches(n: int, settings: Training, seed: int) -> list[NDArray[np.int64]]:
    """The examples of every optimiser step; an epoch may end with a smaller one: none is lost."""
    size, epochs = settings.global_batch, order(n, settings.epochs, seed)
    return [epoch[at : at + size] for epoch in epochs for at in range(0, n, size)]


def learning_rate(step: int, steps: int, settings: Training) -> float:
    """Linear warm-up: step 1 is above 0, step W = max(1, ceil(warmup * steps)) has the full rate.

    Then linear decay: 0 would be reached one step after the last.
    """
    warm = max(1, math.ceil(settings.warmup * steps))
    if step <= warm:
        return settings.lr * step / warm
    return settings.lr * (steps - step + 1) / (steps - warm + 1)


def prepare(model: PreTrainedModel, settings: Training) -> None:
    """Have trained what `settings` says, and activations recomputed if it says so."""
    train_top(model, settings.trained_blocks, settings.trains_embeddings)
    if settings.checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def train(
    module: nn.Module,
    examples: Sequence[Trainable],
    loss: Loss,
    settings: Training,
    *,
    deepspeed_config: dict[str, Any],
    seed: int,
    ranks: Ranks,
    checkpoints: Store,
    log: Callable[[StepRecord], None],
    stop: Callable[[], bool] = lambda: False,
    carried: Mapping[str, Tensor] | None = None,
) -> TrainResult:
    """Minimise `loss` over `examples`, resuming from the newest whole checkpoint.

    An optimiser step's loss is the sum over its loss tokens divided by their number, over all
    ranks and micro-batches: the number of ranks changes nothing but rounding.

    The module is on the CPU, in float32 so that nothing is rounded away at the start; what does
    not require grad is left alone. It is used up: afterwards it holds pieces of the model. The
    examples are all of them, the same on every rank. The seed decides data order and dropout.
    What `settings` decide is filled into `deepspeed_config` (see `deepspeed.filled`). The caller
    removes the checkpoints, this training's own, once the result is safe. `log` is called on rank
    0 after every optimiser step; `stop` is asked on every rank at every step: one's True stops all.
    `carried` are the moments of Adam that an earlier training gave back, to go on with (empty:
    begin anew), and has the result hold them; the schedule begins anew either way.

    InputError where settings, examples or the JSON cannot be used; TrainingDiverged where a loss,
    gradient norm or weight is not finite; Interrupted where `stop` said so on some rank: all have
    saved, and the next call goes on from there.
    """
    _check(module, examples)
    check_batches(settings, ranks.world)
    batches = global_batches(len(examples), settings, seed)
    config = deepspeed.filled(deepspeed_config, settings, ranks)
    if carried is not None:
        moments.check(module, carried, config)
    originals = deepspeed.Originals(module, ranks)
    # Dropout differs between ranks, and is the same whenever this is run again.
    set_seed(int(np.random.SeedSequence([seed, ranks.rank]).generate_state(1)[0]))
    engine = deepspeed.engine(ForLoss(module, loss), settings, config)
    free = {"checkpoint_minutes", "export_dtype", "deepspeed"}
    shared = {  # what a checkpoint has in common with the training that goes on from it
        "settings": settings.model_dump(exclude=free),
        "deepspeed": config,
        "seed": seed,
        "world": ranks.world,
        "examples": [[example.weight, example.tokens] for example in examples],
    }
    identity = digest(shared)
    resumed_at = resume(checkpoints, identity, engine, ranks)
    originals.hand_over(engine, resumed=resumed_at > 0)
    if carried and not resumed_at:
        moments.hand_over(engine, module, carried, ranks)
    steps = _Steps(engine, examples, batches, settings, ranks)
    saved = time.monotonic()
    for step in range(resumed_at + 1, len(batches) + 1):
        due = time.monotonic() - saved >= settings.checkpoint_minutes * 60
        record, stopping, due = steps.take(step, stop(), due)
        if ranks.first:
            log(record)
        if stopping or (due and step < len(batches)):
            save(checkpoints, step, identity, engine, ranks)
            saved = time.monotonic()
        if stopping:
            raise Interrupted(f"asked to stop after step {step} of {len(batches)}")
    weights = originals.export(engine)
    kept = None if carried is None else moments.gather(engine, module, ranks)
    engine.destroy()
    return TrainResult(weights, resumed_at, kept)


def _check(module: nn.Module, examples: Sequence[Trainable]) -> None:
    if not examples:
        raise InputError("there are no examples to train on")
    for index, example in enumerate(examples):
        if example.weight < 1:
            raise InputError(f"training example {index} has no tokens to learn")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError("nothing of the model is to be trained")


@dataclass
class _Steps:
    """Takes optimiser steps; the same collectives in the same order on every rank."""

    engine: Any
    examples: Sequence[Trainable]
    batches: list[NDArray[np.int64]]
    settings: Training
    ranks: Ranks

    def take(self, step: int, stop: bool, due: bool) -> tuple[StepRecord, bool, bool]:
        """One optimiser step; also whether any rank wants to stop, and rank 0 to save."""
        started = time.perf_counter()
        # Sequences of like length are computed together: less padding, and ranks wait less.
        given = [self.examples[row] for row in self.batches[step - 1]]
        given.sort(key=lambda example: example.tokens)
        count, tokens = sum(e.weight for e in given), sum(e.tokens for e in given)
        lr = learning_rate(step, len(self.batches), self.settings)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        names, sums = self._accumulate(given, count)
        report = torch.cat([sums, sums.new_tensor([stop, due and self.ranks.first])])
        torch.distributed.all_reduce(report)
        loss, *parts, stopping, saving = report.tolist()
        if not (math.isfinite(loss) or self.engine.fp16_enabled()):
            raise self._diverged(step, f"the loss is {loss}")
        skipped = self._update(step)
        norm = float(self.engine.get_global_grad_norm())
        if not (math.isfinite(norm) or skipped):
            raise self._diverged(step, f"the gradient norm is {norm}")
        means = {name: part / count for name, part in zip(names, parts, strict=True)}
        steps, seconds = len(self.batches), time.perf_counter() - started
        record = StepRecord(
            step, steps, loss / count, means, lr, norm, count, tokens, seconds, skipped
        )
        return record, stopping > 0, saving > 0

    def _accumulate(self, examples: list[Trainable], count: int) -> tuple[list[str], Tensor]:
        """Gradients of the step's loss; the names and sums of its parts on this rank.

        DeepSpeed divides gradients by the number of ranks and of micro-steps; multiplied by
        both and divided by the step's loss tokens they are those of the one mean.
        """
        world, sums, parts = self.ranks.world, [], {}
        pieces = self.engine.gradient_accumulation_steps() * world
        shares = np.array_split(np.array(examples, object), pieces)  # even where not full
        for at in range(0, pieces, world):
            most = max(sum(one.weight for one in share) for share in shares[at : at + world])
            mine = list(shares[at + self.ranks.rank]) or [self.examples[0].empty()]
            batch = move(type(mine[0]).batch(mine, most), self.ranks.device)
            total, parts = self.engine(batch)
            self.engine.backward(total * (pieces / count))
            if at + world < pieces:
                self.engine.step()  # counts the micro-step; `_update` takes the last one
            sums.append(torch.stack([total.detach(), *parts.values()]).double())
        return list(parts), torch.stack(sums).sum(0)

    def _update(self, step: int) -> bool:
        """Let the optimiser step; whether float16's loss scaler skipped it."""
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed raises no narrower one
            if "loss scale" not in str(error):
                raise
            raise self._diverged(step, str(error)) from error
        skipped = not self.engine.was_step_applied()
        if skipped and not self.engine.fp16_enabled():
            raise self._diverged(step, "the gradients are not finite")
        return skipped

    def _diverged(self, step: int, why: str) -> TrainingDiverged:
        rows = ", ".join(str(row) for row in self.batches[step - 1])
        return TrainingDiverged(f"step {step} of {len(self.batches)} (examples {rows}): {why}")
