"""Win rates of judgings, and whether the judge can judge at all: pure (METHOD, win rates).

Intervals are 95 % ones, by bootstrap over posts, which are drawn with all their verdicts.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 1000
MOST_LOST = 0.05  # of the resamples may have no fit of their own, else there is no interval
RIDGE = 1e-3
STEPS = 30  # of Newton's method


class Verdict(NamedTuple):
    """Of two answers, a and b, to a post: which one a judge prefers, in both orders."""

    first: float | None  # with a shown first: 1 a, 0 b, None: what it said could not be read
    second: float | None  # with b shown first, the same
    longer: float  # by how many characters a is longer than b
    post: Hashable  # which post it is of

    @property
    def outcome(self) -> float:
        """1 where both orders say a, 0 where both say b, else one half."""
        return self.first if self.first is not None and self.first == self.second else 0.5

    @property
    def mean(self) -> float:
        """The mean of both orders, one half for what could not be read."""
        return (0.5 if self.first is None else self.first) / 2 + (
            0.5 if self.second is None else self.second
        ) / 2


def win_rate(verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """How often a wins over b, and what the verdicts are worth.

    `rate` and `interval`; `agreement`: share of posts, of those read in both orders, of which both
    orders say the same; `bias` = 2 P(the first one shown is preferred) - 1; `controlled`: see
    `controlled`; `unread`: verdicts that could not be read, each counted as one half.
    """
    drawn = _resamples([verdict.post for verdict in verdicts], seed)
    outcomes = np.array([verdict.outcome for verdict in verdicts])
    both = [v.first == v.second for v in verdicts if v.first is not None and v.second is not None]
    named = [v.first for v in verdicts if v.first is not None]  # whether the first one shown is
    named += [1 - v.second for v in verdicts if v.second is not None]
    found = {"posts": len({verdict.post for verdict in verdicts}), "rate": float(outcomes.mean())}
    return found | {
        "interval": _interval(_means(outcomes, drawn)),
        "agreement": float(np.mean(both)) if both else None,
        "bias": 2 * float(np.mean(named)) - 1 if named else None,
        "unread": 2 * len(verdicts) - len(named),
        "asked": 2 * len(verdicts),
        **controlled(verdicts, drawn),
    }


def controlled(verdicts: Sequence[Verdict], drawn: Array) -> dict[str, Any]:
    """The win rate at equal length: sigma(theta) of logit p = theta + phi tanh(D / sd(D)).

    D is by how many characters a is longer, not centred; fitted to the verdicts of both orders with
    a small ridge, and again, sd and all, in every resample. `controlled` is None where the length
    alone tells all verdicts (or there is but one verdict): such a fit has no end. `phi` > 0: longer
    answers are preferred.
    """
    longer, means = (np.array([getattr(v, key) for v in verdicts]) for key in ("longer", "mean"))
    whole = np.ones((1, len(verdicts)))
    if bool(_separates(longer, means, whole)[0]):
        return {"controlled": None, "controlled_interval": None, "phi": None}
    theta, phi = _fit(longer, means, whole)[0]
    fits = ~_separates(longer, means, drawn)
    interval = None
    if fits.mean() >= 1 - MOST_LOST:
        interval = _interval(_sigma(_fit(longer, means, drawn[fits])[:, 0]))
    rate = float(_sigma(theta))
    return {"controlled": rate, "controlled_interval": interval, "phi": float(phi)}


def accuracy(right: Sequence[float], posts: Sequence[Hashable], seed: int = 0) -> dict[str, Any]:
    """How often something is right about pairs (1, 0, or one half), and its interval."""
    values = np.array(right, dtype=np.float64)
    interval = _interval(_means(values, _resamples(posts, seed)))
    return {"rate": float(values.mean()), "interval": interval, "pairs": len(values)}


def cannot_judge(judge: Interval, longer: float) -> bool:
    """Whether a judge's accuracy (its interval) does not lie above that of the length rule."""
    return judge[0] <= longer


def _resamples(posts: Sequence[Hashable], seed: int) -> Array:
    """How often each verdict is in each resample, [RESAMPLES, verdicts]: posts are drawn."""
    number = {post: i for i, post in enumerate(dict.fromkeys(posts))}
    rng, count = np.random.default_rng(seed), len(number)
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return drawn[:, [number[post] for post in posts]].astype(np.float64)


def _means(values: Array, drawn: Array) -> Array:
    return np.asarray(drawn @ values / drawn.sum(1))


def _interval(values: Array) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _sigma(value: Any) -> Any:
    return 1 / (1 + np.exp(-value))


def _separates(longer: Array, means: Array, drawn: Array) -> NDArray[np.bool_]:
    """Of each resample, whether a bound on the length tells all its verdicts."""
    there = drawn > 0
    ones, zeros = there & (means > 0), there & (means < 1)  # a verdict for a, for b among them

    def least(which: NDArray[np.bool_]) -> Array:
        return np.asarray(np.where(which, longer, np.inf).min(1))

    def most(which: NDArray[np.bool_]) -> Array:
        return np.asarray(np.where(which, longer, -np.inf).max(1))

    one = ~ones.any(1) | ~zeros.any(1)  # there is but one verdict
    alike = least(there) == most(there)  # all of the same length: there is nothing to control
    bound = (most(zeros) <= least(ones)) | (most(ones) <= least(zeros))
    return np.asarray(one | (bound & ~alike))


def _fit(longer: Array, means: Array, drawn: Array) -> Array:
    """(theta, phi) of each resample, [resamples, 2], by Newton's method."""
    total = drawn.sum(1, keepdims=True)
    centre = (drawn @ longer)[:, None] / total
    sd = np.sqrt((drawn * (longer - centre) ** 2).sum(1, keepdims=True) / total)
    x = np.tanh(longer / np.where(sd > 0, sd, np.inf))  # 0 where all are of the same length
    found = np.zeros((len(drawn), 2))
    for _ in range(STEPS):
        p = _sigma(found[:, :1] + found[:, 1:] * x)
        off, curve = 2 * drawn * (means - p), 2 * drawn * p * (1 - p)
        slope = np.stack([off.sum(1), (off * x).sum(1)], 1) - RIDGE * found
        a, b, c = ((curve * x**n).sum(1) for n in (0, 1, 2))
        a, c = a + RIDGE, c + RIDGE
        step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], 1)
        step /= (a * c - b**2)[:, None]
        found += np.clip(step, -2.0, 2.0)
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    return found
