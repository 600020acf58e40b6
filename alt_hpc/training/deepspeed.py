"""DeepSpeed's engine: its JSON filled in, and the weights' way into its optimiser and out."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from alt_hpc.errors import InputError, TrainingDiverged
from alt_hpc.training.ranks import Ranks
from alt_hpc.training.settings import Training

logger = logging.getLogger(__name__)


def check(config: dict[str, Any]) -> None:
    """Raise InputError where a DeepSpeed JSON decides what the settings do, or makes no sense."""
    for name in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(config.get(name, {}), dict):
            raise InputError(f"DeepSpeed configuration: '{name}' must be an object")
    stage = config.get("zero_optimization", {}).get("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"DeepSpeed configuration: no ZeRO stage {stage!r}")
    for name in (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("optimizer", "scheduler", "gradient_clipping", "bf16.enabled", "fp16.enabled"),
    ):
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
    zero = {"stage": 1, **config.get("zero_optimization", {})}
    if zero["stage"] == 0:
        _note(ranks, "ZeRO stage 0 is run as stage 1: the same numbers in less memory")
        zero["stage"] = 1
    offloads = [key for key in zero if key.startswith("offload_")]
    if offloads and ranks.device.type == "cpu":
        _note(ranks, f"{' and '.join(offloads)}: nothing to offload on a CPU")
        zero = {key: value for key, value in zero.items() if key not in offloads}
    return {
        **{k: v for k, v in config.items() if k not in ("optimizer", "scheduler")},
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": settings.clip,
        "bf16": {**config.get("bf16", {}), "enabled": dtype == "bfloat16"},
        "fp16": {**config.get("fp16", {}), "enabled": dtype == "float16"},
        "zero_optimization": zero,
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


def engine(module: nn.Module, settings: Training, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the module, with AdamW over what is trained."""
    import deepspeed

    first, second = settings.betas
    numbers = settings.model_dump(include={"lr", "eps", "weight_decay"})
    optimizer = torch.optim.AdamW(_trained(module), betas=(first, second), fused=True, **numbers)
    module.train()
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class Originals:
    """The weights of a module before DeepSpeed takes it.

    It makes its float32 masters from the module *after* rounding it to the training's precision:
    without `hand_over` every iteration would begin with weights rounded to bfloat16.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks, state = ranks, module.state_dict(keep_vars=True)
        self.names: dict[int, list[str]] = {}  # id of a parameter -> its names (tied: several)
        for name, tensor in state.items():
            self.names.setdefault(id(tensor), []).append(name)
        # Only references: DeepSpeed gives parameters other data and leaves these tensors alone
        # (but for untrained ones in float32 on a CPU, which it shares and does not change).
        self.trained = {id(t): t.detach() for t in state.values() if t.requires_grad}
        self.state = {n: t.detach() for n, t in state.items()} if ranks.first else {}

    def hand_over(self, engine: Any, resumed: bool) -> None:
        """Set the optimiser's masters (resumed, it has them) and free what only this needs."""
        from deepspeed import utils

        rounded = engine.bfloat16_enabled() or engine.fp16_enabled()
        for parameter in _trained(engine.module) if rounded and not resumed else ():
            value = self.trained[id(parameter)].to(self.ranks.device, torch.float32)
            if not hasattr(parameter, "ds_id"):
                utils.safe_set_full_fp32_param(parameter, value)
                continue
            # ZeRO-3 pads what the ranks do not divide: `safe_set_full_fp32_param` forgets that.
            size = utils.safe_get_local_fp32_param(parameter).numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.world))
            utils.safe_set_local_fp32_param(parameter, padded.split(size)[self.ranks.rank])
        trained = {name for key in self.trained for name in self.names[key]}
        self.state = {n: (t[:0] if n in trained else t) for n, t in self.state.items()}
        self.trained = {}

    def export(self, engine: Any) -> dict[str, Tensor] | None:
        """The whole state dict on rank 0, gathered parameter by parameter; None elsewhere."""
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in _trained(engine.module):
            full = safe_get_full_fp32_param(parameter)  # collective
            if self.ranks.first:
                value = full.detach().to("cpu", torch.float32, copy=True)
                self.state.update(dict.fromkeys(self.names[id(parameter)], value))
        for name, tensor in self.state.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingDiverged(f"the trained weight {name} is not finite")
        return self.state if self.ranks.first else None
