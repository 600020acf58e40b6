"""Means over runs of what posts say, with 95 % intervals over posts and over seeds, pure (METHOD).

Over posts: the percentile bootstrap (`scipy.stats.bootstrap`), a post with what all runs say of it
the unit that is drawn; it speaks of these very policies. Over seeds: Student's t over the runs'
own figures. A difference is taken post by post before, so that its intervals are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 5000
AT_ONCE = 2**21  # numbers that a batch of resamples holds
LEVEL = 0.95

Numbers = NDArray[np.float64]
Place = tuple[str, int]  # set and row of a post
Values = Mapping[Place, float]  # of a run
Pairs = Mapping[Place, tuple[float, float]]  # of a run: difference in reward, in length


class Estimate(TypedDict):
    """A figure, and how sure it is; None where there is too little."""

    mean: float | None  # over runs
    low: float | None  # over posts
    high: float | None
    posts: float | None  # half the width of that interval
    seeds: float | None  # half the width of the interval over runs
    count: int  # posts
    runs: int  # that say anything


def mean(runs: Sequence[Values]) -> Estimate:
    """The mean over runs of their means over posts."""
    about = [{place: (1.0, value) for place, value in run.items()} for run in runs]
    return _estimate(about, 2, 1, lambda n, y: _share(y, n))


def intercept(runs: Sequence[Pairs]) -> Estimate:
    """The mean over runs of y at x = 0, from y regressed on x over posts; of three posts or more.

    Where no post differs in x it is the mean of y.
    """
    about = [{at: (1.0, y, x, x * x, x * y) for at, (y, x) in run.items()} for run in runs]
    return _estimate(about, 5, 3, _at_zero)


def _share(of: Numbers, count: Numbers) -> Numbers:
    return np.divide(of, count, out=np.full_like(of, np.nan), where=count > 0)


def _at_zero(n: Numbers, *sums: Numbers) -> Numbers:
    y, x, xx, xy = (_share(one, n) for one in sums)
    spread = xx - x * x
    slope = np.divide(xy - x * y, spread, out=np.zeros_like(y), where=spread > 1e-9)
    return np.asarray(y - slope * x)


def _estimate(
    runs: Sequence[Mapping[Place, Sequence[float]]],
    width: int,
    least: int,
    figure: Callable[..., Numbers],
) -> Estimate:
    """`figure` takes `width` sums over a run's posts, the first one how many they are."""
    told = [run for run in runs if len(run) >= least]
    places = list(dict.fromkeys(place for run in told for place in run))
    silent = (0.0,) * width
    each = [[run.get(place, silent) for run in told] for place in places]
    about = np.array(each, dtype=np.float64).reshape(len(places), len(told), width)

    def over(counts: Numbers) -> Numbers:
        """Figures [draws, runs] of posts that were drawn so often, [draws, posts]."""
        sums = (counts @ about.reshape(len(places), len(told) * width)).reshape(
            len(counts), len(told), width
        )
        return figure(*np.moveaxis(sums, -1, 0))

    own = over(np.ones((1, len(places))))[0]
    low, high = _over_posts(len(places), over) if len(places) > max(least - 1, 1) else (None, None)
    return {
        "mean": float(own.mean()) if told else None,
        "low": low,
        "high": high,
        "posts": None if low is None or high is None else (high - low) / 2,
        "seeds": _over_seeds(own),
        "count": len(places),
        "runs": len(told),
    }


def _over_posts(posts: int, over: Callable[[Numbers], Numbers]) -> tuple[float, float]:
    from scipy import stats  # slow to import, and controllers never need it

    def resampled(drawn: NDArray[Any], axis: int = -1) -> Numbers:
        """The mean over runs for draws of posts, [..., posts] of their numbers."""
        rows = drawn.reshape(-1, posts).astype(np.int64)
        at = rows + posts * np.arange(len(rows))[:, None]
        counts = np.bincount(at.ravel(), minlength=rows.size).reshape(rows.shape)
        return np.asarray(np.nanmean(over(counts.astype(np.float64)), -1).reshape(drawn.shape[:-1]))

    settings = {"n_resamples": RESAMPLES, "batch": max(AT_ONCE // posts, 1), "vectorized": True}
    found = stats.bootstrap(
        (np.arange(posts),),
        resampled,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
        **settings,
    ).confidence_interval
    return float(found.low), float(found.high)


def _over_seeds(own: Numbers) -> float | None:
    from scipy import stats

    if len(own) < 2:
        return None
    wide = float(stats.t.ppf((1 + LEVEL) / 2, len(own) - 1))
    return float(wide * own.std(ddof=1) / np.sqrt(len(own)))
