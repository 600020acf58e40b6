"""What makes models faster on GPUs; loading calls `quicken`, and nobody else knows.

Transformers normalises in eight operations and turns queries and keys in ten: on a GPU each is a
kernel to launch, and a journey of states to memory and back. In one, and in eight of half the size,
an H100 took steps of a 1.2 B model, without optimiser, a quarter faster (tests/gpu/results.md).
CPUs compute as transformers does, to the bit. The names in modules of transformers are not public:
see `tests/test_private_names.py`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# Architectures known (and tested) to normalise and to turn in this one way.
KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_Turn = Callable[..., tuple[Tensor, Tensor]]


def quicken(kind: type[PreTrainedModel]) -> None:
    """Have models of this class compute with fewer operations wherever their states are on a GPU.

    A model that is still on the CPU may be moved later, as a training's is.
    """
    if kind.config_class is None or kind.config_class.model_type not in KNOWN:
        return
    module: Any = sys.modules[kind.__module__]
    plain = getattr(module, "apply_rotary_pos_emb", None)  # gone: a release that is slower here
    if plain is None or plain.__name__ == "turn":  # done already
        return
    module.apply_rotary_pos_emb = _turning(plain)
    for name, norm in vars(module).items():
        if name.endswith("RMSNorm"):
            norm.forward = _normalising(norm.forward)


def _fast(states: Tensor) -> bool:
    return states.is_cuda


def _normalising(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(norm: Any, hidden_states: Tensor) -> Tensor:
        if not _fast(hidden_states):
            return plain(norm, hidden_states)
        weight: nn.Parameter = norm.weight
        return functional.rms_norm(hidden_states, weight.shape, weight, norm.variance_epsilon)

    return forward


def _turning(plain: _Turn) -> _Turn:
    def turn(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not _fast(q):
            return plain(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)

    return turn


class _Turned(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864): each half of a head's entries turned with the other."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, -sin), None, None  # back by the same angle


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [rows, heads, length, size]; cos, sin [rows, 1, length, size], both halves alike."""
    out = torch.empty_like(states)
    (one, other), (first, second) = states.chunk(2, -1), out.chunk(2, -1)
    cos, sin = cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]
    torch.mul(one, cos, out=first).addcmul_(other, sin, value=-1)
    torch.mul(other, cos, out=second).addcmul_(one, sin)
    return out
