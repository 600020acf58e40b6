"""What an iteration is worth: the measures of evaluation, pure (arXiv 2407.16970)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
MUCH = 100  # times the spread of every other part: it alone decides the order


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n: different n-grams of space-split words, over all words."""
    words = [text.split() for text in texts]
    grams = {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}
    return len(grams) / max(sum(map(len, words)), 1)


def summarise(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Means over the rows of one set and variant; None where nothing is finite."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    texts = [row["text"] for row in rows]
    parts = {name: [p[name] for row in rows if (p := row.get("parts"))] for name in _parts(rows)}
    return {
        **{f"reward_{name}": _mean(_finite(values)) for name, values in parts.items()},
        "rows": len(rows),
        "reward": _mean(rewards),
        "reward_error": _error(rewards),
        "perplexity": _mean([p for row in rows if (p := row["perplexity"]) is not None]),
        "length": _mean([row["length"] for row in rows]),
        "truncated": _mean([row["ended"] == "limit" for row in rows]),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def spreads(groups: Sequence[Sequence[Row]], weight: Callable[[str], float]) -> dict[str, Any]:
    """Of each part of scored rows: its mean, and the standard deviation of what it adds (`spread`).

    The deviation is from the mean of a group: of rows whose answers are put in order together.
    """
    found = dict[str, Any]()
    for name in _parts([row for rows in groups for row in rows]):
        parts = [[v for row in rows for v in _finite(row["parts"][name])] for rows in groups]
        values = [value for part in parts for value in part]
        with np.errstate(over="ignore", invalid="ignore"):
            each = [len(part) * float(np.var(part)) for part in parts if part]
            spread = abs(weight(name)) * math.sqrt(sum(each) / max(len(values), 1))
            found[name] = {"mean": _mean(values), "spread": spread}
    return found


def ruling(parts: Mapping[str, Any]) -> str:
    """A sentence where the spread of one part is so great that the others decide nothing."""
    order = sorted(parts, key=lambda name: -parts[name]["spread"])
    if len(order) < 2:
        return ""
    most, next_ = (float(parts[name]["spread"]) for name in order[:2])
    if not most > MUCH * next_:
        return ""
    what = f"its weighted spread is {most / next_:,.0f} times that of {order[1]}" if next_ else ""
    what = what or "the other parts are the same for all answers"
    return f"reward: {order[0]} alone decides the order: {what}"


def _parts(rows: Sequence[Row]) -> list[str]:
    return [*dict.fromkeys(name for row in rows for name in row.get("parts", ()))]


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


Gain = dict[tuple[str, int], float]  # by set and row


def gain(before: Sequence[Row], after: Sequence[Row], finished: bool = False) -> Gain:
    """Differences of rewards on the same posts; or only on those where both answers finished."""
    wanted = [
        {(row["set"], row["row"]): row["reward"] for row in rows if _counts(row, finished)}
        for rows in (before, after)
    ]
    return {place: wanted[1][place] - wanted[0][place] for place in wanted[1] if place in wanted[0]}


def _counts(row: Row, finished: bool) -> bool:
    return row["reward"] is not None and (not finished or row["ended"] == "eos")


def over_runs(gains: Sequence[Gain]) -> dict[str, Any]:
    """The mean over runs (`seeds`) of their mean gains, with the halves of 95 % intervals.

    `posts`: over posts, for these policies; a post of several runs counts once, by its mean.
    `seeds`: over runs, by Student's t; None for one. Both None where there is too little.
    """
    from scipy import stats  # slow to import, and controllers never need it

    means = [value for one in gains if (value := _mean([*one.values()])) is not None]
    posts: dict[tuple[str, int], list[float]] = {}
    for one in gains:
        for place, value in one.items():
            posts.setdefault(place, []).append(value)
    over = {"posts": _error([float(np.mean(values)) for values in posts.values()])}
    over["seeds"] = _error(means)
    wide = {"posts": 1.96, "seeds": float(stats.t.ppf(0.975, max(len(means) - 1, 1)))}
    halves = {name: None if e is None else e * wide[name] for name, e in over.items()}
    return {"mean": _mean(means), "count": len(posts), "runs": len(means), **halves}


def by_quantile(
    rewards: Iterable[Sequence[float | None]], found: Iterable[Sequence[int | None]], q: int
) -> list[list[float]]:
    """Rewards of all generations of each of q quantiles, given prompt by prompt with theirs."""
    pairs = [pair for both in zip(rewards, found, strict=True) for pair in zip(*both, strict=True)]
    return [[r for r, of in pairs if of == quantile and r is not None] for quantile in range(q)]


def histogram(values: Sequence[float], bins: int = 30) -> dict[str, Any]:
    """A histogram in TensorBoard's raw form, with the standard deviation as `spread`."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return {"num": 0}
    counts, edges = np.histogram(array, bins=bins)
    return {
        "min": float(array.min()),
        "max": float(array.max()),
        "num": len(array),
        "sum": float(array.sum()),
        "sum_squares": float((array**2).sum()),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
        "spread": float(array.std()),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
