"""What words and training do, and one method over another: differences of rewards (METHOD).

Word: best minus plain; training: plain after minus plain before; control: best minus worst; gain:
best after minus plain before. Pure, over what `runs` has read.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alt_hpc.methods.method import QUANTILE
from alt_hpc.report import intervals, measures
from alt_hpc.report.comparison import Group, problems, rewards
from alt_hpc.report.results import Rows, picked

OVER, ORDER = "over another", "order of the words"  # kinds of effects, beside those above


@dataclass(frozen=True)
class Effect:
    """A difference of rewards, and the same where only what is alike otherwise is compared."""

    group: str
    kind: str
    what: str
    reward: str
    every: intervals.Estimate
    finished: intervals.Estimate | None = None  # posts where both answers ended by themselves
    level: intervals.Estimate | None = None  # at equal length


def effects(groups: Sequence[Group], name: str) -> list[Effect]:
    """What words and training do in each group, then the first group over each comparable one."""
    found = list[Effect]()
    for group, reward in itertools.product(groups, rewards(groups)):
        if group.first.last:
            found += _within(group, name, reward)
    apart = problems(groups, name)
    for other in (g for g in groups[1:] if g.name not in apart and groups[0].first.last):
        found += [_between(groups[0], other, name, reward) for reward in rewards(groups)]
    return [effect for effect in found if effect.every["runs"]]


def _within(group: Group, name: str, reward: str) -> Iterator[Effect]:
    run, after = group.first, f"after iteration {group.first.last}"
    start = [picked(run.start, "plain", name) for run in group.runs]
    ends = {
        variant: [picked(run.end, variant, name) for run in group.runs]
        for variant in ("plain", *run.words)
    }
    pairs = {"training": (f"plain {after} minus plain 0", start, ends["plain"])}
    if "best" in ends:
        best, worst = run.asked("best"), run.asked("worst")
        pairs = {"word": (f"{best} minus plain, {after}", ends["plain"], ends["best"])} | pairs
        if "worst" in ends:
            what = f"{best} minus {worst}, {after}"
            pairs["control"] = (what, ends["worst"], ends["best"])
        pairs["gain"] = (f"{best} {after} minus plain 0", start, ends["best"])
    for kind, (what, before, now) in pairs.items():
        yield Effect(group.name, kind, what, reward, *_differences(before, now, reward))
    if any(variant.startswith(QUANTILE) for variant in run.words):
        each = [order([picked(r.end, v, name) for v in run.words], reward) for r in group.runs]
        what = f"rank correlation of word and reward, {after}"
        yield Effect(group.name, ORDER, what, reward, intervals.mean(each))


def _between(one: Group, other: Group, name: str, reward: str) -> Effect:
    """By post; and seed by seed, where both have the same seeds."""
    seeds = [run.seed for run in one.runs if other.seed(run.seed)]
    how = "other seeds" if not seeds else "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    what = f"{_known(one)} minus {_known(other)} ({how})"
    before, after = [
        [picked(run.end, run.shown, name) for run in group.runs if not seeds or run.seed in seeds]
        for group in (other, one)
    ]
    if not seeds:  # then a post counts by the means of its answers
        before, after = ([_means(side, reward)] for side in (before, after))
    return Effect(one.name, OVER, what, reward, *_differences(before, after, reward))


def _known(group: Group) -> str:
    return f"{group.name}, {group.first.asked(group.first.shown)}"


def _means(runs: Sequence[Rows], reward: str) -> Rows:
    """A row a post: what answers of several runs have on average; finished where all are."""
    posts = dict[int, Rows]()
    for row in itertools.chain(*runs):
        if measures.rewarded(row, reward) is not None:
            posts.setdefault(row["row"], []).append(row)
    found = list[dict[str, Any]]()
    for rows in posts.values():
        value = float(np.mean([measures.rewarded(row, reward) for row in rows]))
        about = {"reward": value, "further": {reward: value}}
        ended = "eos" if all(row["ended"] == "eos" for row in rows) else "limit"
        length = float(np.mean([row["length"] for row in rows]))
        found.append({**rows[0], **about, "ended": ended, "length": length})
    return found


def _differences(
    before: Sequence[Rows], after: Sequence[Rows], reward: str
) -> tuple[intervals.Estimate, intervals.Estimate, intervals.Estimate]:
    """On all posts, on those where both answers finished, and at equal length."""
    both = [*zip(before, after, strict=True)]
    every, finished = (
        intervals.mean([measures.gain(*two, only, reward) for two in both])
        for only in (False, True)
    )
    level = intervals.intercept([measures.paired(*two, reward) for two in both])
    return every, finished, level


def order(words: Sequence[Rows], reward: str = measures.REWARD) -> measures.Gain:
    """Of each post Spearman's correlation of word and reward; `words`: answers, the best's first.

    +1: the better the word, the better the reward. 0 where all rewards are the same. Posts where a
    word's answer has no reward are left out.
    """
    from scipy import stats

    by_word = [{(r["set"], r["row"]): measures.rewarded(r, reward) for r in rows} for rows in words]
    places = [at for at in by_word[0] if all(by.get(at) is not None for by in by_word)]
    if not places:
        return {}
    ranks = stats.rankdata([[by[at] for by in by_word] for at in places], axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    wanted = (len(words) - 1) / 2 - np.arange(len(words))
    norms = np.sqrt((ranks**2).sum(1) * (wanted**2).sum())
    found = np.divide(ranks @ wanted, norms, out=np.zeros(len(places)), where=norms > 0)
    return dict(zip(places, map(float, found), strict=True))


def over_optimised(found: Sequence[Effect]) -> Iterator[str]:
    """A sentence for each gain in the reward that a further reward does not see."""
    known = {(e.group, e.kind, e.what, e.reward): e.every for e in found}
    for (group, kind, what, reward), further in known.items():
        its = known.get((group, kind, what, measures.REWARD))
        if reward == measures.REWARD or its is None or kind not in ("gain", "training"):
            continue
        if _above(its) and not _above(further):
            said = f"{further['mean']:+.3f} ±{further['posts'] or 0:.3f} in {reward}"
            yield (
                f"over-optimisation: {group}, {what}: {its['mean']:+.3f} ±{its['posts']:.3f} in"
                f" {measures.REWARD}, but {said} (95 % over posts)"
            )


def _above(estimate: intervals.Estimate) -> bool:
    return estimate["low"] is not None and estimate["low"] > 0
