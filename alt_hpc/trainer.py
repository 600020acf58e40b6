"""The training loop over DeepSpeed: the same steps on any number of ranks, and resumable.

It knows no cluster and no run folder. A caller starts one process per device, then

    ranks = from_environment()
    connect(meeting, ranks)                     # a path fresh for every attempt
    prepare(model, settings)
    loss = functools.partial(alt_loss, entropy=settings.entropy)
    result = train(model, examples, loss, settings, deepspeed_config=..., seed=..., ranks=ranks,
                   checkpoints=store, log=write_curve, stop=flag.is_set)
    disconnect()
    if ranks.first:                             # elsewhere result.weights is None
        model.load_state_dict(result.weights)   # a model made anew: the trained one is used up
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alt_hpc.errors import Final, InputError
from alt_hpc.interrupt import Interrupted
from alt_hpc.losses import ForLoss, Loss, Trainable, move
from alt_hpc.ranks import Ranks
from alt_hpc.settings import digest
from alt_hpc.training.settings import Training

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]


class TrainingDiverged(Final):
    """A loss, gradient norm or weight is not finite; nothing was exported."""


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


@dataclass(frozen=True)
class TrainResult:
    """`weights` is the whole state dict on the CPU on rank 0, None elsewhere.

    What was trained is there in float32, as the optimiser held it; all else as it was given.
    """

    weights: dict[str, Tensor] | None
    steps: int
    resumed_at: int = 0  # the step after which this attempt took over; 0: it began


class Store(Protocol):
    """Where a training's checkpoints are kept, a folder each, and which of them are whole.

    The first rank alone calls `make`, `whole`, `begin` and `commit`.
    """

    folder: Path

    def make(self) -> None:
        """Make the folder, mode 0700: it holds pickles."""
        ...

    def check(self) -> None:
        """Raise InputError where the folder is not ours alone."""
        ...

    def tag(self, step: int) -> str:
        """The name of the checkpoint after a step, a folder in `folder`."""
        ...

    def random_state(self, step: int, rank: int) -> Path:
        """A file of that checkpoint for a rank's random generators."""
        ...

    def whole(self, identity: str) -> list[int]:
        """Steps of the whole checkpoints that were committed with this identity."""
        ...

    def begin(self, step: int) -> None:
        """An empty folder for a checkpoint."""
        ...

    def commit(self, step: int, identity: str) -> None:
        """All ranks have written: the checkpoint is whole."""
        ...


def order(n: int, epochs: int, seed: int) -> list[Rows]:
    """Which examples each epoch visits, in turn: a function of its arguments alone."""
    return [np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(epochs)]


def global_batches(n: int, settings: Training, seed: int) -> list[Rows]:
    """The examples of every optimiser step.

    An epoch whose examples do not fill its last global batch ends with a smaller step; none is
    lost and none of the next epoch is taken forward.
    """
    size = settings.global_batch
    epochs = order(n, settings.epochs, seed)
    return [epoch[at : at + size] for epoch in epochs for at in range(0, n, size)]


def learning_rate(step: int, steps: int, settings: Training) -> float:
    """Linear warm-up over W = max(1, ceil(warmup * steps)) steps, then linear decay to 0.

    With s from 1: lr * s / W up to W, then lr * (steps - s + 1) / (steps - W + 1). The first
    step is above 0, step W has the full rate, and 0 would be reached one step after the last.
    """
    warm = max(1, math.ceil(settings.warmup * steps))
    if step <= warm:
        return settings.lr * step / warm
    return settings.lr * (steps - step + 1) / (steps - warm + 1)


def prepare(model: nn.Module, settings: Training) -> None:
    """Freeze what `settings` does not train; have activations recomputed if it says so."""
    freeze(model, settings.trained_blocks, settings.trains_embeddings)
    if settings.checkpoint_activations:
        enable: Any = model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def freeze(model: nn.Module, trained_blocks: float, train_embeddings: bool) -> None:
    """Train only the top share of a transformer's blocks.

    The lowest L - max(1, floor(share * L)) of L blocks are frozen; the final norm and an untied
    head are trained. The input embeddings (with what is tied to them: the head) are trained
    only with `train_embeddings`.

    Raises
    ------
    InputError
        The model has no list of `num_hidden_layers` blocks.
    """
    trunk, layers = blocks(model)
    trained = max(1, math.floor(trained_blocks * len(layers) + 1e-9))  # 0.29 * 100 is 28.999...
    model.requires_grad_(True)
    for block in list(layers)[: len(layers) - trained]:
        block.requires_grad_(False)
    if train_embeddings:
        return
    for name, child in trunk.named_children():
        # By name too: BLOOM has a norm, OPT projections that belong to the embeddings.
        if isinstance(child, nn.Embedding) or "embed" in name:
            child.requires_grad_(False)


def blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds a model's transformer blocks (and its embeddings), and those blocks.

    Raises
    ------
    InputError
        There is no list of `num_hidden_layers` blocks.
    """
    base: Any = model.base_model
    count = getattr(model.config, "num_hidden_layers", None)
    for module in base.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise InputError(f"{type(model).__name__}: cannot find its {count} transformer blocks")


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
) -> TrainResult:
    """Minimise `loss` over `examples`, resuming from the newest whole checkpoint.

    An optimiser step's loss is the sum over its loss tokens divided by their number, over all
    ranks and micro-batches: the number of ranks changes nothing but rounding.

    Parameters
    ----------
    module
        On the CPU, in float32 so that nothing is rounded away at the start; what does not
        require grad is left alone. It is used up: afterwards it holds pieces of the model.
    examples
        All of them, the same on every rank.
    loss
        Takes (module, batch); see `losses`.
    settings
        Optimiser, batch sizes, epochs, precision, minutes between checkpoints.
    deepspeed_config
        A DeepSpeed JSON. Batch sizes, optimiser, schedule, clipping and precision are filled in
        from `settings`: it may leave them out or say "auto". Stage 0 is run as stage 1.
    seed
        Decides data order and dropout.
    checkpoints
        This training's own, on the shared file system. The caller removes them once the result
        is safe.
    log
        Called on rank 0 after every optimiser step.
    stop
        Asked on every rank at every step; one rank's True stops all.

    Raises
    ------
    InputError
        Settings, examples or the JSON cannot be used.
    Interrupted
        `stop` said so on some rank; all have saved, and the next call goes on from there.
    TrainingDiverged
        A loss, gradient norm or weight is not finite.
    """
    _check(module, examples, settings, ranks)
    batches = global_batches(len(examples), settings, seed)
    config = fill_deepspeed_config(deepspeed_config, settings, ranks)
    originals = _Originals(module, ranks)
    _seed(seed, ranks)
    engine = _engine(ForLoss(module, loss), settings, config)
    identity = _identity(examples, settings, config, seed, ranks)
    store = _Checkpoints(checkpoints, identity, engine, ranks)
    resumed_at = store.resume()
    if not resumed_at:
        originals.to_masters(engine)
    originals.forget_trained()
    loop = _Loop(engine, examples, batches, settings, ranks)
    saved = time.monotonic()
    for step in range(resumed_at + 1, len(batches) + 1):
        due = time.monotonic() - saved >= settings.checkpoint_minutes * 60
        record, stopping, due = loop.step(step, stop(), due)
        if ranks.first:
            log(record)
        if stopping or (due and step < len(batches)):
            store.save(step)
            saved = time.monotonic()
        if stopping:
            raise Interrupted(f"asked to stop after step {step} of {len(batches)}")
    weights = originals.export(engine)
    engine.destroy()
    return TrainResult(weights, len(batches), resumed_at)


def _check(
    module: nn.Module, examples: Sequence[Trainable], settings: Training, ranks: Ranks
) -> None:
    if not examples:
        raise InputError("there are no examples to train on")
    for index, example in enumerate(examples):
        if example.weight < 1:
            raise InputError(f"training example {index} has no tokens to learn")
    if settings.global_batch % ranks.world:
        raise InputError(
            f"global_batch: {settings.global_batch} sequences cannot be divided among"
            f" {ranks.world} processes"
        )
    share = settings.global_batch // ranks.world
    if share % min(settings.micro_batch, share):
        raise InputError(
            f"micro_batch: {share} sequences of a process cannot be divided into"
            f" micro-batches of {settings.micro_batch}"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError("nothing of the model is to be trained: all its parameters are frozen")


# --- DeepSpeed's configuration and engine ---------------------------------------------------------

_OURS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
]


def fill_deepspeed_config(
    config: dict[str, Any], settings: Training, ranks: Ranks
) -> dict[str, Any]:
    """The DeepSpeed JSON with what `settings` decides filled in (see `check_deepspeed_config`)."""
    check_deepspeed_config(config)
    share = settings.global_batch // ranks.world
    micro = min(settings.micro_batch, share)
    dtype = precision(settings, ranks)
    filled = {k: v for k, v in config.items() if k not in ("optimizer", "scheduler")}
    return {
        **filled,
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": settings.clip,
        "bf16": {**_section(config, "bf16"), "enabled": dtype == "bfloat16"},
        "fp16": {**_section(config, "fp16"), "enabled": dtype == "float16"},
        "zero_optimization": _zero(_section(config, "zero_optimization"), ranks),
        # Offloaded states are stepped by torch's fused AdamW, which needs no compiler; DeepSpeed
        # would insist on its own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Raise InputError where a DeepSpeed JSON cannot be meant.

    It sets what the training settings decide, to something else than "auto", or a section of it
    is no object, or no such ZeRO stage.
    """
    for name in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(config.get(name, {}), dict):
            raise InputError(f"DeepSpeed configuration: '{name}' must be an object")
    stage = _section(config, "zero_optimization").get("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"DeepSpeed configuration: no ZeRO stage {stage!r}")
    for name in _OURS:
        section, _, key = name.partition(".")
        value = config.get(section, "auto")
        if key and isinstance(value, dict):
            value = value.get(key, "auto")
        if value != "auto":
            raise InputError(
                f"DeepSpeed configuration: '{name}' is decided by the training settings;"
                ' leave it out or say "auto"'
            )


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def precision(settings: Training, ranks: Ranks) -> str:
    """The dtype that is computed in on these ranks' devices."""
    if settings.precision == "float16" and ranks.device.type == "cpu":
        _note(ranks, "float16 is trained in float32 on a CPU")
        return "float32"
    return settings.precision


def _zero(zero: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    zero = {"stage": 1, **zero}
    if zero["stage"] == 0:
        _note(ranks, "ZeRO stage 0 is run as stage 1: the same numbers in less memory")
        zero["stage"] = 1
    offloads = [key for key in zero if key.startswith("offload_")]
    if offloads and ranks.device.type == "cpu":
        _note(ranks, f"{' and '.join(offloads)}: nothing to offload on a CPU")
        zero = {key: value for key, value in zero.items() if key not in offloads}
    return zero


def _note(ranks: Ranks, line: str) -> None:
    if ranks.first:
        logger.warning(line)


def _engine(module: ForLoss, settings: Training, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the module, with AdamW over what is trained."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    module.train()
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def _seed(seed: int, ranks: Ranks) -> None:
    """Dropout differs between ranks, and is the same whenever this is run again."""
    own = int(np.random.SeedSequence([seed, ranks.rank]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


# --- Steps ----------------------------------------------------------------------------------------


@dataclass
class _Loop:
    """Computes optimiser steps; the same collectives in the same order on every rank."""

    engine: Any
    examples: Sequence[Trainable]
    batches: list[Rows]
    settings: Training
    ranks: Ranks

    def step(self, step: int, stop: bool, due: bool) -> tuple[StepRecord, bool, bool]:
        """One optimiser step; also whether any rank wants to stop, and rank 0 to save."""
        started = time.perf_counter()
        # Sequences of like length are computed together: less padding, and ranks wait less.
        rows = sorted(self.batches[step - 1], key=lambda row: self.examples[row].tokens)
        count = sum(self.examples[row].weight for row in rows)
        lr = learning_rate(step, len(self.batches), self.settings)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        names, sums = self._accumulate(rows, count)
        flags = sums.new_tensor([float(stop), float(due and self.ranks.first)])
        report = torch.cat([sums, flags])
        torch.distributed.all_reduce(report)
        loss, *parts, stopping, saving = report.tolist()
        self._check_finite(loss, "loss", step)
        skipped = self._update(step)
        norm = float(self.engine.get_global_grad_norm())
        if not skipped:
            self._check_finite(norm, "gradient norm", step)
        record = StepRecord(
            step=step,
            steps=len(self.batches),
            loss=loss / count,
            parts={name: part / count for name, part in zip(names, parts, strict=True)},
            lr=lr,
            grad_norm=norm,
            loss_tokens=count,
            tokens=sum(self.examples[row].tokens for row in rows),
            seconds=time.perf_counter() - started,
            skipped=skipped,
        )
        return record, stopping > 0, saving > 0

    def _accumulate(self, rows: list[int], count: int) -> tuple[list[str], Tensor]:
        """Gradients of the step's loss; the names and sums of its parts on this rank.

        DeepSpeed divides gradients by the number of ranks and of micro-steps; multiplied by
        both and divided by the step's loss tokens they are those of the one mean.
        """
        micro_steps, world = self.engine.gradient_accumulation_steps(), self.ranks.world
        shares = np.array_split(rows, micro_steps * world)  # even where the batch is not full
        sums: Tensor | None = None
        for at in range(micro_steps):
            total, parts = self.engine(self._micro_batch(shares[at * world : (at + 1) * world]))
            self.engine.backward(total * (micro_steps * world / count))
            if at + 1 < micro_steps:
                self.engine.step()  # counts the micro-step; `_update` takes the last one
            sum_ = torch.stack([total.detach(), *parts.values()]).double()
            sums = sum_ if sums is None else sums + sum_
        assert sums is not None
        return list(parts), sums

    def _micro_batch(self, shares: list[Rows]) -> Any:
        """This rank's share of a micro-step, or an empty example where it has none."""
        most = max(sum(self.examples[row].weight for row in share) for share in shares)
        mine = [self.examples[row] for row in shares[self.ranks.rank]]
        mine = mine or [self.examples[0].empty()]
        return move(type(mine[0]).batch(mine, most), self.ranks.device)

    def _update(self, step: int) -> bool:
        """Let the optimiser step; whether float16's loss scaler skipped it."""
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed raises no narrower one
            if "loss scale" not in str(error):
                raise
            raise TrainingDiverged(f"{self._where(step)}: {error}") from error
        skipped = not self.engine.was_step_applied()
        if skipped and not self.engine.fp16_enabled():
            raise TrainingDiverged(f"{self._where(step)}: the gradients are not finite")
        return skipped

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value) and not (what == "loss" and self.engine.fp16_enabled()):
            raise TrainingDiverged(f"{self._where(step)}: the {what} is {value}")

    def _where(self, step: int) -> str:
        rows = ", ".join(str(row) for row in self.batches[step - 1])
        return f"step {step} of {len(self.batches)} (examples {rows})"


# --- Checkpoints ----------------------------------------------------------------------------------


def _identity(
    examples: Sequence[Trainable],
    settings: Training,
    config: dict[str, Any],
    seed: int,
    ranks: Ranks,
) -> str:
    """What a checkpoint must have in common with the training that goes on from it."""
    free = {"checkpoint_minutes", "export_dtype", "deepspeed"}
    return digest(
        {
            "settings": settings.model_dump(exclude=free),
            "deepspeed": config,
            "seed": seed,
            "world": ranks.world,
            "examples": [[example.weight, example.tokens] for example in examples],
        }
    )


@dataclass
class _Checkpoints:
    """Saves and loads what a `Store` keeps; the same collectives in the same order everywhere."""

    store: Store
    identity: str
    engine: Any
    ranks: Ranks

    def resume(self) -> int:
        """Load the newest whole checkpoint, if any; the step after which it was saved, or 0."""
        store = self.store
        if self.ranks.first:
            store.make()
        torch.distributed.barrier()
        store.check()
        newest = max(store.whole(self.identity), default=0) if self.ranks.first else 0
        step = self._agree(newest)
        if not step:
            return 0
        _note(self.ranks, f"resuming after step {step} from {store.folder}")
        path, _ = self.engine.load_checkpoint(
            str(store.folder),
            tag=store.tag(step),
            load_module_strict=False,  # frozen parameters are not saved: they are as given
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise RuntimeError(f"{store.folder / store.tag(step)}: DeepSpeed cannot load it")
        text = store.random_state(step, self.ranks.rank).read_text(encoding="ascii")
        _set_random_state(json.loads(text))
        return step

    def save(self, step: int) -> None:
        """Save collectively; the first rank then says that it is whole."""
        store = self.store
        if self.ranks.first:
            store.begin(step)
        self.engine.save_checkpoint(  # begins and ends with a barrier
            str(store.folder),
            tag=store.tag(step),
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        mine = store.random_state(step, self.ranks.rank)
        mine.write_text(json.dumps(_random_state()), encoding="ascii")
        torch.distributed.barrier()
        if self.ranks.first:
            store.commit(step, self.identity)

    def _agree(self, step: int) -> int:
        value = torch.tensor(step, device=self.ranks.device)
        torch.distributed.broadcast(value, src=0)
        return int(value)


def _random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as JSON values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])


# --- Weights in and out ---------------------------------------------------------------------------


class _Originals:
    """The weights as they were given, and their way into and out of the optimiser.

    DeepSpeed makes its float32 masters from the module *after* rounding it to the training's
    precision. Without `to_masters` every iteration would begin with weights rounded to bfloat16.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        state = module.state_dict(keep_vars=True)
        self.names: dict[int, list[str]] = {}  # id of a parameter -> its names (tied: several)
        for name, tensor in state.items():
            self.names.setdefault(id(tensor), []).append(name)
        # Only references: DeepSpeed gives parameters other data and leaves these tensors alone
        # (but for frozen ones in float32 on a CPU, which it shares and does not change).
        self.trained = {id(t): t.detach() for t in state.values() if t.requires_grad}
        self.state = {n: t.detach() for n, t in state.items()} if ranks.first else {}

    def to_masters(self, engine: Any) -> None:
        """Set the optimiser's masters to the unrounded weights."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_local_fp32_param,
        )

        if not (engine.bfloat16_enabled() or engine.fp16_enabled()):
            return
        for parameter in engine.module.parameters():
            if not parameter.requires_grad:
                continue
            value = self.trained[id(parameter)].to(self.ranks.device, torch.float32)
            if not hasattr(parameter, "ds_id"):
                safe_set_full_fp32_param(parameter, value)
                continue
            # ZeRO-3 cuts parameters that the ranks do not divide with padding, which
            # `safe_set_full_fp32_param` forgets.
            size = safe_get_local_fp32_param(parameter).numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.world))
            start = size * self.ranks.rank
            safe_set_local_fp32_param(parameter, padded[start : start + size])

    def forget_trained(self) -> None:
        """Free what only `to_masters` needed."""
        trained = {name for key in self.trained for name in self.names[key]}
        self.state = {n: (t[:0] if n in trained else t) for n, t in self.state.items()}
        self.trained = {}

    def export(self, engine: Any) -> dict[str, Tensor] | None:
        """The whole state dict on rank 0, gathered parameter by parameter; None elsewhere."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = dict(self.state)
        for parameter in engine.module.parameters():
            if not parameter.requires_grad:
                continue
            full = safe_get_full_fp32_param(parameter)  # collective
            if not self.ranks.first:
                continue
            value = full.detach().to("cpu", torch.float32, copy=True)
            weights.update(dict.fromkeys(self.names[id(parameter)], value))
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingDiverged(f"the trained weight {name} is not finite")
        return weights if self.ranks.first else None
