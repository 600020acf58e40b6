"""Adam's moments of what is trained, whole and by name: out of one training and into the next.

Only here is known how DeepSpeed's optimisers keep them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alt_hpc.errors import InputError
from alt_hpc.training.ranks import Ranks

KEYS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # as torch.optim.AdamW calls them


def check(module: nn.Module, given: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """InputError where these moments are not those of what is trained, or cannot be carried."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        raise InputError("DeepSpeed configuration: moments kept on NVMe cannot be carried on")
    if not given:
        return
    wanted = {f"{n}.{key}": p.shape for n, p in _trained(module).items() for key in KEYS}
    for name, shape in {STEP: torch.Size(), **wanted}.items():
        if name not in given:
            raise InputError(f"the moments to go on with have no '{name}'")
        if (found := given[name].shape) != shape:
            sizes = f"{list(found)}, not {list(shape)}"
            raise InputError(f"the moments to go on with have a '{name}' of {sizes}")


def hand_over(engine: Any, module: nn.Module, given: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Have the optimiser begin with these moments and count of steps."""
    for state in _states(engine):
        state[STEP].fill_(given[STEP].item())
    for name, parameter in _trained(module).items():
        for key in KEYS:
            value = given[f"{name}.{key}"].to(ranks.device, torch.float32)
            _set(parameter, key, value, ranks)


def gather(engine: Any, module: nn.Module, ranks: Ranks) -> dict[str, Tensor] | None:
    """All moments and the count of steps on rank 0, in float32 on the CPU; None elsewhere."""
    from deepspeed.utils import safe_get_full_optimizer_state

    steps = float(_states(engine)[0][STEP])
    found = {STEP: torch.tensor(steps)}
    for name, parameter in _trained(module).items():
        for key in KEYS:
            full = safe_get_full_optimizer_state(parameter, key)  # collective
            if ranks.first:
                value = full.detach().to("cpu", torch.float32, copy=True)
                found[f"{name}.{key}"] = value
    return found if ranks.first else None


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _set(parameter: nn.Parameter, key: str, value: Tensor, ranks: Ranks) -> None:
    """Set this rank's part of a moment."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # As for the masters: `safe_set_full_optimizer_state` forgets ZeRO-3's padding.
    size = utils.safe_get_local_optimizer_state(parameter, key).numel()
    padded = nn.functional.pad(value.flatten(), (0, size * ranks.world))
    utils.safe_set_local_optimizer_state(parameter, padded.split(size)[ranks.rank], key)


def _states(engine: Any) -> list[dict[str, Any]]:
    """The state of each flat parameter, made as AdamW's first step does, where none was taken."""
    outer = engine.optimizer
    flat = getattr(outer, "fp32_partitioned_groups_flat", None)  # ZeRO-3's groups are empty
    if flat is None:
        flat = [parameter for group in outer.param_groups for parameter in group["params"]]
    states = [outer.optimizer.state[parameter] for parameter in flat]
    for parameter, state in zip(flat, states, strict=True):
        if not state:
            state[STEP] = torch.zeros((), device=parameter.device)
            state.update({key: torch.zeros_like(parameter.detach()) for key in KEYS})
    if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-3 has none
        outer._lazy_init_hp_params_optimizer_state()
    return states
