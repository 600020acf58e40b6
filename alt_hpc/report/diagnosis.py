"""Is a word being learned? What a policy's probabilities say of its best and its worst feedback.

For an answer y to a post let l(y) = log p(y | best feedback) - log p(y | worst feedback), in nats,
under the policy that is asked about. Of a fixed set of answers, those of each post's best quantile
are compared with those of its worst one: all pairs (b, w) of a post. A word that is learned makes
l(b) > l(w). A shift that all answers share moves no pair.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alt_hpc.methods.quantiles import quantiles

RESAMPLES = 2000  # of posts; and permutations of labels
Numbers = NDArray[np.float64]


class Answer(NamedTuple):
    """An answer to a post, and what the policy's probabilities say of it."""

    reward: float | None
    finished: bool
    length: int  # tokens
    word: float  # l, in nats


class Post(NamedTuple):
    """l and length of the finished answers of a post's best and worst quantile, [n, 2] each."""

    best: Numbers
    worst: Numbers


def post(answers: Iterable[Answer], levels: int) -> Post:
    """A post's answers, put in order by their rewards into so many quantiles, of two at least."""
    asked = list(answers)
    levels = max(2, min(levels, len(asked) // 2))
    rewards = [math.nan if answer.reward is None else answer.reward for answer in asked]
    found = list(zip(asked, quantiles(rewards, levels), strict=True))
    sides = [
        [(a.word, a.length) for a, q in found if q == i and a.finished] for i in (0, levels - 1)
    ]
    best, worst = (np.array(side, dtype=np.float64).reshape(-1, 2) for side in sides)
    return Post(best, worst)


def diagnose(posts: Iterable[Post], seed: int = 0) -> dict[str, Any] | None:
    """The figures of a set of answers, each with the half of its 95 % interval; None without pairs.

    `share`: of pairs with l(b) > l(w), ties half, mean over posts; 0.5 says that nothing is
    learned, and `null` is the half width of the interval that it has with labels permuted within
    posts. `nats`: mean of (l(b) - l(w)) / 2. `level`: the same at equal length, from the intercept
    of l(b) - l(w) regressed on the difference in length. `shift`: mean l. Intervals come from
    resampling posts; every post counts the same.
    """
    asked = [one for one in posts if len(one.best) and len(one.worst)]
    if not asked:
        return None
    rng = np.random.default_rng(seed)
    about = np.array([_moments(one) for one in asked])  # [posts, 6]
    chosen = rng.integers(len(asked), size=(RESAMPLES, len(asked)))
    figures, resampled = _figures(about.mean(0)), _figures(about[chosen].mean(1))
    found: dict[str, Any] = {"posts": len(asked)}
    for name, value in figures.items():
        found |= {name: float(value), f"{name}_error": _half(resampled[name])}
    return found | {"null": _half(np.mean([_permuted(one, rng) for one in asked], axis=0))}


def sentence(found: dict[str, Any]) -> str:
    """`words: 0.71 ±0.04 of pairs in order (0.50: not learned)`."""
    share, error = found["share"], found["share_error"]
    return f"words: {share:.2f} ±{error:.2f} of pairs in order (0.50: not learned)"


def _in_order(best: Numbers, worst: Numbers) -> Numbers:
    """Share of pairs, over the last axis of each."""
    above = best[..., :, None] - worst[..., None, :]
    return np.asarray(((above > 0) + 0.5 * (above == 0)).mean((-2, -1)))


def _permuted(one: Post, rng: np.random.Generator) -> Numbers:
    """Shares with the labels of a post's answers permuted, [RESAMPLES]."""
    words = np.concatenate([one.best[:, 0], one.worst[:, 0]])
    mixed = rng.permuted(np.tile(words, (RESAMPLES, 1)), axis=1)
    return _in_order(mixed[:, : len(one.best)], mixed[:, len(one.best) :])


def _moments(one: Post) -> list[float]:
    """Of a post: share, mean l, and of its pairs the means that a regression of y on x takes."""
    pairs = (one.best[:, None] - one.worst[None]).reshape(-1, 2)
    y, x = pairs[:, 0], pairs[:, 1]
    shift = np.concatenate([one.best, one.worst])[:, 0].mean()
    share = float(_in_order(one.best[:, 0], one.worst[:, 0]))
    return [share, shift, y.mean(), x.mean(), (x * x).mean(), (x * y).mean()]


def _figures(about: Numbers) -> dict[str, Numbers]:
    """The figures of means over posts [..., 6]."""
    share, shift, y, x, xx, xy = np.moveaxis(about, -1, 0)
    spread = xx - x * x
    slope = np.divide(xy - x * y, spread, out=np.zeros_like(y), where=spread > 1e-12)
    return {"share": share, "shift": shift, "nats": y / 2, "level": (y - slope * x) / 2}


def _half(values: Numbers) -> float:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(high - low) / 2
