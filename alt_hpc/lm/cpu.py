"""What makes models faster on CPUs; loading calls `quicken`, and nobody else knows."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_Mask = Tensor | None
_Output = tuple[Tensor, None]
_SPECIAL = {"is_causal", "softcap", "position_bias", "s_aux", "output_attentions"}
_sdpa = AttentionInterface()["sdpa"]


@functools.cache
def quicken() -> None:
    """Have torch keep the memory that it frees, and attend by matrix products."""
    # glibc gives large blocks back to the system at once, and each operation's result then faults
    # its pages in anew (see tests/benchmarks/results.md). Other C libraries are left as they are.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    AttentionInterface.register("sdpa", _attend)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: _Mask, **how: Any
) -> _Output:
    """Attention without gradients as plain products; all else is left to torch's fused kernel.

    That runs far below the speed of its own bfloat16 products on CPUs. The queries of all heads
    that share keys are one product. Queries are [rows, heads, length, size], keys and values
    [rows, key heads, slots, size]; the mask, of scores to add or of what is seen, is
    [rows, 1, length, slots]. Returns [rows, length, heads, size].
    """
    scaling, plainly = how.pop("scaling", None), module.is_causal and query.device.type == "cpu"
    special = torch.is_grad_enabled() or how.get("dropout") or how.keys() & _SPECIAL
    rows, heads, length, size = query.shape
    if special or not plainly:
        fused: _Output = _sdpa(module, query, key, value, attention_mask, scaling=scaling, **how)
        return fused
    apart = query.unflatten(1, (key.shape[1], -1))  # [rows, key heads, heads of one, length, size]
    folded = torch.empty(apart.shape, dtype=query.dtype)
    torch.mul(apart, size**-0.5 if scaling is None else scaling, out=folded)  # and contiguous
    flat = folded.flatten(2, 3) @ key.transpose(-1, -2)
    scores = flat.view(*folded.shape[:-1], -1)
    if attention_mask is None and length > 1:
        later = torch.ones(length, length, dtype=torch.bool).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        scores.masked_fill_(~attention_mask[:, :, None], torch.finfo(query.dtype).min)
    elif attention_mask is not None:
        scores.add_(attention_mask[:, :, None])
    out = (flat.softmax(-1) @ value).view(folded.shape)
    return out.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, size), None
