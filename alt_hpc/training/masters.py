"""The weights as they were given, and their way into and out of DeepSpeed's optimiser."""

from typing import Any

import torch
from torch import Tensor, nn

from alt_hpc.errors import TrainingDiverged
from alt_hpc.training.ranks import Ranks


class Originals:
    """The weights of a module before DeepSpeed takes it.

    It makes its float32 masters from the module *after* rounding it to the training's precision:
    without `to_masters` every iteration would begin with weights rounded to bfloat16.
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

    def to_masters(self, engine: Any) -> None:
        """Set the optimiser's masters to the unrounded weights."""
        from deepspeed import utils

        if not (engine.bfloat16_enabled() or engine.fp16_enabled()):
            return
        for parameter in _trained(engine):
            value = self.trained[id(parameter)].to(self.ranks.device, torch.float32)
            if not hasattr(parameter, "ds_id"):
                utils.safe_set_full_fp32_param(parameter, value)
                continue
            # ZeRO-3 pads what the ranks do not divide: `safe_set_full_fp32_param` forgets that.
            size = utils.safe_get_local_fp32_param(parameter).numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.world))
            start = size * self.ranks.rank
            utils.safe_set_local_fp32_param(parameter, padded[start : start + size])

    def forget_trained(self) -> None:
        """Free what only `to_masters` needed."""
        trained = {name for key in self.trained for name in self.names[key]}
        self.state = {n: (t[:0] if n in trained else t) for n, t in self.state.items()}
        self.trained = {}

    def export(self, engine: Any) -> dict[str, Tensor] | None:
        """The whole state dict on rank 0, gathered parameter by parameter; None elsewhere."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = dict(self.state)
        for parameter in _trained(engine):
            full = safe_get_full_fp32_param(parameter)  # collective
            if self.ranks.first:
                value = full.detach().to("cpu", torch.float32, copy=True)
                weights.update(dict.fromkeys(self.names[id(parameter)], value))
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingDiverged(f"the trained weight {name} is not finite")
        return weights if self.ranks.first else None


def _trained(engine: Any) -> list[nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
