"""The paper's core, pure: put generations in order, part them in quantiles, keep some of each.

Source: arXiv 2407.16970, section 3, and its model card. Quantile 0 is the best everywhere.
"""

import math
from collections.abc import Sequence

import numpy as np

from alt_hpc.errors import InputError


def quantiles(rewards: Sequence[float], q: int, remainder: str = "spread") -> list[int | None]:
    """Quantile of each of n generations of one prompt; None where a reward is not finite.

    The r-th best of n finite rewards (r from 0, ties by position) is in floor(r q / n); with
    `remainder="last"` (the authors' code) every quantile gets floor(n / q) and the last one the
    rest. Fewer finite rewards than quantiles: all None, the prompt is set aside.
    """
    finite = [i for i, reward in enumerate(rewards) if math.isfinite(reward)]
    ordered = sorted(finite, key=lambda i: -rewards[i])  # sorted is stable: ties by index
    n, last = len(ordered), remainder == "last"
    if n < q:
        return [None] * len(rewards)
    found = {i: min(r // (n // q), q - 1) if last else r * q // n for r, i in enumerate(ordered)}
    return [found.get(i) for i in range(len(rewards))]


def rated(ratings: Sequence[float], q: int) -> list[int | None]:
    """Quantile of each of n generations that were rated from q - 1, the best, down to 0.

    None where a rating is not finite. InputError where it is no whole number of these.
    """
    for rating in filter(math.isfinite, ratings):
        if rating not in range(q):
            problem = f"a reward of {rating:g} is no rating from 0 to {q - 1}"
            raise InputError(problem, "method.kind")
    return [q - 1 - int(rating) if math.isfinite(rating) else None for rating in ratings]


def select(
    found: Sequence[int | None], finished: Sequence[bool], keep: int, rng: np.random.Generator
) -> list[int]:
    """Indices of the generations kept for training, quantile by quantile.

    Of each quantile `keep` are drawn uniformly without replacement among those that ended by EOS
    (`finished`), then among the rest; a smaller quantile gives all it has.
    """
    chosen: list[int] = []
    for quantile in sorted({q for q in found if q is not None}):
        drawn: list[int] = []
        for ended in (True, False):
            some = [i for i, q in enumerate(found) if q == quantile and finished[i] == ended]
            drawn += [some[j] for j in rng.permutation(len(some))]
        chosen += drawn[:keep]
    return chosen


def filled(
    found: Sequence[int | None],
    finished: Sequence[bool],
    keep: int,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """As `select`, then so many of the rest that they are `count`, those that ended by EOS first.

    For quantiles that differ in size, or are empty, as ratings make them.
    """
    chosen = select(found, finished, keep, rng)
    left = [None if q is None or i in chosen else 0 for i, q in enumerate(found)]
    return chosen + select(left, finished, count - len(chosen), rng)
