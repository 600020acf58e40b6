"""Attention on CPUs as plain matrix products, over keys that many rows share without a copy.

torch's fused kernel for CPUs runs far below the speed of its bfloat16 matrix products, and
needs a prompt's keys once per row. Here the queries of all rows, and of all heads that share keys
(GQA), are one product with the prefix's keys. Measured on 2 cores, 1,280 queries over 400 keys, 9
heads on 3: 6.4 ms against 14.2 ms (fused, folded the same way) and 24.6 ms (fused, row by row).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME = "alt_hpc"


@dataclass(frozen=True)
class Forked:
    """Keys (or values) of rows that go on from one prefix, as a cache layer hands them out.

    Attributes
    ----------
    prefix
        [1, key heads, prefix, size].
    own
        [rows, key heads, length, size]; a row's token sees those of its row up to itself.
    """

    prefix: Tensor
    own: Tensor


@contextmanager
def products(model: PreTrainedModel, plain: bool) -> Iterator[bool]:
    """Let the model attend this way inside the block; False where it cannot, and nothing changes.

    It can on a CPU, if its architecture is plain (asks nothing of attention but causality or the
    mask it is given, see `generate.side_by_side`) and takes attention functions of others.
    """
    before = model.config._attn_implementation
    able = plain and model.device.type == "cpu" and bool(model._supports_attention_backend)
    if able:
        model.config._attn_implementation = NAME
    try:
        yield able
    finally:
        model.config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor | Forked,
    value: Tensor | Forked,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it.

    Parameters
    ----------
    query
        [rows, heads, length, size].
    key, value
        Forked, or [rows, key heads, slots, size].
    attention_mask
        Scores to add [rows, 1, length, slots]; without it a token sees those of its row up to
        itself.

    Returns
    -------
    [rows, length, heads, size], and no weights.
    """
    rows, heads, length, size = query.shape
    shared = (key.own if isinstance(key, Forked) else key).shape[1]
    apart = query.unflatten(1, (shared, -1))
    scale = size**-0.5 if scaling is None else scaling
    if isinstance(key, Forked) and isinstance(value, Forked):
        out = _forked(apart.transpose(0, 1), scale, key, value).transpose(0, 1)
    else:
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        out = _masked(apart, scale, key, value, attention_mask)
    return out.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, size), None


def _masked(query: Tensor, scale: float, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs [rows, key heads, heads of a key head, length, size], as the queries."""
    folded = _scaled(query, scale)
    scores = folded.flatten(2, 3) @ key.transpose(-1, -2)
    if mask is None:
        scores += _later(query).repeat(query.shape[2], 1)
    else:
        scores.view(*folded.shape[:-1], -1).add_(mask[:, :, None])
    return (scores.softmax(-1) @ value).view(folded.shape)


def _forked(query: Tensor, scale: float, key: Forked, value: Forked) -> Tensor:
    """Outputs [key heads, rows, heads of a key head, length, size], as the queries."""
    folded = _scaled(query, scale)
    flat = folded.flatten(1, 3)
    own = folded.flatten(2, 3) @ key.own.transpose(0, 1).transpose(-1, -2)
    own += _later(query).repeat(query.shape[2], 1)
    scores = torch.cat([flat @ key.prefix[0].transpose(-1, -2), own.flatten(1, 2)], -1)
    weights = scores.softmax(-1)
    prefix = key.prefix.shape[2]
    out = weights[..., prefix:].reshape(own.shape) @ value.own.transpose(0, 1)
    out += (weights[..., :prefix] @ value.prefix[0]).view(out.shape)
    return out.view(folded.shape)


def _scaled(query: Tensor, scale: float) -> Tensor:
    """Scaled and made contiguous in one pass; on the CPU, as all here."""
    return torch.mul(query, scale, out=torch.empty(query.shape, dtype=query.dtype))


def _later(query: Tensor) -> Tensor:
    """Minus infinity for each token that comes after another [length, length]."""
    length = query.shape[-2]
    return torch.full((length, length), float("-inf"), dtype=query.dtype).triu_(1)


AttentionInterface.register(NAME, attend)
