"""The words' diagnosis, against what is put in and against slow computations of the same."""

import itertools
import statistics

import numpy as np
import pytest
from scipy import stats

from alt_hpc.report.diagnosis import Answer, Post, diagnose, post, sentence


def posts(
    rng: np.random.Generator,
    learned: float,
    count: int = 40,
    length: float = 0.0,
    shift: float = 0.0,
) -> list[Post]:
    """Posts of 16 answers: l grows by `learned` with the reward (spread 1), by `length` a token."""
    made = []
    for _ in range(count):
        rewards, lengths = rng.normal(size=16), rng.integers(10, 40, 16)
        lengths = lengths + (10 * rewards).astype(int) * (length != 0)
        words = learned * rewards + length * lengths + rng.normal(size=16) + shift
        values = zip(rewards, lengths, words, strict=True)
        made.append(post([Answer(float(r), True, int(n), float(w)) for r, n, w in values], 2))
    return made


def test_a_post_compares_finished_answers_of_its_best_and_worst_quantile() -> None:
    rewards = [5.0, 1.0, None, 4.0, 2.0, 3.0, 0.0]
    answers = [Answer(r, i != 3, 10 + i, float(i)) for i, r in enumerate(rewards)]
    found = post(answers, 3)  # best 5 and 4 (which did not finish), worst 1 and 0
    assert found.best.tolist() == [[0.0, 10.0]]
    assert found.worst.tolist() == [[1.0, 11.0], [6.0, 16.0]]
    few = post(answers[:2], 3)  # two quantiles of one each
    assert (few.best.tolist(), few.worst.tolist()) == ([[0.0, 10.0]], [[1.0, 11.0]])
    assert diagnose([post(answers[:1], 3)]) is None
    assert diagnose([]) is None


def test_figures_are_those_of_a_slow_computation() -> None:
    made = posts(np.random.default_rng(1), learned=0.5, length=0.05, shift=2.0, count=12)
    shares, ys, xs, nats = [], [], [], []
    for one in made:
        pairs = list(itertools.product(one.best, one.worst))
        shares.append(statistics.fmean(b[0] > w[0] for b, w in pairs))
        ys += [b[0] - w[0] for b, w in pairs]  # every post has 64 pairs: none weighs more
        xs += [b[1] - w[1] for b, w in pairs]
        nats.append((statistics.fmean(one.best[:, 0]) - statistics.fmean(one.worst[:, 0])) / 2)
    found = diagnose(made)
    assert found is not None
    assert found["posts"] == 12
    assert found["share"] == pytest.approx(statistics.fmean(shares))
    assert found["nats"] == pytest.approx(statistics.fmean(nats))
    line = stats.linregress(xs, ys)
    assert found["level"] == pytest.approx(line.intercept / 2)
    assert found["shift"] == pytest.approx(
        np.concatenate([*map(np.concatenate, made)])[:, 0].mean()
    )


def test_nothing_learned_is_a_half_and_its_interval_covers_that() -> None:
    rng, covered, null = np.random.default_rng(2), 0, []
    for _ in range(300):
        found = diagnose(posts(rng, learned=0.0, count=30))
        assert found is not None
        covered += abs(found["share"] - 0.5) <= found["share_error"]
        null.append(abs(found["share"] - 0.5) <= found["null"])
    assert 0.90 < covered / 300 < 0.975
    assert 0.92 < sum(null) / 300 < 0.98  # permuted labels say how far chance goes


def test_a_word_that_is_learned_shows_and_a_shift_does_not() -> None:
    rng = np.random.default_rng(3)
    heard, deaf = diagnose(posts(rng, 1.0)), diagnose(posts(rng, 0.0, shift=50.0))
    assert heard is not None
    assert deaf is not None
    assert heard["share"] - heard["share_error"] > 0.7
    assert abs(deaf["share"] - 0.5) < 2 * deaf["share_error"]
    assert abs(deaf["shift"] - 50.0) < 0.5


def test_what_length_alone_explains_is_gone_at_equal_length() -> None:
    """Longer answers have the higher reward and the higher l: the word was heard as 'be long'."""
    found = diagnose(posts(np.random.default_rng(4), 0.0, length=0.2, count=100))
    assert found is not None
    assert found["share"] > 0.8
    assert found["nats"] > 1.0
    assert abs(found["level"]) < 2 * found["level_error"] < found["nats"]


def test_every_post_counts_the_same() -> None:
    """However many of its answers have finished."""
    many = Post(np.tile([[1.0, 5.0]], (9, 1)), np.tile([[0.0, 5.0]], (9, 1)))
    one = Post(np.array([[0.0, 5.0]]), np.array([[1.0, 5.0]]))
    found = diagnose([many, one])
    assert found is not None
    assert (found["share"], found["nats"]) == (0.5, 0.0)


def test_the_line_says_it() -> None:
    found = {"share": 0.712, "share_error": 0.0449}
    assert sentence(found) == "words: 0.71 ±0.04 of pairs in order (0.50: not learned)"
