"""Win rates: the figures of judges that are known, and intervals that cover the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from alt_hpc.judges import compare
from alt_hpc.report import winrates
from alt_hpc.report.winrates import Verdict


def verdicts(
    firsts: Sequence[float], seconds: Sequence[float], longer: Sequence[float]
) -> list[Verdict]:
    rows = zip(firsts, seconds, longer, strict=True)
    return [Verdict(*row, post) for post, row in enumerate(rows)]


def test_a_judge_that_always_names_the_first_says_nothing() -> None:
    found = winrates.win_rate(verdicts([1.0] * 40, [0.0] * 40, [*range(-20, 20)]))
    assert (found["rate"], found["bias"], found["agreement"]) == (0.5, 1.0, 0.0)
    assert found["interval"] == (0.5, 0.5)
    assert found["controlled"] == pytest.approx(0.5)


def test_both_orders_count_and_what_cannot_be_read_is_one_half() -> None:
    """By hand: outcomes 1, 0, one half (orders differ), one half (read in one order only)."""
    given = [
        Verdict(1.0, 1.0, 3, "p"),
        Verdict(0.0, 0.0, -2, "q"),
        Verdict(0.0, 1.0, 1, "r"),
        Verdict(None, 1.0, 5, "s"),
    ]
    found = winrates.win_rate(given)
    assert found["rate"] == 0.5
    assert found["agreement"] == pytest.approx(2 / 3)
    assert (found["unread"], found["asked"]) == (1, 8)
    # the first one shown was named in 2 of 7 read: p once, q once, r never, s never
    assert found["bias"] == pytest.approx(2 * 2 / 7 - 1)


def test_a_judge_that_prefers_the_longer_text_is_exposed() -> None:
    """At equal length it is undecided; where the length tells all there is no such figure."""
    rng = np.random.default_rng(0)
    longer = rng.normal(60.0, 60.0, 300)  # the policy writes more, most of the time
    noisy = [[float(d + rng.normal(0.0, 25.0) > 0) for d in longer] for _ in range(2)]
    found = winrates.win_rate(verdicts(*noisy, [*longer]))
    assert found["rate"] > 0.7
    assert abs(found["controlled"] - 0.5) < 0.12
    assert found["phi"] > 1
    whole = [float(d > 0) for d in longer]
    found = winrates.win_rate(verdicts(whole, whole, [*longer]))
    assert found["controlled"] is None
    assert found["controlled_interval"] is None


def test_a_fit_is_what_newton_finds_by_another_way() -> None:
    """Gradient descent on the same loss, one number after the other."""
    rng = np.random.default_rng(3)
    longer = rng.normal(0.4, 1.0, 50)
    both = [[float(v) for v in rng.random(50) < 0.6] for _ in range(2)]
    found = winrates.win_rate(verdicts(*both, [*longer]))
    sd, theta, phi = float(np.std(longer)), 0.0, 0.0
    for _ in range(4000):
        g = np.zeros(2)
        for d, *ys in zip(longer, *both, strict=True):
            x = math.tanh(d / sd)
            for y in ys:
                off = y - 1 / (1 + math.exp(-theta - phi * x))
                g += [off, off * x]
        theta, phi = theta + 0.02 * g[0], phi + 0.02 * g[1]
    assert found["controlled"] == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-3)
    assert found["phi"] == pytest.approx(phi, abs=1e-2)


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 judgings of 100 posts by a judge with a leaning to long texts; by order independent."""
    monkeypatch.setattr(winrates, "RESAMPLES", 300)
    rng = np.random.default_rng(1)
    theta, phi, hits = 0.4, 0.8, np.zeros(3)
    many = rng.normal(0.5, 1.0, 200_000)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(many / many.std())))
    rate, equal = float(np.mean(p)), 1 / (1 + math.exp(-theta))  # E[outcome] = E[p]
    for seed in range(200):
        longer = rng.normal(0.5, 1.0, 100)
        its = 1 / (1 + np.exp(-theta - phi * np.tanh(longer)))
        two = [[float(v) for v in rng.random(100) < its] for _ in range(2)]
        found = winrates.win_rate(verdicts(*two, [*longer]), seed)
        low, high = found["interval"]
        hits[0] += low <= rate <= high
        low, high = found["controlled_interval"]
        hits[1] += low <= equal <= high
        posts = [i // 4 for i in range(100)]  # four pairs share a post, and its difficulty
        hard = np.repeat(rng.beta(8, 4, 25), 4)
        low, high = winrates.accuracy([*(rng.random(100) < hard).astype(float)], posts, seed)[
            "interval"
        ]
        hits[2] += low <= 2 / 3 <= high
    assert (hits >= 0.9 * 200).all(), hits
    assert (hits <= 0.99 * 200).all(), hits


def test_a_judge_must_be_better_than_the_length_rule() -> None:
    assert winrates.cannot_judge((0.55, 0.65), 0.568)
    assert winrates.cannot_judge((0.568, 0.65), 0.568)
    assert not winrates.cannot_judge((0.57, 0.65), 0.568)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Comparison: A is short.\nPreferred: A", "A"),
        ("Preferred: B\nComparison: B says more.", "B"),
        ("**Preferred:** B.", "B"),
        ("Preferred: Summary A", "A"),
        ("preferred - B, because it is shorter", "B"),
        ("Comparison: B is better.\nPreferred: A", "A"),
        ("Preferred: A or B", None),
        ("Preferred: A/B", None),
        ("Preferred: A\nPreferred: B", None),
        ("Preferred: a shorter one", None),
        ("Preferred:", None),
        ("I cannot help with that.", None),
        ("", None),
        ("Comparison: " + "no " * 17_000 + "\nPreferred: A", "A"),
        ("preferred" + "\n" * 50_000, None),
        ("preferred " * 5_000, None),
    ],
)
def test_what_is_read_of_a_reply(reply: str, verdict: str | None) -> None:
    assert compare.read(reply) == verdict


def test_texts_are_put_into_a_prompt_whatever_they_contain() -> None:
    text = compare.filled("{post}|{a}|{b}", "x {a} \\1", "{b}", "{post}")
    assert text == "x {a} \\1|{b}|{post}"
    compare.check(compare.PROMPT)
