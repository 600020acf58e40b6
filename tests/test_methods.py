"""The paper's core: quantiles, selection, and the words that go by them."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from alt_hpc.errors import InputError
from alt_hpc.methods import quantiles as feedback
from alt_hpc.methods.words import Settings as Words

Q = st.integers(2, 7)
# Few distinct values, so that ties are common; NaN and infinities are a tenth of them.
REWARD = st.one_of(
    st.sampled_from([-1.5, 0.0, 0.5, 2.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
REWARDS = st.lists(REWARD, max_size=40)


def finite_best_first(rewards: list[float]) -> list[int]:
    """Independent of the code's way: repeatedly take the first of the highest."""
    left = [i for i, r in enumerate(rewards) if not math.isnan(r) and not math.isinf(r)]
    order = []
    while left:
        best = left[0]
        for i in left:
            if rewards[i] > rewards[best]:
                best = i
        left.remove(best)
        order.append(best)
    return order


@given(REWARDS, Q)
def test_quantile_is_the_share_of_generations_before_it(rewards: list[float], q: int) -> None:
    order = finite_best_first(rewards)
    expected: list[int | None] = [None] * len(rewards)
    if len(order) >= q:
        for place, i in enumerate(order):
            share = Fraction(place, len(order))  # of generations before this one
            expected[i] = max(k for k in range(q) if Fraction(k, q) <= share)
    assert feedback.quantiles(rewards, q) == expected


@given(REWARDS, Q)
def test_the_authors_way_gives_the_remainder_to_the_last_quantile(
    rewards: list[float], q: int
) -> None:
    order = finite_best_first(rewards)
    found = feedback.quantiles(rewards, q, remainder="last")
    if len(order) < q:
        assert found == [None] * len(rewards)
        return
    size = len(order) // q
    parts = [order[k * size : (k + 1) * size] for k in range(q - 1)] + [order[(q - 1) * size :]]
    assert [[i for i, c in enumerate(found) if c == k] for k in range(q)] == [
        sorted(part) for part in parts
    ]


@given(REWARDS, Q, st.sampled_from(["spread", "last"]))
def test_a_better_quantile_never_holds_a_lower_reward(
    rewards: list[float], q: int, remainder: str
) -> None:
    found = feedback.quantiles(rewards, q, remainder)
    for a, quantile_a in enumerate(found):
        for b, quantile_b in enumerate(found):
            if quantile_a is not None and quantile_b is not None and quantile_a < quantile_b:
                assert rewards[a] >= rewards[b]
                assert rewards[a] > rewards[b] or a < b  # equal rewards: by index


@given(REWARDS, Q)
def test_spread_sizes_differ_by_at_most_one_and_only_finite_rewards_count(
    rewards: list[float], q: int
) -> None:
    found = feedback.quantiles(rewards, q)
    if any(c is not None for c in found):
        assert [c is None for c in found] == [not math.isfinite(r) for r in rewards]
        sizes = Counter(c for c in found if c is not None)
        assert sorted(sizes) == list(range(q))  # none is empty
        assert max(sizes.values()) - min(sizes.values()) <= 1


def test_the_papers_96_generations() -> None:
    rewards = [float(r) for r in np.random.default_rng(0).permutation(96)]
    assert sorted(Counter(feedback.quantiles(rewards, 5)).values()) == [19, 19, 19, 19, 20]
    last = Counter(feedback.quantiles(rewards, 5, remainder="last"))
    assert [last[k] for k in range(5)] == [19, 19, 19, 19, 20]
    assert feedback.quantiles(rewards, 5)[rewards.index(95.0)] == 0
    assert feedback.quantiles(rewards, 5)[rewards.index(0.0)] == 4


def test_infinite_reward_is_set_aside_and_not_the_best() -> None:
    assert feedback.quantiles([math.inf, 1.0, math.nan, 2.0, -math.inf], 2) == [
        None,
        1,
        None,
        0,
        None,
    ]


MEMBERS = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 4)), st.booleans()), max_size=40)


@given(MEMBERS, st.integers(1, 5), st.integers(0, 2**31))
def test_selection_keeps_the_asked_number_of_each_quantile_finished_ones_first(
    members: list[tuple[int | None, bool]], keep: int, seed: int
) -> None:
    found, finished = [c for c, _ in members], [f for _, f in members]
    chosen = feedback.select(found, finished, keep, np.random.default_rng(seed))
    assert len(set(chosen)) == len(chosen)
    for quantile in range(5):
        ours = [i for i in chosen if found[i] == quantile]
        everyone = [i for i, c in enumerate(found) if c == quantile]
        assert len(ours) == min(keep, len(everyone))
        ended = sum(finished[i] for i in everyone)
        assert sum(finished[i] for i in ours) == min(ended, len(ours))
    assert all(found[i] is not None for i in chosen)
    assert chosen == feedback.select(found, finished, keep, np.random.default_rng(seed))


def test_selection_is_uniform() -> None:
    found, finished = [0] * 6 + [1] * 2, [True] * 4 + [False] * 4
    rng = np.random.default_rng(11)
    draws, counts = 6000, Counter[tuple[int, ...]]()
    for _ in range(draws):
        chosen = feedback.select(found, finished, 2, rng)
        counts[tuple(sorted(i for i in chosen if found[i] == 0))] += 1
    assert len(counts) == 6  # the pairs of the four that ended
    chi_square = sum((n - draws / 6) ** 2 / (draws / 6) for n in counts.values())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


SCORES = st.lists(st.lists(st.floats(-9, 9), min_size=1, max_size=6), min_size=1, max_size=6)


@given(SCORES, Q)
def test_quarks_quantiles_are_over_the_pool_of_all_prompts(
    rewards: list[list[float]], q: int
) -> None:
    """Then a row alone says nothing, and the labels of an iteration come from all its rows."""
    scores = [{"rewards": row} for row in rewards]
    method = Words(quantiles=q, texts=list("abcdefg"[:q]), pool="iteration")
    assert {method.label(row) for row in scores} == {None}
    labels = list(method.labels(scores))
    found = [c for label in labels for c in label.quantiles]
    assert found == feedback.quantiles([r for row in rewards for r in row], q)
    assert [len(label.quantiles) for label in labels] == [len(row) for row in rewards]


@given(SCORES, Q)
def test_what_was_decided_prompt_by_prompt_is_never_decided_again(
    rewards: list[list[float]], q: int
) -> None:
    method = Words(quantiles=q, texts=list("abcdefg"[:q]))
    for row in rewards:
        label = method.label({"rewards": row})
        assert label is not None
        assert label.quantiles == feedback.quantiles(row, q)
        words = [None if c is None else method.texts[c] for c in label.quantiles]
        assert label.feedback == words
    written = [{"rewards": [0.0], "quantiles": [3], "feedback": ["as written"]}]
    (read,) = method.labels(written)
    assert (read.quantiles, read.feedback) == ([3], ["as written"])


@pytest.mark.parametrize(
    ("text", "limit", "learned"),
    [
        (" a cat. ", 9, " a cat.<E>"),
        ("a cat", 9, " a cat<E>"),
        ("a cat", 6, " a cat"),
        ("a cat.", 7, " a cat.<E>"),
    ],
)
def test_the_authors_add_an_eos_but_to_what_was_cut_off(
    text: str, limit: int, learned: str
) -> None:
    """They tokenise the stripped text again; a token here is a byte."""
    generation = {"text": text, "ids": [1, 2, 3]}
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<E>"})
    theirs = Words(append_eos=True).learned(generation, tokenizer, limit)
    assert tokenizer.decode(theirs) == learned
    assert Words().learned(generation, tokenizer, limit) == [1, 2, 3]


def test_it_is_asked_with_the_first_and_the_last_word() -> None:
    words = Words(quantiles=3, texts=["Good.", "Fair.", "Bad."])
    asked = [words.ask(how, {}) for how in ("plain", "best", "worst")]  # type: ignore[arg-type]
    assert asked == [None, "Good.", "Bad."]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantiles": 2}, "5 feedback texts for 2 quantiles"),
        ({"quantiles": 2, "texts": ["a", "a"]}, "differ"),
        ({"quantiles": 2, "texts": ["a", "\t "]}, "empty"),
    ],
)
def test_words_that_cannot_be_meant(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Words(**settings).check()
    Words().check()


def test_the_papers_words_are_the_default() -> None:
    """Five quantiles, two generations of each (section 4 and the model card)."""
    assert (Words().quantiles, Words().per_quantile, Words().append_eos) == (5, 2, False)


def test_only_finished_generations_get_a_quantile() -> None:
    method = Words(quantiles=2, texts=["Good.", "Bad."], only_finished=True)
    row = {"rewards": [5.0, 4.0, None, 2.0, 1.0], "finished": [True, False, True, True, True]}
    label = method.label(row)
    assert label is not None
    assert label.quantiles == [0, None, None, 0, 1]
    assert label.feedback == ["Good.", None, None, "Good.", "Bad."]


def test_only_some_quantiles_are_trained_on() -> None:
    method = Words(quantiles=3, texts=["a", "b", "c"], per_quantile=2, trained=[0, 2])
    method.check()
    label = method.label({"rewards": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], "finished": [True] * 6})
    assert label is not None
    chosen = method.select(label, [True] * 6, np.random.default_rng(0))
    assert sorted(chosen) == [(0, "a", 0), (1, "a", 0), (4, "c", 2), (5, "c", 2)]
    assert method.taught == 2


@pytest.mark.parametrize("trained", [[], [0, 3], [1, 1]])
def test_quantiles_that_there_are_not_are_refused(trained: list[int]) -> None:
    method = Words(quantiles=3, texts=["a", "b", "c"], trained=trained)
    with pytest.raises(InputError, match="quantiles"):
        method.check()
