"""Linear layers on CPUs with their weights laid out once, as oneDNN multiplies them.

`torch.nn.functional.linear` lays out bfloat16 weights anew at each call, and a SwiGLU in bfloat16
reads and writes the widest activations three times more than its products do. The operators here
are those that torch.compile would put in (torch/_inductor/fx_passes/mkldnn_fusion.py, torch 2.15);
calling them takes no compiler and no time. What they gain is in tests/benchmarks/results.md.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MKLDNN: Any = torch.ops.mkldnn


def pack(model: PreTrainedModel) -> PreTrainedModel:
    """The model with other linear layers and SwiGLUs, fit only to infer; it is changed in place.

    Only a bfloat16 model on a CPU is changed, and only where torch and the CPU have the operators
    (else the log says so). Layers of other classes, as GPT-2's, stay as they are.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return model
    if not _can():
        logger.warning("no packed bfloat16 products with this torch on this CPU: layers stay plain")
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, _Linear(child))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _is_swiglu(child):
                setattr(module, name, _SwiGLU(child))
    return model


def _can() -> bool:
    known = hasattr(_MKLDNN, "_reorder_linear_weight") and hasattr(_MKLDNN, "_linear_pointwise")
    return known and bool(_MKLDNN._is_mkldnn_bf16_supported())


class _Linear(nn.Module):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.packed = _MKLDNN._reorder_linear_weight(plain.weight.detach())
        self.bias = plain.bias

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        out: Tensor = _MKLDNN._linear_pointwise(x, self.packed, self.bias, activation, [], "")
        return out

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The layer's output times another tensor."""
        out: Tensor = _MKLDNN._linear_pointwise.binary(x, other, self.packed, self.bias, "mul")
        return out


def _is_swiglu(module: nn.Module) -> bool:
    parts = dict(module.named_children())
    if set(parts) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    silu = type(parts.pop("act_fn")).__name__ in ("SiLU", "SiLUActivation")
    return silu and all(isinstance(part, _Linear) for part in parts.values())


class _SwiGLU(nn.Module):
    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = plain.gate_proj, plain.up_proj, plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up.times(x, self.gate(x, "swish")))
        return out
