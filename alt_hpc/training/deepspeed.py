"""DeepSpeed's JSON with what the training settings decide filled in, and its engine."""

import logging
from typing import Any

import torch
from torch import nn

from alt_hpc.errors import InputError
from alt_hpc.training.ranks import Ranks
from alt_hpc.training.settings import Training

logger = logging.getLogger(__name__)

_OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("optimizer", "scheduler", "gradient_clipping", "bf16.enabled", "fp16.enabled"),
)


def check(config: dict[str, Any]) -> None:
    """Raise InputError where a DeepSpeed JSON decides what the settings do, or makes no sense."""
    for name in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(config.get(name, {}), dict):
            raise InputError(f"DeepSpeed configuration: '{name}' must be an object")
    stage = config.get("zero_optimization", {}).get("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"DeepSpeed configuration: no ZeRO stage {stage!r}")
    for name in _OURS:
        section, _, key = name.rpartition(".")
        if (config.get(section, {}) if section else config).get(key, "auto") != "auto":
            raise InputError(
                f"DeepSpeed configuration: '{name}' is decided by the training settings;"
                ' leave it out or say "auto"'
            )


def filled(config: dict[str, Any], settings: Training, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed JSON with what `settings` decides filled in (see `check`)."""
    check(config)
    share = settings.global_batch // ranks.world
    micro = min(settings.micro_batch, share)
    dtype = precision(settings, ranks)
    return {
        **{k: v for k, v in config.items() if k not in ("optimizer", "scheduler")},
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": settings.clip,
        "bf16": {**config.get("bf16", {}), "enabled": dtype == "bfloat16"},
        "fp16": {**config.get("fp16", {}), "enabled": dtype == "float16"},
        "zero_optimization": _zero(config.get("zero_optimization", {}), ranks),
        # Offloaded states are stepped by torch's fused AdamW, which needs no compiler; DeepSpeed
        # would insist on its own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _note(ranks: Ranks, line: str) -> None:
    if ranks.first:
        logger.warning(line)


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


def engine(module: nn.Module, settings: Training, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the module, with AdamW over what is trained."""
    import deepspeed

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    first, second = settings.betas
    numbers = settings.model_dump(include={"lr", "eps", "weight_decay"})
    optimizer = torch.optim.AdamW(trained, betas=(first, second), fused=True, **numbers)
    module.train()
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
