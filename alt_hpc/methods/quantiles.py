"""The paper's core, pure: rank generations, cut them into quantiles, keep some of each.

Source: arXiv 2407.16970, section 3, and its model card. Quantile 0 is the best everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def ranks(rewards: Sequence[float]) -> list[int | None]:
    """Rank of each reward, 0 the highest; ties by position; None where it is not finite."""
    finite = [i for i, reward in enumerate(rewards) if math.isfinite(reward)]
    order = sorted(finite, key=lambda i: -rewards[i])  # sorted is stable: ties by index
    result: list[int | None] = [None] * len(rewards)
    for rank, i in enumerate(order):
        result[i] = rank
    return result


def quantiles(rewards: Sequence[float], q: int, remainder: str = "spread") -> list[int | None]:
    """Quantile of each of n generations of one prompt.

    With rank r among n finite rewards it is floor(r q / n); with `remainder="last"` (the authors'
    code) every quantile gets floor(n / q) and the last one the rest. Fewer finite rewards than
    quantiles: all None, the prompt is set aside.
    """
    by_rank = ranks(rewards)
    n = sum(rank is not None for rank in by_rank)
    if n < q:
        return [None] * len(rewards)
    if remainder == "last":
        return [None if r is None else min(r // (n // q), q - 1) for r in by_rank]
    return [None if r is None else r * q // n for r in by_rank]


def select(
    cut: Sequence[int | None], finished: Sequence[bool], keep: int, rng: np.random.Generator
) -> list[int]:
    """Indices of the generations kept for training, quantile by quantile.

    Of each quantile `keep` are drawn uniformly without replacement among those that ended by EOS
    (`finished`), then among the rest; a smaller quantile gives all it has.
    """
    chosen: list[int] = []
    for quantile in sorted({c for c in cut if c is not None}):
        members = [i for i, c in enumerate(cut) if c == quantile]
        first = [i for i in members if finished[i]]
        rest = [i for i in members if not finished[i]]
        drawn = [first[j] for j in rng.permutation(len(first))]
        drawn += [rest[j] for j in rng.permutation(len(rest))]
        chosen += drawn[:keep]
    return chosen
