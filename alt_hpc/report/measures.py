"""What an iteration is worth: the measures of evaluation, pure (arXiv 2407.16970)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from alt_hpc.report import intervals

Row = Mapping[str, Any]
REWARD = "reward"  # the column of `measure.reward`, beside those of `measure.further` by name
ROUGES = ("rouge1", "rouge2", "rougeL")
MUCH = 100  # times the spread of every other part: it alone decides the order


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n: different n-grams of space-split words, over all words."""
    words = [text.split() for text in texts]
    grams = {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}
    return len(grams) / max(sum(map(len, words)), 1)


def summarise(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Means over the rows of one set and variant; None where nothing is finite."""
    rewards = _finite(row["reward"] for row in rows)
    perplexities = _finite(row["perplexity"] for row in rows)
    texts = [row["text"] for row in rows]
    parts = {name: [p[name] for row in rows if (p := row.get("parts"))] for name in _parts(rows)}
    return {
        **{f"reward_{name}": _mean(_finite(values)) for name, values in parts.items()},
        "rows": len(rows),
        "reward": _mean(rewards),
        "reward_error": _error(rewards),
        **{f"further_{name}": _mean(_all(rows, name)) for name in further(rows)},
        "perplexity": _mean(perplexities),
        "perplexity_median": float(np.median(perplexities)) if perplexities else None,
        "length": _mean([row["length"] for row in rows]),
        "truncated": _mean([row["ended"] == "limit" for row in rows]),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        **{name: _mean([r[name] for row in rows if (r := row.get("rouge"))]) for name in ROUGES},
    }


def further(rows: Sequence[Row]) -> list[str]:
    """The further rewards that rows have."""
    return [*dict.fromkeys(name for row in rows for name in row.get("further") or ())]


def _all(rows: Sequence[Row], reward: str) -> list[float]:
    return _finite(rewarded(row, reward) for row in rows)


def words(texts: Iterable[str], counts: Iterable[int]) -> list[str]:
    """The first so many space-split words of each text."""
    return [" ".join(text.split()[:count]) for text, count in zip(texts, counts, strict=True)]


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


Gain = dict[intervals.Place, float]  # by set and row


def rewarded(row: Row, name: str = REWARD) -> float | None:
    """What a reward says of an answer: `reward`, or one of `measure.further`."""
    found: float | None = row["reward"]
    return found if name == REWARD else (row.get("further") or {}).get(name)


def gain(
    before: Sequence[Row], after: Sequence[Row], finished: bool = False, reward: str = REWARD
) -> Gain:
    """Differences of rewards on the same posts; or only on those where both answers finished."""
    if finished:
        before, after = ([r for r in rows if r["ended"] == "eos"] for rows in (before, after))
    return {place: more for place, (more, _) in paired(before, after, reward).items()}


def paired(
    before: Sequence[Row], after: Sequence[Row], reward: str = REWARD
) -> dict[intervals.Place, tuple[float, float]]:
    """Differences in reward and in length (tokens) of the answers to the same posts."""
    earlier, found = dict(_at(before)), dict[intervals.Place, tuple[float, float]]()
    for place, row in _at(after):
        old, new = (rewarded(r, reward) if r else None for r in (earlier.get(place), row))
        if old is not None and new is not None:
            found[place] = new - old, float(row["length"] - earlier[place]["length"])
    return found


def _at(rows: Iterable[Row]) -> Iterator[tuple[intervals.Place, Row]]:
    return (((row["set"], row["row"]), row) for row in rows)


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
