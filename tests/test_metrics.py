"""The measures of evaluation."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alt_hpc.report import intervals, measures


def row(number: int, reward: float | None, **more: Any) -> dict[str, Any]:
    base = {"set": "valid", "row": number, "reward": reward, "perplexity": 2.0}
    return {**base, "length": 3, "ended": "eos", "text": "a b", **more}


def test_distinct_counts_different_ngrams_over_all_words() -> None:
    texts = ["the cat sat", "the cat  ran\n", "", "mat"]
    # words: the cat sat the cat ran mat; bigrams: the-cat cat-sat the-cat cat-ran
    assert measures.distinct(texts, 1) == 5 / 7
    assert measures.distinct(texts, 2) == 3 / 7
    assert measures.distinct(["", " "], 1) == 0.0


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), max_size=6), st.integers(1, 3))
def test_distinct_is_a_share(words: list[list[str]], n: int) -> None:
    texts = [" ".join(w) for w in words]
    found = []
    for w in words:
        for i in range(len(w)):
            gram = w[i : i + n]
            if len(gram) == n and gram not in found:
                found.append(gram)
    total = sum(map(len, words))
    assert measures.distinct(texts, n) == (len(found) / total if total else 0)


@settings(deadline=None)  # the first example imports scipy
@given(
    st.lists(
        st.tuples(st.floats(-9, 9), st.one_of(st.none(), st.floats(-9, 9))), min_size=3, max_size=30
    )
)
def test_paired_interval_is_that_of_the_differences(
    rewards: list[tuple[float, float | None]],
) -> None:
    before = [row(i, a) for i, (a, _) in enumerate(rewards)]
    after = [row(i, b) for i, (_, b) in enumerate(rewards)][::-1]  # in another order
    differences = [b - a for a, b in rewards[::-1] if b is not None]
    found = intervals.mean([measures.gain(before, after)])
    assert found["count"] == len(differences)
    if len(differences) > 1 and statistics.stdev(differences) > 1e-9:
        assert found["mean"] == pytest.approx(statistics.fmean(differences), abs=1e-9)
        settings = {"method": "percentile", "n_resamples": 5000, "rng": np.random.default_rng(0)}
        its = stats.bootstrap((differences,), np.mean, **settings).confidence_interval
        assert (found["low"], found["high"]) == pytest.approx((its.low, its.high), abs=1e-9)
        assert found["posts"] == pytest.approx((its.high - its.low) / 2, abs=1e-9)


def test_equal_length_is_where_the_line_of_differences_meets_no_difference_in_length() -> None:
    """Against numpy's own line, for each run; posts that differ in nothing say their mean."""
    rng = np.random.default_rng(3)
    runs, wanted = [], []
    for slope in (0.2, -0.1):
        x = rng.integers(-9, 10, 40).astype(float)
        y = 1.5 + slope * x + rng.normal(0, 0.3, 40)
        before = [row(i, 0.0, length=20) for i in range(40)]
        runs.append(measures.paired(before, [row(i, y[i], length=20 + x[i]) for i in range(40)]))
        wanted.append(np.polyfit(x, y, 1)[1])
    found = intervals.intercept(runs)
    assert found["mean"] == pytest.approx(np.mean(wanted))
    assert (found["count"], found["runs"]) == (40, 2)
    assert found["seeds"] == pytest.approx(12.7062 * abs(wanted[0] - wanted[1]) / 2, rel=1e-5)
    low, high = found["low"], found["high"]
    assert low is not None
    assert high is not None
    assert low < 1.5 < high
    drawn = [rng.integers(0, 40, 40) for _ in range(4000)]  # another generator, post by post
    again = []
    for posts in drawn:
        lines = [[[*run.values()][i] for i in posts] for run in runs]
        again.append(np.mean([np.polyfit(*np.array(line)[:, ::-1].T, 1)[1] for line in lines]))
    assert (low, high) == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.02)
    assert intervals.intercept([{("valid", i): (2.0, 0.0) for i in range(3)}])["mean"] == 2.0
    assert intervals.intercept([{("valid", i): (2.0, float(i)) for i in range(2)}])["mean"] is None


def test_pairing_is_by_set_and_row() -> None:
    before = [row(0, 1.0), row(0, 5.0, set="test"), row(7, 100.0)]
    after = [row(0, 7.0, set="test"), row(0, 2.0), row(8, -100.0)]
    found = intervals.mean([measures.gain(before, after)])
    assert (found["mean"], found["count"]) == (1.5, 2)


def test_equal_differences_are_known_exactly() -> None:
    gain = measures.gain([row(0, 1.0), row(1, 2.0)], [row(0, 2.0), row(1, 3.0)])
    found = intervals.mean([gain])
    assert (found["mean"], found["posts"], found["seeds"]) == (1.0, 0.0, None)


def test_only_posts_where_both_answers_finished() -> None:
    before = [row(0, 1.0), row(1, 2.0, ended="limit"), row(2, 3.0), row(3, None)]
    after = [row(0, 2.0), row(1, 9.0), row(2, 9.0, ended="limit"), row(3, 1.0)]
    assert measures.gain(before, after) == {("valid", 0): 1.0, ("valid", 1): 7.0, ("valid", 2): 6.0}
    assert measures.gain(before, after, finished=True) == {("valid", 0): 1.0}


def test_over_seeds_and_over_posts() -> None:
    """Student's interval of the runs' means; a post of several runs is one post."""
    gains = [
        {("valid", i): mean + spread for i, spread in enumerate((-1.0, 1.0))} for mean in (1, 2, 6)
    ]
    found = intervals.mean(gains)
    assert (found["mean"], found["count"], found["runs"]) == (3.0, 2, 3)
    assert found["seeds"] == pytest.approx(4.302653 * statistics.stdev([1, 2, 6]) / math.sqrt(3))
    assert (found["low"], found["high"], found["posts"]) == (2.0, 4.0, 1.0)  # either post alone


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Of many runs on 72 posts, as many as of the quickstart."""
    rng, true, covered = np.random.default_rng(7), 0.3, 0
    for _ in range(800):
        policy = rng.normal(1.0, 2.0, 72)  # how hard a post is stands in both of its rewards
        before = [row(i, float(r)) for i, r in enumerate(policy)]
        gains = policy + true + rng.normal(0.0, 0.7, 72)
        after = [row(i, float(r)) for i, r in enumerate(gains)]
        found = intervals.mean([measures.gain(before, after)])
        covered += abs(found["mean"] - true) <= found["posts"]
    assert 0.92 < covered / 800 < 0.97  # the share's own error is 0.008


def test_one_post_has_no_interval() -> None:
    assert intervals.mean([measures.gain([], [])])["mean"] is None
    assert measures.summarise([row(0, 1.0)])["reward_error"] is None
    assert intervals.mean([measures.gain([row(0, 1.0)], [row(0, 2.0)])])["posts"] is None


def test_summary_leaves_out_what_is_not_finite_and_counts_every_row() -> None:
    rows = [
        row(0, 1.0, length=2),
        row(1, None, perplexity=None, length=4, ended="limit"),
        row(2, 4.0, perplexity=6.0, length=6),
        row(3, None, length=8, ended="limit"),
    ]
    found = measures.summarise(rows)
    assert found["rows"] == 4
    assert found["reward"] == 2.5
    assert found["reward_error"] == pytest.approx(1.5)
    assert found["perplexity"] == pytest.approx(10 / 3)
    assert found["perplexity_median"] == 2.0
    assert found["length"] == 5.0
    assert found["truncated"] == 0.5
    assert measures.summarise([row(0, None, perplexity=None)])["reward"] is None


def test_rewards_by_quantile_keep_those_set_aside_out() -> None:
    found = measures.by_quantile([[1.0, None, 3.0], [9.0, 8.0]], [[1, None, 0], [None, None]], 2)
    assert found == [[3.0], [1.0]]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_a_histogram_holds_every_value(values: list[float], bins: int) -> None:
    found = measures.histogram(values, bins)
    assert found["num"] == sum(found["bucket_counts"]) == len(values)
    assert len(found["bucket_limits"]) == len(found["bucket_counts"]) == bins
    assert found["bucket_limits"] == sorted(found["bucket_limits"])
    assert found["min"] == min(values)
    assert found["max"] == max(values)
    assert found["bucket_limits"][-1] >= max(values)
    assert found["sum"] == pytest.approx(math.fsum(values), abs=1e-9)
    assert found["sum_squares"] == pytest.approx(math.fsum(v * v for v in values), abs=1e-9)
    assert found["spread"] == pytest.approx(statistics.pstdev(values), abs=1e-9)
    assert measures.histogram([]) == {"num": 0}


def test_distinct_figures_are_of_one_and_two_words() -> None:
    found = measures.summarise([row(0, 1.0, text="a b a b"), row(1, 1.0, text="a b c")])
    assert (found["distinct_1"], found["distinct_2"]) == (3 / 7, 3 / 7)
    found = measures.summarise([row(0, 1.0, text="a b c a c b")])
    assert [found[f"distinct_{n}"] for n in (1, 2, 3)] == [3 / 6, 5 / 6, 4 / 6]


def test_rewards_and_quantiles_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        measures.by_quantile([[1.0]], [], 1)
    with pytest.raises(ValueError, match="zip"):
        measures.by_quantile([[1.0]], [[0, 0]], 1)
